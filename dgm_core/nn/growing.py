"""Networks that grow while they train: from a coarse grid to the image's own, each new resolution faded in.

T. Karras, T. Aila, S. Laine, J. Lehtinen, 2018. arXiv:1710.10196, section 2 and figure 2. While a resolution fades in
with weight α, the generator shows (1 − α) of the coarser image, doubled, and α of the finer one; the critic takes
(1 − α) of the halved image's features and α of the finer one's, halved by its block; data is shown likewise. At α = 0
this is the smaller network, at α = 1 the larger one alone, so that no trained layer sees a jump.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.nn.dcgan import SLOPE, grids
from dgm_core.nn.equalised import EqualisedConv2d, EqualisedLinear
from dgm_core.nn.minibatch import MinibatchDeviation

if TYPE_CHECKING:
    from jaxtyping import Float

Size = tuple[int, int]
Fades = tuple[tuple[float, float], ...]
Steps = tuple[tuple[float, int], ...]
LARGEST = 256


class Stage(NamedTuple):
    """How far networks have grown."""

    level: int  # of the finest grid in use; 0 is the coarsest, 4 pixels high or wide
    alpha: float  # its weight; what is missing to one is the level below's


@dataclass(frozen=True)
class Growth:
    """When each grid comes into use.

    Args:
        sizes: of the grids, from the coarsest to the image's.
        fades: shares of training at which a grid starts to fade in, and stands alone, for each that does, the last
            being the image's. Fewer fades than doublings start at a finer grid, none at the image itself.
    """

    sizes: tuple[Size, ...]
    fades: Fades

    def __post_init__(self) -> None:
        times = [t for fade in self.fades for t in fade]
        if self.first < 0:
            raise DataMismatch(
                f"growth names {len(self.fades)} grids to fade in; images of {self.sizes[-1][0]} × "
                f"{self.sizes[-1][1]} have {len(self.sizes) - 1} above the coarsest, of {self.sizes[0][0]} × "
                f"{self.sizes[0][1]}"
            )
        if times != sorted(times) or not all(0 < a < b <= 1 for a, b in self.fades):
            raise DataMismatch(
                f"growth {self.fades} is not accepted: pairs [start, end] of shares of training, 0 < start < end ≤ 1, "
                "in order and without overlap"
            )

    @property
    def first(self) -> int:
        """The level that training starts at."""
        return self.last - len(self.fades)

    @property
    def last(self) -> int:
        return len(self.sizes) - 1

    @property
    def sides(self) -> dict[int, int]:
        """The shorter side of each grid in use, and its level."""
        return {min(self.sizes[k]): k for k in range(self.first, self.last + 1)}

    def window(self, level: int) -> tuple[float, float]:
        """The share of training in which this is the finest grid in use."""
        starts = [0.0, *(start for start, _ in self.fades), 1.0]
        return starts[level - self.first], starts[level - self.first + 1]

    def stage(self, level: int, progress: float) -> Stage:
        """Within `level`'s window; outside of it, at the end that is nearer."""
        if level == self.first:
            return Stage(level, 1.0)
        start, end = self.fades[level - self.first - 1]
        return Stage(level, min(1.0, max(0.0, (progress - start) / (end - start))))

    def at(self, grown: float) -> Stage:
        """The inverse of `Stage.level − 1 + Stage.alpha`."""
        level = max(self.first, min(self.last, math.ceil(grown)))
        return Stage(level, 1.0 if level == self.first else grown - (level - 1))

    def shown(self, x: Float[Tensor, " B C H W"], stage: Stage) -> Float[Tensor, " B C h w"]:
        """Images at the stage's resolution, blurred as far as that still fades in."""
        x = F.avg_pool2d(x, 2 ** (self.last - stage.level))
        return x if stage.alpha == 1 else torch.lerp(double(halve(x)), x, stage.alpha)

    def enlarged(self, x: Float[Tensor, " B C h w"], stage: Stage) -> Float[Tensor, " B C H W"]:
        """To the image's own size, by repeating pixels."""
        return double(x, 2 ** (self.last - stage.level))


def growth(data: DataSpec, fades: Fades) -> Growth:
    """Of images; `DataMismatch` where sides are no powers of two."""
    height, width = data.shape[1:]
    if any(side & (side - 1) or not 8 <= side <= LARGEST for side in (height, width)):
        raise DataMismatch(
            f"this model doubles images from 4 pixels on: height and width are powers of two from 8 to {LARGEST}; "
            f"given {height} × {width}. Prepare the images resized (size: 8, 16, 32, 64, 128 or 256) or padded "
            "(transform: pad)."
        )
    return Growth(tuple(grids(height, width)[::-1]), fades)


def plan(batches: Sequence[int], phase: int, total: int) -> tuple[Fades, Steps, int]:
    """Fades, batch sizes by share of training, and rounds, of an image schedule.

    Args:
        batches: size at each resolution in use, the first alone for `phase` images, every further one faded in over
            `phase` and then alone for as many.
        total: images in all; the last resolution has what is left, and no less than `phase`.
    """
    rounds = phase // batches[0] if len(batches) > 1 else total // batches[0]
    times: list[tuple[int, int]] = []
    for k, size in enumerate(batches[1:], 2):
        start, end = rounds, rounds + phase // size
        times.append((start, end))
        alone = phase if k < len(batches) else max(phase, total - 2 * (len(batches) - 1) * phase)
        rounds = end + alone // size
    sizes = [(0.0, batches[0])]
    for (start, _), size in zip(times, batches[1:], strict=True):
        if size != sizes[-1][1]:
            sizes.append((start / rounds, size))
    return tuple((start / rounds, end / rounds) for start, end in times), tuple(sizes), rounds


def sides_of(data: DataSpec) -> list[int]:
    """Shorter sides of an image's grids from 4 pixels on; of other data, which no model here takes, none."""
    return [min(size) for size in grids(*data.shape[1:])[::-1]] if data.kind == "image" else [4]


def widths_of(sizes: Sequence[Size], features: int, taper: int) -> list[int]:
    """Channels of each grid: `features`, but no more than `taper` over its shorter side."""
    return [max(1, min(features, taper // min(size))) for size in sizes]


def double(x: Float[Tensor, " B C h w"], times: int = 2) -> Float[Tensor, " B C H W"]:
    """Nearest neighbour."""
    return x if times == 1 else F.interpolate(x, scale_factor=float(times), mode="nearest")


def halve(x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B C h w"]:
    """Means of 2 × 2."""
    return F.avg_pool2d(x, 2)


class ToPixels(nn.ModuleList):
    """Of each grid in use, a 1 × 1 convolution onto the image's channels, linear."""

    def __init__(self, channels: int, widths: Sequence[int], first: int) -> None:
        super().__init__(EqualisedConv2d(width, channels, 1, gain=1.0) for width in widths[first:])
        self.first = first

    def grow(
        self, h: Float[Tensor, " B *input"], stage: Stage, block: Callable[[int, Tensor], Tensor]
    ) -> Float[Tensor, " B C h w"]:
        """What `block(0, ·)`, `block(1, ·)`, … make of h up to the stage's grid, as an image."""
        coarse = h
        for k in range(stage.level + 1):
            coarse, h = h, block(k, h)
        image = self[stage.level - self.first](h)
        if stage.alpha == 1:
            return image
        return torch.lerp(double(self[stage.level - 1 - self.first](coarse)), image, stage.alpha)


class GrowingCritic(nn.Module):
    """From pixels by a 1 × 1 convolution, down to the coarsest grid, the batch's deviation, one score (table 2).

    Args:
        widths: channels of each grid, the coarsest first.
        first: level that training starts at; coarser grids need no way in from pixels.
        grid: the coarsest grid.
        halving: (channels, channels of the next coarser grid) -> a block.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], first: int, grid: Size, halving: Callable[[int, int], nn.Module]
    ) -> None:
        super().__init__()
        self.first, width = first, widths[0]
        self.from_pixels = nn.ModuleList(EqualisedConv2d(channels, w, 1) for w in widths[first:])
        self.blocks = nn.ModuleList(halving(fine, coarse) for coarse, fine in pairwise(widths))
        self.head = nn.Sequential(
            MinibatchDeviation(),
            EqualisedConv2d(width + 1, width, 3),
            nn.LeakyReLU(SLOPE),
            nn.Flatten(),
            EqualisedLinear(width * grid[0] * grid[1], width),
            nn.LeakyReLU(SLOPE),
            EqualisedLinear(width, 1, gain=1.0),
            nn.Flatten(0),
        )

    def forward(self, x: Float[Tensor, " B C h w"], stage: Stage) -> Float[Tensor, " B"]:
        h = self._enter(x, stage.level)
        for k in range(stage.level, 0, -1):
            h = self.blocks[k - 1](h)
            if k == stage.level and stage.alpha < 1:
                h = torch.lerp(self._enter(halve(x), k - 1), h, stage.alpha)
        return self.head(h)

    def _enter(self, x: Float[Tensor, " B C h w"], level: int) -> Float[Tensor, " B F h w"]:
        return F.leaky_relu(self.from_pixels[level - self.first](x), SLOPE)
