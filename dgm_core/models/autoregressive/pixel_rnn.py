"""What the networks of Pixel Recurrent Neural Networks share (arXiv:1601.06759): PixelCNN, and the two recurrent ones.

All three have a 7×7 convolution with mask A in front, and behind their layers, from every one of which connections lead
to the output, two layers of ReLU and 1×1 convolution, and the softmax (table 1). Features are split into one group a
colour: where the current pixel is concerned, mask A lets a group see earlier colours only, mask B its own too (§3.4).

The recurrent ones differ in their LSTM layer alone: layers of h states, each within a residual connection over 2h
features (§3.3, fig. 5),

    x + expand(LSTM(x)),      1×1 from h to 2h.

A condition is added to each layer's input-to-state map by a 1×1 convolution, as §3.6 adds its conditioning map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import DataSpec
from dgm_core.models.autoregressive.base import Conditioner, RasterModel
from dgm_core.nn.causal import (
    MaskedConv,
    OddKernel,
    Pointwise,
    RasterMemory,
    channel_groups,
    channel_mask,
    condition_row,
)
from dgm_core.nn.recurrent import ConvLSTM
from dgm_core.nn.scan import skew, unskew
from dgm_core.nn.stack import Stack
from dgm_core.nn.tokens import TokenInput, grid_shape

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass
class Memory:
    x: Int[Tensor, " n C H W"]
    condition: Tensor | None
    first: RasterMemory
    layers: list[Any]


class PixelConfig(Strict):
    """What all three can be told; each adds its layers."""

    hidden: int = Field(default=128, ge=1, description="h: features, or states, within a layer; 2h outside")
    first_kernel: OddKernel = Field(default=7, description="n of the first layer's n×n masked convolution")
    head: int = Field(default=1024, ge=1, description="feature maps of each of the two 1×1 layers at the end")
    skips: bool = Field(default=True, description="layer-to-output connections")
    context_depth: int = Field(default=4, ge=0, description="residual blocks on each spatial context")
    conditional: bool = Field(default=False, description="use the labels, where the data has classes")


class PixelNetwork(nn.Module, ABC):
    """The first convolution and the last two, and how the pixels known so far enter. A concrete one makes its layers
    and then calls `close`.

    Args:
        said: numbers that say a coordinate's distribution.
    """

    def __init__(self, config: PixelConfig, data: DataSpec, said: int) -> None:
        super().__init__()
        self.colours, _, self.width = grid_shape(data)
        self.said, self.skips = said, config.skips
        self.embed = TokenInput(data, 2 * config.hidden)
        inputs = channel_groups(self.embed.width, self.colours)
        self.wide = channel_groups(2 * config.hidden, self.colours)
        mask = channel_mask(inputs, self.wide, strict=True)
        self.first = MaskedConv(len(inputs), len(self.wide), config.first_kernel, mask)

    def close(self, config: PixelConfig, depth: int) -> None:
        """The end, which reads `depth` layers."""
        head = channel_groups(config.head, self.colours)
        logits = [k for k in range(self.colours) for _ in range(self.said)]
        read = self.wide * depth if self.skips else self.wide
        self.collect = Pointwise(len(read), config.head, channel_mask(read, head))
        self.mix = Pointwise(config.head, config.head, channel_mask(head, head))
        self.out = Pointwise(config.head, len(logits), channel_mask(head, logits))

    def head(self, outputs: list[Float[Tensor, " n 2h *grid"]]) -> Float[Tensor, " n said *grid"]:
        """What is said, from every layer's features."""
        h = torch.cat(outputs, 1) if self.skips else outputs[-1]
        return self.out(F.relu(self.mix(F.relu(self.collect(F.relu(h))))))

    def begin(self, memory: Memory, r: int) -> None:
        """Row r of the first convolution."""
        if r:  # only now is the last pixel of the row above known in full
            memory.first.put(self.embed(memory.x[:, :, r - 1, -1], self.out.weight), self.width - 1)
        memory.first.row()

    def step(self, memory: Memory, r: int, c: int, k: int) -> Float[Tensor, " n levels"]:
        if c and not k:  # when it was stepped, the pixel before lacked its last colour
            memory.first.put(self.embed(memory.x[:, :, r, c - 1], self.out.weight), c - 1)
        h = memory.first.step(self.embed(memory.x[:, :, r, c], self.out.weight), c)
        return self.logits(self.head(self.column(h, memory, c))[:, k * self.said : (k + 1) * self.said])

    @abstractmethod
    def column(self, h: Float[Tensor, " n 2h"], memory: Memory, c: int) -> list[Float[Tensor, " n 2h"]]:
        """Every layer's features at column c of the row, from those of the first convolution."""

    def logits(self, said: Float[Tensor, " *n said"]) -> Float[Tensor, " *n levels"]:
        """Where one number is said of two levels, it is the second's log-odds: the paper's sigmoid."""
        return F.pad(said, (1, 0)) if self.said == 1 else said


class PixelRNNNetwork(PixelNetwork):
    """`layer(features, sides, pixels)` makes an LSTM layer; the first one may read `pixels`, as wide as said."""

    order: Tensor

    def __init__(
        self,
        config: PixelRNN.Config,
        data: DataSpec,
        condition: int,
        layer: Callable[[int, int, int], ConvLSTM],
    ) -> None:
        super().__init__(config, data, 1 if data.levels == 2 else data.levels or 0)
        self.condition = condition
        wide, narrow = self.wide, channel_groups(config.hidden, self.colours)
        self.layers = Stack(layer(len(wide), condition, 0 if i else self.embed.width) for i in range(config.depth))
        self.expand = Stack(Pointwise(len(narrow), len(wide), channel_mask(narrow, wide)) for _ in self.layers)
        self.close(config, config.depth)
        self.register_buffer("order", torch.tensor(self.layers[0].plan.order), persistent=False)

    def forward(self, x: Int[Tensor, " B C H W"], condition: Tensor | None) -> Float[Tensor, " B C H W levels"]:
        pixels = self.embed(x, self.out.weight)
        h = skew(self.first(pixels), self.order)
        sides = None
        if self.condition:  # without one a condition's share is nothing, as it is in `row`
            known = pixels.new_zeros(1, self.condition, 1, 1) if condition is None else condition
            sides = skew(known.expand(len(x), -1, *x.shape[2:]), self.order)
        raw = skew(pixels, self.order)
        outputs = []
        for i, (layer, expand) in enumerate(zip(self.layers, self.expand, strict=True)):
            states = layer(h, sides, None if i else raw)
            h = h + expand(states.flatten(0, 1)).view_as(h)
            outputs.append(h)
        said = self.head([output.flatten(0, 1) for output in outputs]).unflatten(0, h.shape[:2])
        said = unskew(said, self.order, self.width).unflatten(1, (self.colours, self.said)).movedim(2, -1)
        return self.logits(said)

    def start(self, x: Int[Tensor, " n C H W"], condition: Tensor | None) -> Memory:
        n = x.shape[0]
        return Memory(x, condition, self.first.start(n, self.width), [layer.start(n) for layer in self.layers])

    def row(self, memory: Memory, r: int) -> None:
        self.begin(memory, r)
        raw = self.embed(memory.x[:, :, r - 1], self.out.weight).permute(2, 0, 1) if r else None
        sides = condition_row(memory.condition, r)
        if sides is not None:
            sides = sides[:, :, 0].permute(2, 0, 1).expand(self.width, -1, -1)
        for i, (layer, past) in enumerate(zip(self.layers, memory.layers, strict=True)):
            layer.row(past, r, sides, None if i else raw)

    def column(self, h: Float[Tensor, " n 2h"], memory: Memory, c: int) -> list[Float[Tensor, " n 2h"]]:
        outputs = []
        for layer, expand, past in zip(self.layers, self.expand, memory.layers, strict=True):
            h = h + expand(layer.step(h, past, c))
            outputs.append(h)
        return outputs


class PixelRNN(RasterModel):
    """The configuration and recipe that both recurrent ones have; a concrete model makes the layers."""

    class Config(PixelConfig):
        depth: int = Field(default=12, ge=1, description="LSTM layers")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        # The paper's MNIST networks: seven layers, h = 16, and 32 maps at the end.
        binary = data.levels == 2
        config = cls.Config(hidden=16, depth=7, head=32) if binary else cls.Config()
        optimizer = Optimizer(algorithm="rmsprop", lr=1e-3 if binary else 1e-4)
        return config, Recipe(batch_size=16, steps=500_000, optimizers={"model": optimizer})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(hidden=12, depth=2, first_kernel=5, head=48, context_depth=1, conditional=True)
        optimizer = Optimizer(algorithm="rmsprop", lr=2e-3)
        return config, Recipe(batch_size=32, steps=150, optimizers={"model": optimizer})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        self.conditioner = Conditioner(data, config.hidden, config.context_depth, labels=config.conditional)
        self.network = PixelRNNNetwork(config, data, self.conditioner.width, self.layer)

    @abstractmethod
    def layer(self, features: int, sides: int, pixels: int) -> ConvLSTM:
        """An LSTM layer of `hidden` states."""
