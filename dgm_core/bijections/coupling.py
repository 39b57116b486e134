"""Coupling layers: one part of the coordinates passes unchanged and decides how the rest is transformed.

L. Dinh et al., 2017. arXiv:1605.08803, eqs. 4–9. *Which* part is the layer's affair (`MaskedCoupling`,
`ChannelCoupling`), *how* the rest moves the transformer's (`BoundedAffine`), *how much* the network's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgm_core.bijections.base import Bijection, Context, promote, steer
from dgm_core.shapes import sum_event

if TYPE_CHECKING:
    from jaxtyping import Float


class Transformer(nn.Module, ABC):
    """An increasing map of each coordinate, steered by `outputs` numbers h for each: axis 1 of h is `outputs` times
    that of x."""

    outputs: int

    @abstractmethod
    def forward(self, x: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image of x and its log-slope, shaped as x; coordinates where `moves` is 0 stay."""

    @abstractmethod
    def inverse(self, z: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The preimage of z and the log-slope of the inverse."""


class BoundedAffine(Transformer):
    """z = x exp(s) + t, with s = bound · tanh(ŝ) and the bound learnt (section 4.1): no input can make it explode."""

    outputs = 2

    def __init__(self) -> None:
        super().__init__()
        self.bound = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._split(h, moves)
        return promote(x) * log_scale.exp() + shift, log_scale

    def inverse(self, z: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._split(h, moves)
        return (promote(z) - shift) * (-log_scale).exp(), -log_scale

    def _split(self, h: Tensor, moves: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, raw = promote(h).chunk(2, 1)
        log_scale = self.bound * raw.tanh()
        return (shift, log_scale) if moves is None else (shift * moves, log_scale * moves)


class MaskedCoupling(Bijection):
    """Coordinates where `mask` is 1 pass, the others move: z = b ⊙ x + (1 − b) ⊙ (x ⊙ exp(s(b ⊙ x)) + t(b ⊙ x))
    (eq. 9).

    Args:
        mask: of zeros and ones, broadcasts against an example.
        net: (B, C, …) -> (B, outputs · C, …).
    """

    mask: Tensor

    def __init__(self, mask: Tensor, net: nn.Module, transformer: Transformer) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.net, self.transformer = net, transformer

    def forward(
        self, x: Float[Tensor, " B *event"], context: Context = None
    ) -> tuple[Float[Tensor, " B *event"], Float[Tensor, " B"]]:
        z, log_slope = self.transformer(x, steer(self.net, x * self.mask, context), 1 - self.mask)
        return z, sum_event(log_slope)

    def inverse(
        self, z: Float[Tensor, " B *event"], context: Context = None
    ) -> tuple[Float[Tensor, " B *event"], Float[Tensor, " B"]]:
        x, log_slope = self.transformer.inverse(z, steer(self.net, z * self.mask, context), 1 - self.mask)
        return x, sum_event(log_slope)


class ChannelCoupling(Bijection):
    """Half of the channels passes, the other half moves (eqs. 4, 5).

    Args:
        net: (B, C/2, …) -> (B, outputs · C/2, …).
        swap: the second half passes instead of the first.
    """

    def __init__(self, net: nn.Module, transformer: Transformer, *, swap: bool) -> None:
        super().__init__()
        self.net, self.transformer, self.swap = net, transformer, swap

    def forward(
        self, x: Float[Tensor, " B C *grid"], context: Context = None
    ) -> tuple[Float[Tensor, " B C *grid"], Float[Tensor, " B"]]:
        passed, moved = self._halves(x)
        moved, log_slope = self.transformer(moved, steer(self.net, passed, context))
        return self._join(passed, moved), sum_event(log_slope)

    def inverse(
        self, z: Float[Tensor, " B C *grid"], context: Context = None
    ) -> tuple[Float[Tensor, " B C *grid"], Float[Tensor, " B"]]:
        passed, moved = self._halves(z)
        moved, log_slope = self.transformer.inverse(moved, steer(self.net, passed, context))
        return self._join(passed, moved), sum_event(log_slope)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, 1)
        return (second, first) if self.swap else (first, second)

    def _join(self, passed: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([moved, promote(passed)] if self.swap else [promote(passed), moved], 1)


def alternating_mask(dims: int, parity: int) -> Float[Tensor, " D"]:
    """Ones at every second coordinate, from coordinate `1 − parity` on."""
    return ((torch.arange(dims) + parity) % 2).float()


def half_mask(dims: int, parity: int) -> Float[Tensor, " D"]:
    """Ones on the first ⌊D/2⌋ coordinates, or at parity 1 on the others."""
    return ((torch.arange(dims) < dims // 2) != bool(parity)).float()


def checkerboard_mask(height: int, width: int, parity: int) -> Float[Tensor, " 1 H W"]:
    """Ones where row + column + parity is odd (figure 3)."""
    return ((torch.arange(height)[:, None] + torch.arange(width) + parity) % 2).float()[None]
