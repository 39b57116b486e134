"""Pixel Recurrent Neural Networks. A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu, 2016. arXiv:1601.06759.

The PixelCNN of that paper: p(x) = Π_i p(x_i | x_<i) (eq. 1), pixels in raster order, within a pixel R → G → B (eq. 2),
a softmax over the levels of each (§3.1; of two levels it is the paper's sigmoid). The network (§3.5, §3.6, table 1) is
one stack of masked convolutions (§3.4): 7×7 with mask A; residual blocks of ReLU and convolution with mask B (fig. 5),

    x + W₃ relu(W₂ ∗ relu(W₁ relu(x))),      1×1 from 2h features to h, 3×3, 1×1 back to 2h;

connections from every layer to the output; two layers of ReLU and 1×1 convolution, and the softmax. Every layer's
features are split into one group a colour: where the current pixel is concerned, mask A lets a group see earlier
colours only, mask B its own too. RMSProp, batches of 16 (§5.2).

Masked convolutions have a blind spot: what lies above a pixel and far to its right is never seen, however many layers
there are (u rows up, more than u + 2 columns to the right with the kernels above). Gated PixelCNN was built to see it.

Departures: the initialisation, on which the paper is silent, is Glorot's. RMSProp's rate, which the paper sets by hand
for every data set, is 1e-4, and 1e-3 for the small network of binary images. The form of the layer-to-output
connections is not given either: here the first 1×1 layer reads all blocks. The paper's model is unconditional, as is
the default; labels and contexts, if wanted, enter each 3×3 convolution through a 1×1 one. Codes enter by embeddings.
Expected: 81.30 nats on binarised MNIST and 3.14 bits/dim on CIFAR-10 in the paper, not run here. A masked convolution
costs at most 1.1 × a plain one (3×3, 64 features, 32×32, batch 64): `python -m benchmarks.autoregressive`; samples are
at least 20 × faster than the naive loop's, at batch 16, 32×32 and 10 blocks: `python -m benchmarks.sampling`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import DataSpec
from dgm_core.models.autoregressive.base import Conditioner, RasterModel
from dgm_core.models.autoregressive.pixel_rnn import Memory, PixelConfig, PixelNetwork
from dgm_core.nn.causal import MaskedConv, OddKernel, Pointwise, channel_groups, channel_mask, condition_row
from dgm_core.nn.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int


class ResidualBlock(nn.Module):
    """Figure 5, left: x + expand(relu(convolve(relu(shrink(relu(x))))))."""

    def __init__(self, hidden: int, kernel: int, condition: int, colours: int) -> None:
        super().__init__()
        wide, narrow = channel_groups(2 * hidden, colours), channel_groups(hidden, colours)
        self.shrink = Pointwise(2 * hidden, hidden, channel_mask(wide, narrow))
        self.convolve = MaskedConv(hidden, hidden, kernel, channel_mask(narrow, narrow))
        self.expand = Pointwise(hidden, 2 * hidden, channel_mask(narrow, wide))
        self.condition = Pointwise(condition, hidden) if condition else None

    def forward(self, x: Float[Tensor, " B 2h H W"], condition: Tensor | None) -> Float[Tensor, " B 2h H W"]:
        side = self.side(condition)
        return self.unit(x, lambda h: self.convolve(h) if side is None else self.convolve(h) + side)

    def side(self, condition: Tensor | None) -> Tensor | None:
        """What is added to the convolution."""
        return None if self.condition is None or condition is None else self.condition(condition)

    def unit(self, x: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.expand(F.relu(convolve(F.relu(self.shrink(F.relu(x))))))


class PixelCNNNetwork(PixelNetwork):
    """A stack of residual blocks between the ends that all networks of the paper have."""

    def __init__(self, config: PixelCNN.Config, data: DataSpec, condition: int) -> None:
        super().__init__(config, data, data.levels or 0)
        self.blocks = Stack(
            ResidualBlock(config.hidden, config.kernel, condition, self.colours) for _ in range(config.depth)
        )
        self.close(config, config.depth)

    def forward(self, x: Int[Tensor, " B C H W"], condition: Tensor | None) -> Float[Tensor, " B C H W levels"]:
        h = self.first(self.embed(x, self.out.weight))
        outputs = []
        for block in self.blocks:
            h = block(h, condition)
            outputs.append(h)
        return self.head(outputs).unflatten(1, (self.colours, self.said)).movedim(2, -1)

    def start(self, x: Int[Tensor, " n C H W"], condition: Tensor | None) -> Memory:
        blocks = [block.convolve.start(len(x), self.width) for block in self.blocks]
        return Memory(x, condition, self.first.start(len(x), self.width), blocks)

    def row(self, memory: Memory, r: int) -> None:
        self.begin(memory, r)
        condition = condition_row(memory.condition, r)
        for block, past in zip(self.blocks, memory.layers, strict=True):
            past.row(block.side(condition))

    def column(self, h: Float[Tensor, " n 2h"], memory: Memory, c: int) -> list[Float[Tensor, " n 2h"]]:
        outputs = []
        for block, past in zip(self.blocks, memory.layers, strict=True):
            h = block.unit(h, partial(past.step, c=c))
            outputs.append(h)
        return outputs


class PixelCNN(RasterModel):
    """One stack of masked convolutions, with its blind spot, and a softmax a coordinate."""

    class Config(PixelConfig):
        depth: int = Field(default=15, ge=1, description="residual blocks")
        kernel: OddKernel = Field(default=3, description="n of a block's n×n masked convolution")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        # The paper's MNIST networks: h = 16, and 32 maps at the end (§3.6).
        config = cls.Config(hidden=16, head=32) if data.levels == 2 else cls.Config()
        optimizer = Optimizer(algorithm="rmsprop", lr=1e-3 if data.levels == 2 else 1e-4)
        return config, Recipe(batch_size=16, steps=500_000, optimizers={"model": optimizer})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(hidden=12, depth=4, first_kernel=5, head=48, context_depth=1, conditional=True)
        optimizer = Optimizer(algorithm="rmsprop", lr=2e-3)
        return config, Recipe(batch_size=32, steps=150, optimizers={"model": optimizer})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        self.conditioner = Conditioner(data, config.hidden, config.context_depth, labels=config.conditional)
        self.network = PixelCNNNetwork(config, data, self.conditioner.width)
