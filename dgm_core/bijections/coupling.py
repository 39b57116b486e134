"""Coupling layers: one part of the coordinates passes unchanged and decides how the rest is transformed.

L. Dinh et al., 2017. arXiv:1605.08803, eqs. 4–9. *Which* part is the layer's affair (`MaskedCoupling`,
`ChannelCoupling`), *how* the rest moves the transformer's (`BoundedAffine`), *how much* the network's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgm_core.bijections.base import Bijection, Context, steer
from dgm_core.precision import promote
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


class Additive(Transformer):
    """z = x + t: keeps volume (L. Dinh et al., 2015. arXiv:1410.8516, eq. 6)."""

    outputs = 1

    def forward(self, x: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift = promote(h) if moves is None else promote(h) * moves
        return promote(x) + shift, torch.zeros_like(shift)

    def inverse(self, z: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift = promote(h) if moves is None else promote(h) * moves
        return promote(z) - shift, torch.zeros_like(shift)


class SigmoidAffine(Transformer):
    """z = x s + t, s = ε + (1 − ε) σ(ŝ + 2): Glow's, near the identity where the network starts, at zero. The authors'
    code has ε = 0; here no input can make the inverse stretch more than a hundredfold."""

    outputs = 2
    smallest = 0.01

    def forward(self, x: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale = self._split(h, moves)
        return torch.addcmul(shift, promote(x), scale), scale.log()

    def inverse(self, z: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale = self._split(h, moves)
        return (promote(z) - shift) / scale, -scale.log()

    def _split(self, h: Tensor, moves: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, raw = promote(h).chunk(2, 1)
        scale = self.smallest + (1 - self.smallest) * (raw + 2).sigmoid()
        return (shift, scale) if moves is None else (shift * moves, scale * moves + (1 - moves))


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


class SplitCoupling(Bijection):
    """The same of a vector, whose network is shown only the coordinates that pass and speaks only of those that move:
    half of a `MaskedCoupling`'s work.

    Args:
        parts: the coordinates that pass, and those that move.
        net: (B, passing) -> (B, outputs · moving).
    """

    def __init__(self, parts: tuple[slice, slice], net: nn.Module, transformer: Transformer) -> None:
        super().__init__()
        self.passing, self.moving = parts
        self.net, self.transformer = net, transformer

    def forward(
        self, x: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        moved, log_slope = self.transformer(x[:, self.moving], steer(self.net, x[:, self.passing], context))
        return self._replace(x, moved), sum_event(log_slope)

    def inverse(
        self, z: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        moved, log_slope = self.transformer.inverse(z[:, self.moving], steer(self.net, z[:, self.passing], context))
        return self._replace(z, moved), sum_event(log_slope)

    def _replace(self, x: Tensor, moved: Tensor) -> Tensor:
        whole = promote(x).clone()
        whole[:, self.moving] = moved
        return whole


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


def alternating_parts(dims: int, parity: int) -> tuple[slice, slice]:
    """Passes: every second coordinate, from coordinate `1 − parity` on. Moves: the others."""
    return slice(1 - parity, dims, 2), slice(parity, dims, 2)


def half_parts(dims: int, parity: int) -> tuple[slice, slice]:
    """Passes: the first ⌊D/2⌋ coordinates, or at parity 1 the others. Moves: the rest."""
    first, second = slice(0, dims // 2), slice(dims // 2, dims)
    return (second, first) if parity else (first, second)
