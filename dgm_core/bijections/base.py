"""Invertible maps that know their Jacobian's determinant.

A bijection's `forward` goes from data towards noise, its `inverse` from noise towards data; both return the result
with log |det| of the map just taken, one number an example. Shapes may change, sizes may not. A flow is a `Chain`
that ends in a flat vector; nets are handed in, so that a coupling, an autoregressive map or a learnt prior differs in
what it is given, not in this interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


Context = Tensor | None  # (B, features): what the map is conditioned on, a label or what an encoder saw


class Bijection(nn.Module, ABC):
    """z = f(x; context), with log |det ∂z/∂x|. A map that has no use for a context ignores it."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, " B *event"], context: Context = None
    ) -> tuple[Float[Tensor, " B *latent"], Float[Tensor, " B"]]:
        """f(x) and log |det ∂f/∂x|."""

    @abstractmethod
    def inverse(
        self, z: Float[Tensor, " B *latent"], context: Context = None
    ) -> tuple[Float[Tensor, " B *event"], Float[Tensor, " B"]]:
        """f⁻¹(z) and log |det ∂f⁻¹/∂z|."""


class Chain(Bijection):
    """f = fₙ ∘ … ∘ f₁: the first listed is next to the data."""

    def __init__(self, *parts: Bijection) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(
        self, x: Float[Tensor, " B *event"], context: Context = None
    ) -> tuple[Float[Tensor, " B *latent"], Float[Tensor, " B"]]:
        log_det = no_log_det(x)
        for part in self.parts:
            x, more = part(x, context)
            log_det = log_det + more
        return x, log_det

    def inverse(
        self, z: Float[Tensor, " B *latent"], context: Context = None
    ) -> tuple[Float[Tensor, " B *event"], Float[Tensor, " B"]]:
        log_det = no_log_det(z)
        for part in reversed(self.parts):
            assert isinstance(part, Bijection)
            z, more = part.inverse(z, context)
            log_det = log_det + more
        return z, log_det


def steer(net: nn.Module, x: Tensor, context: Context) -> Tensor:
    """What a network says of x, and of the context if there is one: `net(x)` or `net(x, context)`."""
    return net(x) if context is None else net(x, context)


def no_log_det(x: Float[Tensor, " B *event"]) -> Float[Tensor, " B"]:
    """Zeros, for a map that keeps volume."""
    return promote(x).new_zeros(x.shape[0])
