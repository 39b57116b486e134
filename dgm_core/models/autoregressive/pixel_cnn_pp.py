"""PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications.
T. Salimans, A. Karpathy, X. Chen, D. P. Kingma, 2017. arXiv:1701.05517; where the paper is silent, the authors' code.

p(x) = Π_i p(x_i | x_<i) over whole pixels x_i in raster order, each a mixture of discretised logistics whose channels
are coupled (§2.1, §2.2, eqs. 1–3: `distributions/logistic_mixture.py`). The network (§2.3, §2.4, figure 2) has two
streams. One sees the rows above, by 2×3 convolutions; the other the pixels before, above and to the left, by 2×2 ones,
and the first stream. Both go through gated residual blocks at three resolutions, halved by strided convolutions, and
back up by transposed ones, with a shortcut into each block on the way back from its mirror image on the way down:

    x + a ⊙ σ(b),   (a, b) = conv₂(dropout(ψ(conv₁(ψ(x)) + U ψ(shortcuts)))) + V y,   ψ(x) = elu([x, −x]).

A coarse pixel (i, j) is what is known before pixel (2i, 2j), so that it may serve all four pixels it becomes. Of the
row right above an odd one the finest grid tells alone, 4 · depth + 2 columns to the right (22 by default). Dropout ½
(§2.5), weight normalisation started from the first batch (arXiv:1602.07868), Adam with its rate at 1e-3 · 0.999995^t,
Polyak averaging at 0.9995. All conditionals are known level by level; samples are drawn channel by channel.

Departures: labels enter through an embedding that all blocks share, instead of one matrix of a one-hot label each;
contexts, which the paper has not, enter in the same way. As in the paper's tables labels are not used, unless
`conditional` says so. Height and width need not be multiples of 4: what is over after going back up is cut off. The
rate's decay is spread over the recipe's steps: at another number of them `final` is to be 0.999995^steps again. The
first batch is one of 128, not of 16. Small masses are exact where the code takes a density.
Expected: 2.92 bits/dim on CIFAR-10 in the paper, not run here; samples at least 20 × faster than the naive loop's, at
batch 16, 32×32 and 14 blocks of each stream: `python -m benchmarks.sampling`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.distributions.logistic_mixture import LogisticMixture
from dgm_core.models.autoregressive.base import Conditioner, RasterModel
from dgm_core.nn.causal import RasterMemory, RowsMemory, condition_row, shift_down, shift_right
from dgm_core.nn.stack import Stack
from dgm_core.nn.tokens import TokenInput, grid_shape
from dgm_core.nn.two_streams import Double, DoubleMemory, Halve, Layer, LayerMemory, Streams
from dgm_core.nn.weight_norm import ShiftedConv, WeightNormPointwise, starting

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Level(nn.Module):
    """The layers of one resolution, on the way down and on the way back."""

    def __init__(self, config: PixelCNNPP.Config, condition: int, *, coarsest: bool) -> None:
        super().__init__()
        shape = (config.features, condition, config.dropout)
        self.down = Stack(Layer(*shape, mirrored=False) for _ in range(config.depth))
        self.back = Stack(Layer(*shape, mirrored=True) for _ in range(config.depth + (not coarsest)))


class LevelMemory(NamedTuple):
    down: list[LayerMemory]
    back: list[LayerMemory]
    condition: Tensor | None


@dataclass
class Memory:
    x: Int[Tensor, " n C H W"]
    above: RowsMemory
    left: RasterMemory
    entering: Float[Tensor, " W n features"]  # of the current row
    levels: list[LevelMemory]
    halves: list[tuple[RowsMemory, RasterMemory]]
    doubles: list[DoubleMemory]
    out: Tensor
    live: int  # levels that have a row of their own at the current row
    theta: Tensor  # of the current pixel


class PixelCNNPPNetwork(nn.Module):
    def __init__(self, config: PixelCNNPP.Config, data: DataSpec, condition: int) -> None:
        super().__init__()
        colours, features = grid_shape(data)[0], config.features
        self.mixture = LogisticMixture(data.levels or 0, colours, config.components)
        self.embed = TokenInput(data, features)
        inputs = self.embed.width + 1
        self.above = ShiftedConv(inputs, features, rows=2, columns=3, right=1)
        self.over = ShiftedConv(inputs, features, rows=1, columns=3, right=1)
        self.left = ShiftedConv(inputs, features, rows=2, columns=1, right=0)
        last = config.resolutions - 1
        self.levels = Stack(Level(config, condition, coarsest=s == last) for s in range(last + 1))
        self.halves = Stack(Halve(features) for _ in range(last))
        self.doubles = Stack(Double(features) for _ in range(last))
        self.out = WeightNormPointwise(features, self.mixture.params)

    def forward(self, x: Int[Tensor, " B C H W"], condition: Tensor | None) -> Float[Tensor, " B params H W"]:
        pixels = self._pixels(x)
        h = Streams(shift_down(self.above(pixels)), shift_down(self.over(pixels)) + shift_right(self.left(pixels)))
        kept: list[list[Streams]] = []
        for s, level in enumerate(self.levels):
            h = self.halves[s - 1](h) if s else h
            kept.append([h])
            for layer in level.down:
                h = layer(h, None, at_level(condition, s))
                kept[s].append(h)
        kept[-1].pop()
        for s, level in reversed(list(enumerate(self.levels))):
            if s < len(self.halves):
                h = self.doubles[s](h, *kept[s][0].above.shape[2:])
            for layer, mirror in zip(level.back, reversed(kept[s]), strict=True):
                h = layer(h, mirror, at_level(condition, s))
        return self.out(F.elu(h.before))

    def start(self, x: Int[Tensor, " n C H W"], condition: Tensor | None) -> Memory:
        n, width = x.shape[0], x.shape[3]
        widths = [-(-width // 2**s) for s in range(len(self.levels))]
        return Memory(
            x,
            self.above.start_rows(n, width),
            self.left.start_columns(n, width),
            self.out.bias.new_zeros(width, n, self.above.bias.shape[0]),
            [
                LevelMemory(
                    [layer.start(n, widths[s]) for layer in level.down],
                    [layer.start(n, widths[s]) for layer in level.back],
                    at_level(condition, s),
                )
                for s, level in enumerate(self.levels)
            ],
            [halve.start(n, finer) for halve, finer in zip(self.halves, widths[:-1], strict=True)],
            [double.start(n, coarse) for double, coarse in zip(self.doubles, widths[1:], strict=True)],
            self.out.weight().t(),
            0,
            self.out.bias,
        )

    def row(self, memory: Memory, r: int) -> None:
        above = self._enter_row(memory, r)
        memory.live = self._live(r)
        kept: list[list[Tensor]] = []
        for s in range(memory.live):
            past, i = memory.levels[s], r >> s
            kept.append([above])
            for layer, of_layer in zip(self.levels[s].down, past.down, strict=True):
                above = layer.row(of_layer, above, None, condition_row(past.condition, i))
                kept[s].append(above)
            if s + 1 < memory.live:
                rows, columns = memory.halves[s]
                above = rows.step(above)
                columns.row()
            elif s < len(self.halves):
                memory.halves[s][0].put(above)
        for s in reversed(range(memory.live)):
            past, i = memory.levels[s], r >> s
            if s < len(self.halves):
                double = memory.doubles[s]
                if s + 1 < memory.live:
                    double.above = self.doubles[s].above(above)
                above = double.above[:, :, i % 2, None, : kept[s][0].shape[3]]
            else:
                kept[s].pop()
            for layer, of_layer, mirror in zip(self.levels[s].back, past.back, reversed(kept[s]), strict=True):
                above = layer.row(of_layer, above, mirror, condition_row(past.condition, i))

    def step(self, memory: Memory, r: int, c: int, k: int) -> Float[Tensor, " n levels"]:
        if k == 0:
            before = F.elu(self._column(memory, r, c))
            memory.theta = torch.addmm(self.out.bias, before, memory.out)
        return self.mixture.log_masses(memory.theta, memory.x[:, :, r, c], k)

    def _column(self, memory: Memory, r: int, c: int) -> Float[Tensor, " n features"]:
        """The second stream at the finest pixel (r, c), by way of the coarser ones that begin there."""
        before = memory.entering[c]
        if c:
            before = before + memory.left.step(self._pixels(memory.x[:, :, r, c - 1]), c - 1)
        live = min(memory.live, self._live(c))
        kept: list[list[Tensor]] = []
        for s in range(live):
            kept.append([before])
            for layer, past in zip(self.levels[s].down, memory.levels[s].down, strict=True):
                before = layer.step(past, before, None, c >> s)
                kept[s].append(before)
            if s + 1 < live:
                before = memory.halves[s][1].step(before, c >> s)
            elif s < len(self.halves):
                memory.halves[s][1].put(before, c >> s)
        for s in reversed(range(live)):
            if s < len(self.halves):
                double = memory.doubles[s]
                if s + 1 < live:
                    self.doubles[s].step(double, before, c >> (s + 1))
                before = double.before[(r >> s) % 2, c >> s]
            else:
                kept[s].pop()
            for layer, past, mirror in zip(self.levels[s].back, memory.levels[s].back, reversed(kept[s]), strict=True):
                before = layer.step(past, before, mirror, c >> s)
        return before

    def _enter_row(self, memory: Memory, r: int) -> Float[Tensor, " n features 1 W"]:
        n, features = memory.x.shape[0], self.above.bias.shape[0]
        if r:
            pixels = self._pixels(memory.x[:, :, r - 1, None])
            above, over = memory.above.step(pixels), self.over(pixels)
            memory.entering = over[:, :, 0].permute(2, 0, 1).contiguous()
            memory.left.put(pixels[:, :, 0, -1], memory.x.shape[3] - 1)
        else:
            above = self.above.bias.new_zeros(n, features, 1, memory.x.shape[3])
        memory.left.row()
        return above

    def _live(self, at: int) -> int:
        """How many levels have a row (a column) of their own that begins at this one."""
        return len(list(takewhile(lambda s: at % 2**s == 0, range(len(self.levels)))))

    def _pixels(self, x: Int[Tensor, " B C *grid"]) -> Float[Tensor, " B C+1 *grid"]:
        """With a channel of ones, which tells the image from the padding."""
        pixels = self.embed(x, self.out.direction)
        return torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)


def at_level(condition: Tensor | None, s: int) -> Tensor | None:
    """A condition at every 2^s-th row and column."""
    return None if condition is None else condition[:, :, :: 2**s, :: 2**s]


class PixelCNNPP(RasterModel):
    """Two streams through three resolutions and back, and a mixture of discretised logistics a pixel."""

    class Config(Strict):
        features: int = Field(default=160, ge=1, description="feature maps of each stream")
        depth: int = Field(default=5, ge=1, description="gated residual blocks a stage")
        resolutions: int = Field(default=3, ge=1, description="the image's own and as many halvings, less one")
        components: int = Field(default=10, ge=1, description="K: logistics in the mixture")
        dropout: float = Field(default=0.5, ge=0, lt=1)
        context_depth: int = Field(default=4, ge=0, description="residual blocks on each spatial context")
        conditional: bool = Field(default=False, description="use the labels, where the data has classes")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        steps = 500_000
        adam = Optimizer(lr=1e-3, betas=(0.95, 0.9995), schedule="exponential", final=0.999995**steps, ema=0.9995)
        return cls.Config(), Recipe(batch_size=128, steps=steps, optimizers={"model": adam})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(
            features=12, depth=1, resolutions=2, components=3, dropout=0.1, context_depth=1, conditional=True
        )
        adam = Optimizer(lr=1e-2, betas=(0.9, 0.99), schedule="exponential", final=0.1, ema=0.9)
        return config, Recipe(batch_size=32, steps=150, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        if data.kind == "codes":
            raise DataMismatch(
                "PixelCNNPP places levels on a line, near ones alike; codes have no order. Use gated_pixel_cnn or "
                "pixel_snail, which give every level a logit of its own."
            )
        self.conditioner = Conditioner(data, config.features, config.context_depth, labels=config.conditional)
        self.network = PixelCNNPPNetwork(config, data, self.conditioner.width)

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        """Start the normalised weights from the first batch of all ranks, dropout included."""
        x, y, context, _ = next(batches, None) or self._nothing()
        grid = self._grid(x)
        with torch.no_grad(), starting(self.network):
            self.network(grid, self.conditioner(grid.shape[0], y, context))

    def log_terms(self, grid: Int[Tensor, " B C H W"], theta: Tensor) -> Float[Tensor, " B 1 H W"]:
        return self.network.mixture.log_prob(grid, theta)[:, None]

    def _nothing(self) -> Batch:
        """The batch of a rank without a share of the data: it takes part in the moments all the same."""
        specs = {"": self.data, **self.data.context}
        empty = {name: torch.empty(0, *s.shape, dtype=s.dtype, device=self.device) for name, s in specs.items()}
        return Batch(empty.pop(""), torch.empty(0, dtype=torch.int64, device=self.device), empty)
