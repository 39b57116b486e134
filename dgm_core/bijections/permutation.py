"""Coordinates in another order, so that the next map's order is another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dgm_core.bijections.base import Bijection, Context, no_log_det

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Reverse(Bijection):
    """Last coordinate first."""

    def forward(
        self, x: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        return x.flip(1), no_log_det(x)

    def inverse(
        self, z: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        return z.flip(1), no_log_det(z)


class Permutation(Bijection):
    """z_i = x_{order[i]}. The order is a buffer: a random one is saved with the model."""

    order: Tensor

    def __init__(self, order: Int[Tensor, " D"]) -> None:
        super().__init__()
        self.register_buffer("order", order)

    def forward(
        self, x: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        return x[:, self.order], no_log_det(x)

    def inverse(
        self, z: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        return z[:, self.order.argsort()], no_log_det(z)
