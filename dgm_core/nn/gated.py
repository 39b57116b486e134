"""Gated units and gated residual blocks, over grids (B, channels, H, W), rows, or columns (B, channels)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.causal import Pointwise

if TYPE_CHECKING:
    from jaxtyping import Float

Sides = tuple[Tensor | None, Tensor | None]


def tanh_gate(x: Float[Tensor, " B 2*c *grid"]) -> Float[Tensor, " B c *grid"]:
    """tanh(first half) ⊙ σ(second half): eq. 2 of van den Oord et al. 2016, arXiv:1606.05328."""
    value, gate = x.chunk(2, 1)
    return value.tanh() * gate.sigmoid()


def plain_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """3×3, not causal: for stacks over what is known in full."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class GatedResidual(nn.Module):
    """x + a ⊙ σ(b), (a, b) = conv₂(dropout(elu(conv₁(elu(x)) + U elu(auxiliary)))) + V condition.

    The residual block of PixelCNN++ (arXiv:1701.05517) and PixelSNAIL (arXiv:1712.09763). `conv(inputs, outputs)` makes
    the two convolutions, through `hidden` channels; the second starts ten times smaller (their code's `init_scale`), so
    that a deep stack begins near the identity.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        conv: Callable[[int, int], nn.Module],
        *,
        auxiliary: int = 0,
        condition: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.first = conv(channels, hidden)
        self.second = conv(hidden, 2 * channels)
        self.auxiliary = Pointwise(auxiliary, hidden) if auxiliary else None
        self.condition = Pointwise(condition, 2 * channels) if condition else None
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.second.weight.mul_(0.1)  # type: ignore[operator]

    def forward(self, x: Tensor, auxiliary: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        return self.unit(x, self.first, self.second, self.sides(auxiliary, condition))

    def start(self, n: int, width: int) -> tuple[Any, Any]:
        return self.first.start(n, width), self.second.start(n, width)  # type: ignore[operator]

    def step(self, x: Tensor, memory: tuple[Any, Any], *at: int, sides: Sides) -> Tensor:
        """The row or column `at` of `forward`; `sides` are those of that row or column."""
        first, second = memory
        return self.unit(
            x,
            lambda h: self.first.step(h, first, *at),  # type: ignore[operator]
            lambda h: self.second.step(h, second, *at),  # type: ignore[operator]
            sides,
        )

    def sides(self, auxiliary: Tensor | None, condition: Tensor | None) -> Sides:
        """What enters after the first and after the second convolution from outside the block."""
        return (
            None if self.auxiliary is None or auxiliary is None else self.auxiliary(F.elu(auxiliary)),
            None if self.condition is None or condition is None else self.condition(condition),
        )

    def unit(
        self, x: Tensor, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], sides: Sides
    ) -> Tensor:
        h = first(F.elu(x))
        if sides[0] is not None:
            h = h + sides[0]
        h = second(self.dropout(F.elu(h)))
        if sides[1] is not None:
            h = h + sides[1]
        value, gate = h.chunk(2, 1)
        return x + value * gate.sigmoid()
