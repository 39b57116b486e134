"""The two streams of PixelCNN++: gated residual blocks of what is known above, and of what is known before.

T. Salimans, A. Karpathy, X. Chen, D. P. Kingma, 2017. arXiv:1701.05517, section 2.3 and 2.4. At a pixel the first
stream (`above`) knows rows only, each over its whole width; the second (`before`) knows the row to its left too, and
sees the first. Convolutions are weight-normalised; the nonlinearity is ψ(x) = elu([x, −x]).

`forward` takes whole grids. For drawing, the first stream moves a row at a time (`row`), the second a column (`step`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.causal import Pointwise, RasterMemory, RowsMemory
from dgm_core.nn.weight_norm import ShiftedConv, ShiftedDeconv, WeightNormPointwise

if TYPE_CHECKING:
    from jaxtyping import Float

ABOVE = partial(ShiftedConv, columns=3, right=1)  # rows r − 1 and r, the pixel's own column and one to either side
BEFORE = partial(ShiftedConv, columns=2, right=0)  # rows r − 1 and r, the pixel's own column and one to its left


class Streams(NamedTuple):
    """Features of both streams."""

    above: Float[Tensor, " B features H W"]
    before: Float[Tensor, " B features H W"]


def concat_elu(x: Float[Tensor, " B c *grid"]) -> Float[Tensor, " B 2c *grid"]:
    return F.elu(torch.cat([x, -x], 1))


def add(h: Tensor, side: Tensor | None) -> Tensor:
    return h if side is None else h + side


class GatedBlock(nn.Module):
    """x + a ⊙ σ(b), (a, b) = conv₂(dropout(ψ(conv₁(ψ(x)) + U ψ(shortcuts)))) + V condition.

    The second convolution starts ten times smaller, so that a deep stack begins near the identity.
    """

    def __init__(
        self, conv: Callable[..., ShiftedConv], features: int, shortcuts: int, condition: int, dropout: float
    ) -> None:
        super().__init__()
        self.first = conv(2 * features, features)
        self.shortcut = WeightNormPointwise(2 * features * shortcuts, features) if shortcuts else None
        self.second = conv(2 * features, 2 * features, scale=0.1)
        self.condition = Pointwise(condition, 2 * features) if condition else None
        self.dropout = nn.Dropout(dropout)
        if self.condition is not None:  # of an embedding of unit variance it makes numbers of the deviation 0.05
            nn.init.normal_(self.condition.weight, std=0.05 * condition**-0.5)

    def forward(self, x: Tensor, shortcuts: list[Tensor], condition: Tensor | None) -> Tensor:
        side, late = self.side(shortcuts), self.late(condition)
        return self.unit(x, lambda h: add(self.first(h), side), lambda h: add(self.second(h), late))

    def side(self, shortcuts: list[Tensor]) -> Tensor | None:
        """U ψ(shortcuts)."""
        return None if self.shortcut is None else self.shortcut(torch.cat([concat_elu(x) for x in shortcuts], 1))

    def late(self, condition: Tensor | None) -> Tensor | None:
        """V condition."""
        return None if self.condition is None or condition is None else self.condition(condition)

    def unit(self, x: Tensor, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Tensor:
        value, gate = second(self.dropout(concat_elu(first(concat_elu(x))))).chunk(2, 1)
        return x + value * gate.sigmoid()


@dataclass
class LayerMemory:
    above: tuple[RowsMemory, RowsMemory]
    before: tuple[RasterMemory, RasterMemory]
    from_above: Tensor  # of the second stream's shortcuts: the weight on the first stream
    from_mirror: Tensor  # and on its own features of the way down


class Layer(nn.Module):
    """A block of each stream. With `mirrored`, both have a shortcut from their mirror images on the way down."""

    def __init__(self, features: int, condition: int, dropout: float, *, mirrored: bool) -> None:
        super().__init__()
        self.above = GatedBlock(ABOVE, features, int(mirrored), condition, dropout)
        self.before = GatedBlock(BEFORE, features, 1 + int(mirrored), condition, dropout)

    def forward(self, x: Streams, mirror: Streams | None, condition: Tensor | None) -> Streams:
        above = self.above(x.above, [] if mirror is None else [mirror.above], condition)
        shortcuts = [above] if mirror is None else [above, mirror.before]
        return Streams(above, self.before(x.before, shortcuts, condition))

    def start(self, n: int, width: int) -> LayerMemory:
        a, b = self.above, self.before
        assert b.shortcut is not None
        weight, half = b.shortcut.weight(), b.first.direction.shape[1]
        return LayerMemory(
            (a.first.start_rows(n, width), a.second.start_rows(n, width)),
            (b.first.start_columns(n, width), b.second.start_columns(n, width)),
            weight[:, :half, None, None],
            weight[:, half:].t(),
        )

    def row(self, past: LayerMemory, above: Tensor, mirror: Tensor | None, condition: Tensor | None) -> Tensor:
        """The first stream's next row; the second one is told what it needs of it."""
        first, second = past.above
        side, late = self.above.side([] if mirror is None else [mirror]), self.above.late(condition)
        above = self.above.unit(above, lambda h: add(first.step(h), side), lambda h: add(second.step(h), late))
        assert self.before.shortcut is not None
        past.before[0].row(F.conv2d(concat_elu(above), past.from_above, self.before.shortcut.bias))
        past.before[1].row(self.before.late(condition))
        return above

    def step(self, past: LayerMemory, before: Tensor, mirror: Tensor | None, c: int) -> Tensor:
        """The second stream's column c."""
        first, second = past.before
        side = None if mirror is None else concat_elu(mirror) @ past.from_mirror
        return self.before.unit(before, lambda h: add(first.step(h, c), side), lambda h: second.step(h, c))


class Halve(nn.Module):
    """To a grid half as wide and high: its (i, j) sees what (2i, 2j) sees, hence nothing from (2i, 2j) on."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.above = ABOVE(features, features, stride=2)
        self.before = BEFORE(features, features, stride=2)

    def forward(self, x: Streams) -> Streams:
        return Streams(self.above(x.above), self.before(x.before))

    def start(self, n: int, width: int) -> tuple[RowsMemory, RasterMemory]:
        return self.above.start_rows(n, width), self.before.start_columns(n, width)


@dataclass
class DoubleMemory:
    above: Float[Tensor, " n features 2 W"]  # both finer rows of the coarse row
    before: Float[Tensor, " 2 W n features"]  # both finer rows of the coarse row, as far as it is known
    weight: Float[Tensor, " features 4*features"]


class Double(nn.Module):
    """Back to a grid twice as wide and high, cut to `height` and `width`."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.above = ShiftedDeconv(features, features, columns=3)
        self.before = ShiftedDeconv(features, features, columns=2)

    def forward(self, x: Streams, height: int, width: int) -> Streams:
        return Streams(self.above(x.above)[:, :, :height, :width], self.before(x.before)[:, :, :height, :width])

    def start(self, n: int, coarse: int) -> DoubleMemory:
        """`coarse` is the width of the grid that it starts from."""
        weight, features = self.before.weight(), self.before.bias.shape[0]
        return DoubleMemory(
            weight.new_zeros(n, features, 2, 2 * coarse),
            weight.new_zeros(2, 2 * coarse, n, features),
            weight.permute(0, 2, 3, 1).flatten(1),
        )

    def step(self, past: DoubleMemory, before: Float[Tensor, " n features"], c: int) -> None:
        """Of the coarse column c, the four pixels that it becomes."""
        four = (before @ past.weight).unflatten(1, (2, 2, -1)) + self.before.bias
        past.before[:, 2 * c : 2 * c + 2] = four.permute(1, 2, 0, 3)
