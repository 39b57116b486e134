"""WaveNet's network: what p(x_t | x_1 … x_{t−1}, condition) is made of, in one pass or sample by sample.

A. van den Oord et al., 2016. arXiv:1609.03499, figs. 2–4: a causal convolution enters, then `stacks` times dilations of
1, 2, 4 …, each layer gated, residual and with a skip connection (`nn.dilated`); their sum goes through ReLU, 1×1, ReLU,
1×1. A condition (§2.5) enters every gate; one at a lower rate is stretched to the samples' first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Strict
from dgm_core.contract import DataSpec
from dgm_core.nn.causal import Pointwise, shift_right
from dgm_core.nn.dilated import DilatedConv, DilatedStack, Ring, StackMemory
from dgm_core.nn.incremental import TakesPrefix
from dgm_core.nn.tokens import TokenInput

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Upsampling = Literal["transposed", "repeat"]


class WaveNetSizes(Strict):
    """How long, deep and wide."""

    stacks: int = Field(default=3, ge=1, description="how often the dilations are repeated")
    depth: int = Field(default=10, ge=1, le=16, description="layers a stack, of dilations 1, 2, 4 …")
    kernel: int = Field(default=2, ge=2, description="taps of a convolution")
    channels: int = Field(default=512, ge=1, description="features of the residual path")
    hidden: int = Field(default=256, ge=1, description="gated units of a layer")
    skip: int = Field(default=256, ge=1, description="features of the skip connections")
    head: int = Field(default=256, ge=1, description="features of the 1×1 layer before the output")


class Repeat(nn.Module):
    """Each column `ratio` times."""

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Float[Tensor, " B features 1 t"]) -> Float[Tensor, " B features 1 T"]:
        return x.repeat_interleave(self.ratio, 3)


def stretch(features: int, ratio: int, upsampling: Upsampling) -> nn.Module:
    """(B, features, 1, t) -> (B, features, 1, t · ratio), by a transposed convolution or by repetition."""
    if upsampling == "repeat" or ratio == 1:
        return Repeat(ratio)
    # Each output lies between two columns and sees both.
    margin, rest = (0, (ratio + 1) // 2), (0, ratio % 2)
    return nn.ConvTranspose2d(features, features, (1, 2 * ratio), (1, ratio), margin, rest)


@dataclass
class Memory:
    x: Int[Tensor, " n 1 1 T"]
    condition: Tensor | None
    enter: Ring
    entering: Float[Tensor, " n channels"]  # room for what `enter` yields
    stack: StackMemory
    nothing: Float[Tensor, " n width"]  # stands before the first sample


class WaveNetNetwork(nn.Module, TakesPrefix):
    def __init__(self, sizes: WaveNetSizes, data: DataSpec, condition: int, params: int, *, one_hot: bool) -> None:
        super().__init__()
        self.embed = TokenInput(replace(data, kind="codes") if one_hot else data, sizes.channels)
        self.enter = DilatedConv(self.embed.width, sizes.channels, sizes.kernel)
        self.stack = DilatedStack(
            sizes.channels,
            sizes.hidden,
            sizes.skip,
            kernel=sizes.kernel,
            dilations=[2**i for i in range(sizes.depth)] * sizes.stacks,
            condition=condition,
        )
        self.bias = nn.Parameter(torch.zeros(sizes.skip, 1, 1))  # of the sum of skip connections
        self.hidden = Pointwise(sizes.skip, sizes.head)
        self.out = Pointwise(sizes.head, params)

    def forward(self, x: Int[Tensor, " B 1 1 T"], condition: Tensor | None) -> Float[Tensor, " B 1 1 T params"]:
        h = self.enter(shift_right(self.embed(x, self.out.weight)))
        return self._head(self.stack(h, condition) + self.bias).movedim(1, -1)[:, None]

    def start(self, x: Int[Tensor, " n 1 1 T"], condition: Tensor | None) -> Memory:
        n, like = x.shape[0], self.out.weight
        channels = self.enter.weight.shape[0]
        nothing, entering = like.new_zeros(n, self.embed.width), like.new_empty(n, channels)
        return Memory(x, condition, self.enter.start(n), entering, self.stack.start(n, condition), nothing)

    @torch.no_grad()
    def take_prefix(self, memory: Memory, columns: int) -> None:
        first = max(0, columns - self.stack.past - self.enter.past)  # nothing before it is seen any more
        seen = self.embed(memory.x[..., max(0, first - 1) : columns - 1], self.out.weight)
        seen = seen if first else F.pad(seen, (1, 0))
        memory.enter.fill(seen, columns)
        condition = memory.condition
        if condition is not None and condition.shape[3] > 1:
            condition = condition[..., first:columns]
        self.stack.fill(memory.stack, self.enter(seen), condition, columns)

    def row(self, memory: Memory, r: int) -> None:
        """A sequence has no rows above."""

    def step(self, memory: Memory, r: int, c: int, k: int) -> Float[Tensor, " n params"]:
        previous = self.embed(memory.x[:, :, 0, c - 1], self.out.weight) if c else memory.nothing
        entering = memory.enter.step(previous, c, memory.entering)
        return self._head(self.stack.step(memory.stack, entering, c) + self.bias[:, 0, 0])

    def _head(self, skips: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(F.relu(skips))))
