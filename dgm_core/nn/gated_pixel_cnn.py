"""Gated PixelCNN's network: what p(pixel | those before it, condition) is made of, in one pass or pixel by pixel.

A. van den Oord et al., 2016. arXiv:1606.05328, fig. 2 and eqs. 2–4: a vertical stack of the rows above and a horizontal
one of the pixel's own row, which together have no blind spot; a condition enters every gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Strict
from dgm_core.contract import DataSpec
from dgm_core.nn.causal import (
    HorizontalConv,
    OddKernel,
    Pointwise,
    RowMemory,
    VerticalConv,
    channel_groups,
    channel_mask,
    condition_row,
    shift_down,
    shift_right,
)
from dgm_core.nn.gated import tanh_gate
from dgm_core.nn.stack import Stack
from dgm_core.nn.tokens import TokenInput, grid_shape

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class GatedPixelCNNSizes(Strict):
    """How deep and wide."""

    channels: int = Field(default=384, ge=1, description="feature maps p of each stack")
    depth: int = Field(default=20, ge=1, description="layers")
    kernel: OddKernel = Field(default=5, description="n of the n×n receptive field of a layer")
    first_kernel: OddKernel = Field(default=7, description="n of the first layer")
    head: int = Field(default=1024, ge=1, description="feature maps of the 1×1 layer before the logits")


class GatedLayer(nn.Module):
    """One layer of both stacks. `first` sees shifted inputs; its current pixel enters through `current` (mask A)."""

    def __init__(self, inputs: int, channels: int, kernel: int, condition: int, colours: int, *, first: bool) -> None:
        super().__init__()
        groups = channel_groups(channels, colours)
        doubled = groups * 2
        self.residual = not first
        self.vertical = VerticalConv(inputs, 2 * channels, kernel)
        self.link = Pointwise(2 * channels, 2 * channels)
        if first:
            self.horizontal = HorizontalConv(inputs, 2 * channels, kernel // 2)
        else:
            self.horizontal = HorizontalConv(inputs, 2 * channels, (kernel + 1) // 2, channel_mask(groups, doubled))
        coloured = first and colours > 1
        mask = channel_mask(range(colours), doubled, strict=True) if coloured else None
        self.current = Pointwise(inputs, 2 * channels, mask) if coloured else None
        self.mix = Pointwise(channels, channels, channel_mask(groups, groups))
        self.condition = Pointwise(condition, 4 * channels) if condition else None

    def above(
        self, convolve: Callable[[Tensor], Tensor], v: Tensor, condition: Tensor | None
    ) -> tuple[Float[Tensor, " B channels rows W"], Float[Tensor, " B 2*channels rows W"]]:
        """The vertical features, and what the horizontal stack receives besides its own."""
        h = convolve(v)
        side = self.link(h)
        if self.condition is not None and condition is not None:
            to_vertical, to_horizontal = self.condition(condition).chunk(2, 1)
            h, side = h + to_vertical, side + to_horizontal
        return tanh_gate(h), side

    def along(self, convolve: Callable[[Tensor], Tensor], h: Tensor, side: Tensor) -> Tensor:
        out = self.mix(tanh_gate(convolve(h) + side))
        return h + out if self.residual else out


@dataclass
class Memory:
    x: Int[Tensor, " n C H W"]
    condition: Tensor | None
    rows: list[Tensor]
    columns: list[RowMemory]
    sides: list[Tensor]  # of the current row, (W, n, 2·channels) a layer


class GatedPixelCNNNetwork(nn.Module):
    def __init__(self, sizes: GatedPixelCNNSizes, data: DataSpec, condition: int) -> None:
        super().__init__()
        self.colours = grid_shape(data)[0]
        self.levels = data.levels or 0
        self.embed = TokenInput(data, sizes.channels)
        self.layers = Stack(
            GatedLayer(
                sizes.channels if depth else self.embed.width,
                sizes.channels,
                sizes.kernel if depth else sizes.first_kernel,
                condition,
                self.colours,
                first=not depth,
            )
            for depth in range(sizes.depth)
        )
        groups = channel_groups(sizes.channels, self.colours)
        head = channel_groups(sizes.head, self.colours)
        logits = [k for k in range(self.colours) for _ in range(self.levels)]
        self.hidden = Pointwise(sizes.channels, sizes.head, channel_mask(groups, head))
        self.out = Pointwise(sizes.head, self.colours * self.levels, channel_mask(head, logits))

    def forward(self, x: Int[Tensor, " B C H W"], condition: Tensor | None) -> Float[Tensor, " B C H W levels"]:
        pixels = self.embed(x, self.out.weight)
        v, h = shift_down(pixels), shift_right(pixels)
        for layer in self.layers:
            v, side = layer.above(layer.vertical, v, condition)
            if layer.current is not None:
                side = side + layer.current(pixels)
            h = layer.along(layer.horizontal, h, side)
        return self._head(h).unflatten(1, (self.colours, self.levels)).movedim(2, -1)

    def start(self, x: Int[Tensor, " n C H W"], condition: Tensor | None) -> Memory:
        n, width = x.shape[0], x.shape[3]
        rows = [layer.vertical.start(n, width) for layer in self.layers]
        columns = [layer.horizontal.start(n, width) for layer in self.layers]
        return Memory(x, condition, rows, columns, [])

    def row(self, memory: Memory, r: int) -> None:
        pixels = self.embed(memory.x[:, :, max(r - 1, 0), None], self.out.weight)
        v = pixels if r else torch.zeros_like(pixels)
        memory.sides.clear()
        for layer, rows in zip(self.layers, memory.rows, strict=True):
            step = partial(layer.vertical.step, memory=rows)
            v, side = layer.above(step, v, condition_row(memory.condition, r))
            memory.sides.append(side[:, :, 0].permute(2, 0, 1).contiguous())

    def step(self, memory: Memory, r: int, c: int, k: int) -> Float[Tensor, " n levels"]:
        previous = self.embed(memory.x[:, :, r, max(c - 1, 0)], self.out.weight)
        h = previous if c else torch.zeros_like(previous)
        for layer, columns, sides in zip(self.layers, memory.columns, memory.sides, strict=True):
            side = sides[c]
            if layer.current is not None:
                side = side + layer.current(self.embed(memory.x[:, :, r, c], self.out.weight))
            h = layer.along(partial(layer.horizontal.step, memory=columns, c=c), h, side)
        return self._head(h)[:, k * self.levels : (k + 1) * self.levels]

    def _head(self, h: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(F.relu(h))))
