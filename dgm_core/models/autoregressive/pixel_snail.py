"""PixelSNAIL: An Improved Autoregressive Generative Model. X. Chen, N. Mishra, M. Rohaninejad, P. Abbeel, 2017.
arXiv:1712.09763. As the prior over codes of: Generating Diverse High-Fidelity Images with VQ-VAE-2. A. Razavi,
A. van den Oord, O. Vinyals, 2019. arXiv:1906.00446 (§3.2 and the appendix's table of prior hyper-parameters).

p(x | y, context) = Π_i p(x_i | x_<i, y, context) in raster order. A block is `depth` gated residual blocks of causal
convolutions, then (top level) one causal multi-head attention over everything before,

    a_i = Σ_{j<i} softmax_j(q_i · k_j / √d) v_j,   q from [h, position],   k, v from [x, h, position],

merged by a further 1×1 gated residual block. A stack of 1×1 residual blocks ends the network. Below the top the coarser
codes condition every residual block through a stack of residual blocks and a deconvolution, and there is no attention.
Labels condition every block as well.

Departures: causal convolutions run in two streams (rows above; own row), as in PixelCNN++, where PixelSNAIL has one of
2×2 kernels, whose blind spot its attention covers: below the top there is no attention to cover it. A softmax a
coordinate as in VQ-VAE-2, also on images, instead of the logistic mixture; a colour channel's head sees the pixel's
earlier channels. Glorot initialisation with each block's last convolution at a tenth instead of data-dependent weight
normalisation. Dropout within residual blocks and on the attention weights.
Expected: 3.40 (top) and 3.45 (bottom) nats a code on ImageNet in the VQ-VAE-2 paper, not run here; samples at least
10 × faster than the naive loop's, at batch 16, 32×32 and 10 layers: `python -m benchmarks.sampling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import DataSpec
from dgm_core.models.autoregressive.base import Conditioner, RasterModel
from dgm_core.nn.attention import AttentionMemory, CausalAttention
from dgm_core.nn.causal import (
    HorizontalConv,
    OddKernel,
    Pointwise,
    VerticalConv,
    condition_row,
    shift_down,
    shift_right,
)
from dgm_core.nn.gated import GatedResidual, Sides
from dgm_core.nn.stack import Stack
from dgm_core.nn.tokens import TokenInput, grid_shape

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class AttentionBlock(nn.Module):
    """Attention from [h, position] to the preceding [x, h, position], merged into h."""

    def __init__(self, inputs: int, config: PixelSnail.Config) -> None:
        super().__init__()
        channels, attended = config.channels, config.channels // 2
        queries, memories = channels + 2, inputs + channels + 2
        residual = partial(GatedResidual, hidden=channels, conv=Pointwise, dropout=config.dropout)
        self.query = residual(queries)
        self.memory = residual(memories)
        self.attention = CausalAttention(queries, memories, attended, config.heads, config.dropout)
        self.merge = residual(channels, auxiliary=attended)

    def forward(self, pixels: Tensor, h: Tensor, position: Tensor) -> Tensor:
        query = self.query(torch.cat([h, position], 1))
        memory = self.memory(torch.cat([pixels, h, position], 1))
        return self.merge(h, self.attention(query, memory))


class Block(nn.Module):
    """`depth` residual blocks in each of the two streams, then attention, if any."""

    def __init__(self, inputs: int, condition: int, config: PixelSnail.Config) -> None:
        super().__init__()
        shape = (config.channels, config.hidden)
        vertical = partial(VerticalConv, kernel=config.kernel)
        horizontal = partial(HorizontalConv, taps=(config.kernel + 1) // 2)
        extra = {"condition": condition, "dropout": config.dropout}
        self.vertical = Stack(GatedResidual(*shape, vertical, **extra) for _ in range(config.depth))
        self.horizontal = Stack(
            GatedResidual(*shape, horizontal, auxiliary=config.channels, **extra) for _ in range(config.depth)
        )
        self.attention = AttentionBlock(inputs, config) if config.attention else None


class ChannelHeads(nn.Module):
    """Logits of each channel from the pixel's features and its earlier channels."""

    def __init__(self, channels: int, colours: int, levels: int) -> None:
        super().__init__()
        self.earlier = Stack(Pointwise(k, channels) for k in range(1, colours))
        self.out = Stack(Pointwise(channels, levels) for _ in range(colours))

    def forward(self, h: Tensor, pixels: Tensor, k: int) -> Float[Tensor, " B levels *grid"]:
        return self.out[k](F.elu(h + self.earlier[k - 1](pixels[:, :k]) if k else h))


@dataclass
class Memory:
    x: Int[Tensor, " n C H W"]
    condition: Tensor | None
    enter: tuple[Any, Any]
    rows: list[list[Any]]
    columns: list[list[Any]]
    attention: list[AttentionMemory | None]
    position: Float[Tensor, " H*W n 2"]
    entering: Tensor  # of the current row, (W, n, channels)
    sides: list[list[list[Sides]]]  # of the current row: block, layer, column
    held: list[Tensor]  # each attention's h at the position before
    h: Tensor  # the network's features at the current pixel, which its channels share


class PixelSnailNetwork(nn.Module):
    def __init__(self, config: PixelSnail.Config, data: DataSpec, condition: int) -> None:
        super().__init__()
        self.colours = grid_shape(data)[0]
        self.embed = TokenInput(data, config.channels)
        inputs = self.embed.width
        self.above = VerticalConv(inputs, config.channels, config.kernel)
        self.left = HorizontalConv(inputs, config.channels, (config.kernel + 1) // 2)
        self.blocks = Stack(Block(inputs, condition, config) for _ in range(config.blocks))
        self.output = Stack(
            GatedResidual(config.channels, config.hidden, Pointwise, dropout=config.dropout)
            for _ in range(config.output_depth)
        )
        self.heads = ChannelHeads(config.channels, self.colours, data.levels or 0)

    def forward(self, x: Int[Tensor, " B C H W"], condition: Tensor | None) -> Float[Tensor, " B C H W levels"]:
        pixels = self.embed(x, self.left.weight)
        v = self.above(shift_down(pixels))
        h = self.left(shift_right(pixels)) + v
        position = self._position(x).expand(x.shape[0], -1, -1, -1)
        for block in self.blocks:
            for vertical, horizontal in zip(block.vertical, block.horizontal, strict=True):
                v = vertical(v, None, condition)
                h = horizontal(h, v, condition)
            if block.attention is not None:
                h = block.attention(pixels, h, position)
        for layer in self.output:
            h = layer(h)
        return torch.stack([self.heads(h, pixels, k).movedim(1, -1) for k in range(self.colours)], 1)

    def start(self, x: Int[Tensor, " n C H W"], condition: Tensor | None) -> Memory:
        n, _, height, width = x.shape
        position = self._position(x).expand(n, -1, -1, -1).flatten(2).permute(2, 0, 1).contiguous()
        nothing = self.left.weight.new_zeros(n, self.left.weight.shape[0])
        return Memory(
            x,
            condition,
            (self.above.start(n, width), self.left.start(n, width)),
            [[layer.start(n, width) for layer in block.vertical] for block in self.blocks],
            [[layer.start(n, width) for layer in block.horizontal] for block in self.blocks],
            [b.attention.attention.start(n, height * width) if b.attention is not None else None for b in self.blocks],
            position,
            nothing,
            [],
            [nothing for _ in self.blocks],
            nothing,
        )

    def row(self, memory: Memory, r: int) -> None:
        pixels = self.embed(memory.x[:, :, max(r - 1, 0), None], self.left.weight)
        v = self.above.step(pixels if r else torch.zeros_like(pixels), memory.enter[0])
        condition = condition_row(memory.condition, r)
        width = memory.x.shape[3]
        memory.entering = columns(v, width)
        memory.sides = []
        for block, rows in zip(self.blocks, memory.rows, strict=True):
            memory.sides.append([])
            for vertical, horizontal, past in zip(block.vertical, block.horizontal, rows, strict=True):
                v = vertical.step(v, past, sides=vertical.sides(None, condition))
                first, second = (columns(side, width) for side in horizontal.sides(v, condition))
                memory.sides[-1].append(list(zip(first, second, strict=True)))

    def step(self, memory: Memory, r: int, c: int, k: int) -> Float[Tensor, " n levels"]:
        if k == 0:
            memory.h = self._features(memory, r, c)
        return self.heads(memory.h, self.embed(memory.x[:, :, r, c], self.left.weight) if k else memory.h, k)

    def _features(self, memory: Memory, r: int, c: int) -> Float[Tensor, " n channels"]:
        width = memory.x.shape[3]
        t = r * width + c
        before = divmod(max(t - 1, 0), width)
        previous = self.embed(memory.x[:, :, before[0], before[1]], self.left.weight)
        h = self.left.step(previous if c else torch.zeros_like(previous), memory.enter[1], c) + memory.entering[c]
        for i, block in enumerate(self.blocks):
            for layer, past, sides in zip(block.horizontal, memory.columns[i], memory.sides[i], strict=True):
                h = layer.step(h, past, c, sides=sides[c])
            attention, past = block.attention, memory.attention[i]
            if attention is not None and past is not None:
                if t > 0:  # only now is the previous position known in full
                    known = torch.cat([previous, memory.held[i], memory.position[t - 1]], 1)
                    attention.attention.remember(attention.memory(known), past, t - 1)
                memory.held[i] = h
                query = attention.query(torch.cat([h, memory.position[t]], 1))
                h = attention.merge(h, attention.attention.step(query, past, t))
        for layer in self.output:
            h = layer(h)
        return h

    def _position(self, x: Tensor) -> Float[Tensor, " 1 2 H W"]:
        """Row and column, each scaled to [−1/2, 1/2)."""
        height, width = x.shape[2:]
        like = self.left.weight
        rows = torch.arange(height, device=like.device, dtype=like.dtype) / height - 0.5
        cols = torch.arange(width, device=like.device, dtype=like.dtype) / width - 0.5
        return torch.stack(torch.meshgrid(rows, cols, indexing="ij"))[None]


def columns(row: Tensor | None, width: int) -> Any:
    """A row (n, F, 1, W or 1), or nothing, as its columns (n, F)."""
    if row is None:
        return [None] * width
    return row[:, :, 0].permute(2, 0, 1).expand(width, -1, -1).contiguous()


class PixelSnail(RasterModel):
    """Gated causal convolutions with self-attention, or conditioned on coarser codes: the priors of VQ-VAE-2."""

    class Config(Strict):
        channels: int = Field(default=512, ge=2, description="hidden units: features of both streams")
        hidden: int = Field(default=2048, ge=1, description="residual units: features within a residual block")
        blocks: int = Field(default=4, ge=1, description="blocks, each ending in attention if there is any")
        depth: int = Field(default=5, ge=1, description="residual layers a block")
        kernel: OddKernel = Field(default=5, description="n of the n×n receptive field of a convolution")
        attention: bool = Field(default=True, description="causal self-attention at each block's end")
        heads: int = Field(default=8, ge=1, description="attention heads, over channels / 2 features")
        output_depth: int = Field(default=20, ge=0, description="1×1 residual blocks of the output stack")
        context_depth: int = Field(default=20, ge=0, description="residual blocks of the conditioning stack")
        dropout: float = Field(default=0.1, ge=0, lt=1)
        conditional: bool = Field(default=True, description="use the labels, where the data has classes")

        @model_validator(mode="after")
        def _heads_divide(self) -> Self:
            if self.attention and self.channels % (2 * self.heads):
                raise ValueError(
                    f"channels / 2 = {self.channels / 2:g} features cannot be split over {self.heads} heads"
                )
            return self

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        optimizers = {"model": Optimizer(lr=3e-4)}
        if data.context:
            config = cls.Config(hidden=1024, attention=False, output_depth=0)
            return config, Recipe(batch_size=512, steps=754_000, optimizers=optimizers)
        return cls.Config(), Recipe(batch_size=1024, steps=1_600_000, optimizers=optimizers)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(
            channels=24,
            hidden=24,
            blocks=2,
            depth=1,
            kernel=3,
            attention=not data.context,
            heads=2,
            output_depth=1,
            context_depth=1,
            dropout=0.0,
        )
        return config, Recipe(batch_size=32, steps=150, optimizers={"model": Optimizer(lr=3e-3)})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        self.conditioner = Conditioner(data, config.channels, config.context_depth, labels=config.conditional)
        self.network = PixelSnailNetwork(config, data, self.conditioner.width)
