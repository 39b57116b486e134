"""Convolutions that see only what precedes, each over a whole grid or one column at a time.

`forward(x)` takes a grid (B, channels, H, W). For sampling, `start(n, …)` allocates what the layer must remember and
`step(x, memory, …)` yields one row (vertical layers) or one column (horizontal layers), equal to that part of
`forward`. A column is written at its own position, so that it may be stepped again once more of it is known.

Two stacks cover every preceding pixel without a blind spot (van den Oord et al. 2016, arXiv:1606.05328, §2.2): the
vertical one sees rows, each over its whole width, the horizontal one sees the pixel's own row to its left. One stack of
masked convolutions (arXiv:1601.06759, §3.4) sees both at once, and has the blind spot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


def _odd(kernel: int) -> int:
    if kernel < 3 or kernel % 2 == 0:
        raise ValueError(f"a kernel is centred on its pixel: odd and at least 3, not {kernel}")
    return kernel


OddKernel = Annotated[int, AfterValidator(_odd)]


def shift_down(x: Float[Tensor, " B c H W"]) -> Float[Tensor, " B c H W"]:
    """Row r becomes row r − 1 of the input; row 0 becomes zero."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Float[Tensor, " B c H W"]) -> Float[Tensor, " B c H W"]:
    """Column c becomes column c − 1 of the input; column 0 becomes zero."""
    return F.pad(x, (1, 0))[..., :-1]


def condition_row(condition: Tensor | None, r: int) -> Tensor | None:
    """Row r of a condition that may be the same everywhere."""
    return condition if condition is None or condition.shape[2] == 1 else condition[:, :, r : r + 1]


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


class RowsMemory:
    """What a convolution of whole rows, the newest last, remembers of its input while rows come.

    Args:
        weight: (outputs, inputs, rows, columns).
        pads: columns to the left and to the right of the pixel.
        stride: of the output, both ways; `step` is then for every stride-th row, `put` for the others.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, n: int, width: int, *, pads: tuple[int, int], stride: int = 1
    ) -> None:
        self.weight, self.bias, self.pads, self.stride = weight, bias, pads, stride
        self.rows = weight.new_zeros(n, weight.shape[1], weight.shape[2], width)

    def put(self, x: Float[Tensor, " n inputs 1 W"]) -> None:
        """The input's next row."""
        self.rows = torch.cat([self.rows[:, :, 1:], x], 2)

    def step(self, x: Float[Tensor, " n inputs 1 W"]) -> Float[Tensor, " n outputs 1 W"]:
        """The output at the input's next row."""
        self.put(x)
        return F.conv2d(F.pad(self.rows, self.pads), self.weight, self.bias, stride=(1, self.stride))


class RasterMemory:
    """What a convolution of the rows above and the own row's left remembers of its input while a grid is drawn.

    `row` takes the row above as complete and adds up, for all columns at once, what the rows above contribute; `step`
    adds what the own row does. It serves every row: a step reads only columns of its own row, written since.

    Args:
        weight: (outputs, inputs, rows, columns); the last row is the pixel's own, and `left` of its columns lie left of
            the pixel. What lies right of it there is not read.
        stride: of the output, both ways; `row` is then for every stride-th row only, and `rows` at most 2.
    """

    def __init__(self, weight: Tensor, bias: Tensor, n: int, width: int, *, left: int, stride: int = 1) -> None:
        _, inputs, rows, columns = weight.shape
        self.above, self.bias = weight[:, :, :-1], bias
        self.own = weight[:, :, -1, : left + 1].transpose(1, 2).flatten(1).t()
        self.pads, self.stride = (left, columns - 1 - left), stride
        self.rows = weight.new_zeros(n, inputs, rows - 1, width)
        self.columns = weight.new_zeros(n, left + width, inputs)
        self.sides: Tensor | None = None  # (columns of the output, n, outputs)

    def row(self, extra: Float[Tensor, " n outputs 1 W"] | None = None) -> None:
        """Call it for each row, in order, before its columns; `extra` is added to the whole row."""
        last = self.columns[:, self.pads[0] :].transpose(1, 2)[:, :, None]
        self.rows = torch.cat([self.rows[:, :, 1:], last], 2)
        sides = F.conv2d(F.pad(self.rows, self.pads), self.above, self.bias, stride=(1, self.stride))
        sides = sides if extra is None else sides + extra
        self.sides = sides[:, :, 0].permute(2, 0, 1).contiguous()

    def put(self, x: Float[Tensor, " n inputs"], c: int) -> None:
        """The input's column c of the current row."""
        self.columns[:, c + self.pads[0]] = x

    def step(self, x: Float[Tensor, " n inputs"], c: int) -> Float[Tensor, " n outputs"]:
        """The output at the input's column c, from that column and those put before it."""
        assert self.sides is not None, "row comes before its columns"
        self.put(x, c)
        seen = self.columns[:, c : c + self.pads[0] + 1].flatten(1)
        return torch.addmm(self.sides[c // self.stride], seen, self.own)


class MaskedConv(nn.Module):
    """A kernel×kernel convolution that sees the rows above and the own row up to the pixel itself.

    Of the pixel itself an output sees what `mask` (outputs, inputs) lets through, see `channel_mask`; all, if None. The
    rows below, where a mask has zeros only, are neither stored nor multiplied: kernel // 2 + 1 rows are left. Layer on
    layer leaves a blind spot: u rows up nothing is seen more than u · (kernel // 2) columns to the right.
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.side = kernel // 2
        self.weight = nn.Parameter(torch.empty(outputs, inputs, self.side + 1, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight)
        seen = torch.ones(1 if mask is None else outputs, 1 if mask is None else inputs, self.side + 1, kernel)
        seen[:, :, -1, self.side + 1 :] = 0
        if mask is not None:
            seen[:, :, -1, self.side] = mask
        self.register_buffer("mask", seen, persistent=False)

    def forward(self, x: Float[Tensor, " B inputs H W"]) -> Float[Tensor, " B outputs H W"]:
        x = F.pad(x, (0, 0, self.side, 0))
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=(0, self.side))

    def start(self, n: int, width: int) -> RasterMemory:
        return RasterMemory(self.weight * self.mask, self.bias, n, width, left=self.side)
