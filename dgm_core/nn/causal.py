"""Convolutions that see only what precedes, each over a whole grid or one column at a time.

`forward(x)` takes a grid (B, channels, H, W). For sampling, `start(n, …)` allocates what the layer must remember and
`step(x, memory, …)` yields one row (vertical layers) or one column (horizontal layers), equal to that part of
`forward`. A column is written at its own position, so that it may be stepped again once more of it is known.

Two stacks cover every preceding pixel without a blind spot (van den Oord et al. 2016, arXiv:1606.05328, §2.2): the
vertical one sees rows, each over its whole width, the horizontal one sees the pixel's own row to its left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


def shift_down(x: Float[Tensor, " B c H W"]) -> Float[Tensor, " B c H W"]:
    """Row r becomes row r − 1 of the input; row 0 becomes zero."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Float[Tensor, " B c H W"]) -> Float[Tensor, " B c H W"]:
    """Column c becomes column c − 1 of the input; column 0 becomes zero."""
    return F.pad(x, (1, 0))[..., :-1]


def channel_groups(width: int, groups: int) -> list[int]:
    """Which of `groups` ordered groups each of `width` features belongs to, as evenly as can be."""
    return [feature * groups // width for feature in range(width)]


def channel_mask(
    inputs: Sequence[int], outputs: Sequence[int], *, strict: bool = False
) -> Float[Tensor, " outputs inputs"] | None:
    """1 where an output's group may see an input's: at or before its own (mask B), or before it (`strict`: mask A).

    None where nothing is masked.
    """
    seen = [[float(i < o if strict else i <= o) for i in inputs] for o in outputs]
    return None if all(map(all, seen)) else torch.tensor(seen)


class Pointwise(nn.Module):
    """A 1×1 convolution of a grid (B, inputs, H, W) or a column (B, inputs)."""

    mask: Tensor | None

    def __init__(self, inputs: int, outputs: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("mask", mask, persistent=False)
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Float[Tensor, " B inputs *grid"]) -> Float[Tensor, " B outputs *grid"]:
        weight = self.weight if self.mask is None else self.weight * self.mask
        if x.ndim == 2:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight[:, :, None, None], self.bias)


class VerticalConv(nn.Module):
    """Rows r − ⌈kernel/2⌉ + 1 … r, `kernel` columns wide, centred. Shift its input down to leave out row r itself."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.side = kernel // 2
        self.above = (kernel + 1) // 2 - 1
        self.weight = nn.Parameter(torch.empty(outputs, inputs, self.above + 1, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Float[Tensor, " B inputs H W"]) -> Float[Tensor, " B outputs H W"]:
        return F.conv2d(F.pad(x, (self.side, self.side, self.above, 0)), self.weight, self.bias)

    def start(self, n: int, width: int) -> Float[Tensor, " n inputs above width"]:
        """The rows above the next one, none yet."""
        return self.weight.new_zeros(n, self.weight.shape[1], self.above, width)

    def step(
        self, x: Float[Tensor, " n inputs 1 W"], memory: Float[Tensor, " n inputs above W"]
    ) -> Float[Tensor, " n outputs 1 W"]:
        """The next row. Call it once a row, in order."""
        rows = torch.cat([memory, x.to(memory.dtype)], 2)
        memory.copy_(rows[:, :, 1:])
        return F.conv2d(F.pad(rows, (self.side, self.side)), self.weight, self.bias)


class RowMemory(NamedTuple):
    """What a horizontal layer remembers of the current row, and its weight in the order in which that lies."""

    columns: Float[Tensor, " n padded inputs"]
    weight: Float[Tensor, " outputs taps*inputs"]


class HorizontalConv(nn.Module):
    """Columns c − taps + 1 … c of the pixel's own row; `mask` (outputs, inputs) restricts the last of them."""

    mask: Tensor | None

    def __init__(self, inputs: int, outputs: int, taps: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.left = taps - 1
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, taps))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight)
        if mask is not None:
            mask = F.pad(mask[:, :, None, None], (self.left, 0), value=1.0)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Float[Tensor, " B inputs H W"]) -> Float[Tensor, " B outputs H W"]:
        return F.conv2d(F.pad(x, (self.left, 0)), self._weight(), self.bias)

    def start(self, n: int, width: int) -> RowMemory:
        """Serves every row: a step reads only columns of its own row, already written, and the zeros to their left."""
        weight = self._weight()[:, :, 0].transpose(1, 2).flatten(1)
        return RowMemory(self.weight.new_zeros(n, self.left + width, self.weight.shape[1]), weight)

    def step(self, x: Float[Tensor, " n inputs"], memory: RowMemory, c: int) -> Float[Tensor, " n outputs"]:
        """Column c, from the input's column c and those stepped before it."""
        memory.columns[:, c + self.left] = x
        return F.linear(memory.columns[:, c : c + self.left + 1].flatten(1), memory.weight, self.bias)

    def _weight(self) -> Tensor:
        return self.weight if self.mask is None else self.weight * self.mask
