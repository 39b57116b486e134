"""Convolutional LSTM layers that see only what precedes: the Row LSTM and the Diagonal BiLSTM.

A. van den Oord et al., 2016. arXiv:1601.06759, §3.1 and §3.2; the recurrence itself is in `nn.scan`. `forward` takes
features (positions, B, channels) in the order of the layer's plan. For sampling, `start(n)` allocates what the layer
must remember, `row` takes in the row above and `step` yields one column, equal to that part of `forward`.

`sides` are what is known of each position beforehand, a condition: K^is has a 1×1 part for them, unmasked. `pixels`,
the data themselves, are for layers that have a use for rows that are complete. What a kernel of states reaches beyond
the edge of the map is the initial state, which is learnt; of features it is zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.causal import channel_groups, channel_mask
from dgm_core.nn.scan import Plan, diagonal_plan, lstm, row_plan, scan

if TYPE_CHECKING:
    from jaxtyping import Float


class ConvLSTM(nn.Module, ABC):
    """K^ss, K^is and its bias, and the initial state, of `directions` recurrences each.

    `masks` are one a direction, (4h, inputs), None where a K^is sees everything. Kernels start as Glorot's, biases and
    states at zero, but the forget gate's bias at one: so that what a state holds is not halved at each step.
    """

    mask: Tensor | None

    def __init__(self, inputs: int, hidden: int, plan: Plan, masks: list[Tensor | None]) -> None:
        super().__init__()
        directions = len(masks)
        self.hidden, self.plan = hidden, plan
        self.into = nn.Parameter(torch.empty(directions, inputs, 4 * hidden))
        self.bias = nn.Parameter(torch.zeros(directions, 1, 4 * hidden))
        self.state = nn.Parameter(torch.empty(directions, len(plan.steps[0].reads) * hidden, 4 * hidden))
        self.first_hidden = nn.Parameter(torch.zeros(directions, hidden))
        self.first_cell = nn.Parameter(torch.zeros(directions, hidden))
        for kernel in (*self.into, *self.state):
            nn.init.xavier_uniform_(kernel)
        with torch.no_grad():
            self.bias[..., hidden : 2 * hidden] = 1
        whole = [torch.ones(inputs, 4 * hidden) if mask is None else mask.t() for mask in masks]
        self.register_buffer("mask", torch.stack(whole) if any(m is not None for m in masks) else None, False)

    def kernel(self) -> Float[Tensor, " D inputs 4*h"]:
        return self.into if self.mask is None else self.into * self.mask

    def scan(self, inputs: Float[Tensor, " D P B inputs"]) -> Float[Tensor, " D P B h"]:
        gates = torch.baddbmm(self.bias, inputs.flatten(1, 2), self.kernel()).unflatten(1, inputs.shape[1:3])
        return scan(gates, self.state, self.first_hidden, self.first_cell, self.plan)

    @abstractmethod
    def forward(
        self, x: Float[Tensor, " P B features"], sides: Tensor | None = None, pixels: Tensor | None = None
    ) -> Float[Tensor, " P B hidden"]:
        """The states at all positions, in the order of `plan`."""

    @abstractmethod
    def start(self, n: int) -> Any:
        """What is remembered while a grid of n examples is drawn."""

    @abstractmethod
    def row(self, memory: Any, r: int, sides: Tensor | None = None, pixels: Tensor | None = None) -> None:
        """Begin row r, the row above being complete: `sides` (W, n, …) are row r's, `pixels` those of the row above."""

    @abstractmethod
    def step(self, x: Float[Tensor, " n features"], memory: Any, c: int) -> Float[Tensor, " n hidden"]:
        """Column c of the row. A column is written at its place, so that it may be stepped again."""


class RowMemory:
    """What a `RowLSTM` remembers while a grid of n examples is drawn."""

    def __init__(self, layer: RowLSTM, n: int, width: int) -> None:
        self.kernel = layer.kernel()[0]
        self.inputs = self.kernel.new_zeros(n, layer.left + width, layer.features)
        # Of the current row, as far as it is stepped; until `row` is called, of the row above.
        self.hidden = layer.first_hidden.expand(width, n, -1).clone()
        self.cells = layer.first_cell.expand(width, n, -1).clone()
        self.above = self.cells
        self.gates = self.kernel.new_zeros(width, n, 4 * layer.hidden)  # what is known of the row's before its inputs


class RowLSTM(ConvLSTM):
    """One direction, row by row: K^ss is kernel×1, K^is the part of a kernel×1 one that mask B leaves (§3.1, §3.4).

    Args:
        features: split evenly into one group a colour, as the states are; a group of the pixel itself sees its own
            group and those before it.
    """

    def __init__(
        self, features: int, hidden: int, grid: tuple[int, int], kernel: int, colours: int, sides: int = 0
    ) -> None:
        seen = [-1] * (features * (kernel // 2)) + channel_groups(features, colours) + [-1] * sides
        mask = channel_mask(seen, channel_groups(hidden, colours) * 4)
        super().__init__(len(seen), hidden, row_plan(*grid, kernel), [mask])
        self.features, self.grid, self.left = features, grid, kernel // 2

    def forward(
        self, x: Float[Tensor, " P B features"], sides: Tensor | None = None, pixels: Tensor | None = None
    ) -> Float[Tensor, " P B hidden"]:
        columns = F.pad(x.unflatten(0, self.grid), (0, 0, 0, 0, self.left, 0))
        seen = [columns[:, j : j + self.grid[1]].flatten(0, 1) for j in range(self.left + 1)]
        return self.scan(torch.cat(seen if sides is None else [*seen, sides], -1)[None])[0]

    def start(self, n: int) -> RowMemory:
        return RowMemory(self, n, self.grid[1])

    def row(self, memory: RowMemory, r: int, sides: Tensor | None = None, pixels: Tensor | None = None) -> None:
        edge = self.first_hidden.expand(self.left, *memory.hidden.shape[1:])
        padded = torch.cat([edge, memory.hidden, edge])
        seen = torch.cat([padded[j : j + self.grid[1]] for j in range(2 * self.left + 1)], -1)
        memory.gates = seen @ self.state[0] + self.bias[0]
        if sides is not None:
            memory.gates += sides @ memory.kernel[-sides.shape[-1] :]
        memory.above, memory.cells = memory.cells, torch.empty_like(memory.cells)

    def step(self, x: Float[Tensor, " n features"], memory: RowMemory, c: int) -> Float[Tensor, " n hidden"]:
        memory.inputs[:, c + self.left] = x
        seen = memory.inputs[:, c : c + self.left + 1].flatten(1)
        gates = torch.addmm(memory.gates[c], seen, memory.kernel[: seen.shape[1]])
        memory.hidden[c], memory.cells[c] = lstm(gates, memory.above[c])
        return memory.hidden[c]


class DiagonalMemory:
    """What a `DiagonalBiLSTM` remembers while a grid of n examples is drawn."""

    def __init__(self, layer: DiagonalBiLSTM, n: int, width: int) -> None:
        self.kernel = layer.kernel()
        self.inputs = self.kernel.new_zeros(width, n, self.kernel.shape[1])  # of the row, kept for the way back
        self.own = torch.cat([self.kernel[0, : layer.features], layer.state[0, : layer.hidden]])
        # From left to right, the states of the current row, the initial one in front; until `row`, of the row above.
        self.hidden = layer.first_hidden[0].expand(1 + width, n, -1).clone()
        self.cells = layer.first_cell[0].expand(1 + width, n, -1).clone()
        self.lowered = self.hidden.new_zeros(width, n, layer.hidden)  # from right to left, of the row above
        self.gates = self.hidden.new_zeros(width, n, 4 * layer.hidden)  # what is known of the row's before its inputs


class DiagonalBiLSTM(ConvLSTM):
    """Two directions at once, diagonal by diagonal: K^ss is 2×1 along the diagonals, K^is 1×1 with mask B (§3.2).

    The states from right to left are shifted down by one row and added to those from left to right, so that nothing of
    the future is seen. `pixels` are read from right to left only, whole: there the shift makes it legal to see the
    pixel itself.
    """

    mirror: Tensor
    above: Tensor

    def __init__(
        self, features: int, hidden: int, grid: tuple[int, int], colours: int, sides: int = 0, pixels: int = 0
    ) -> None:
        gates = channel_groups(hidden, colours) * 4
        seen = channel_groups(features, colours) + [-1] * sides
        masks = [channel_mask(seen + [kept] * pixels, gates) for kept in (colours, -1)]
        plan = diagonal_plan(*grid)
        super().__init__(len(seen) + pixels, hidden, plan, masks)
        self.features, self.grid = features, grid
        place = {divmod(at, grid[1]): i for i, at in enumerate(plan.order)}
        mirrored = {(r, c): place[r, grid[1] - 1 - c] for r, c in place}
        none = len(place)
        self.register_buffer("mirror", torch.tensor(list(mirrored.values())), persistent=False)
        self.register_buffer(
            "above", torch.tensor([mirrored.get((r - 1, c), none) for r, c in place]), persistent=False
        )

    def forward(
        self, x: Float[Tensor, " P B features"], sides: Tensor | None = None, pixels: Tensor | None = None
    ) -> Float[Tensor, " P B hidden"]:
        parts = [part for part in (x, sides, pixels) if part is not None]
        seen = torch.cat(parts, -1) if len(parts) > 1 else x
        right, left = self.scan(torch.stack([seen, seen.index_select(0, self.mirror)]))
        return right + F.pad(left, (0, 0, 0, 0, 0, 1)).index_select(0, self.above)

    def start(self, n: int) -> DiagonalMemory:
        return DiagonalMemory(self, n, self.grid[1])

    def row(self, memory: DiagonalMemory, r: int, sides: Tensor | None = None, pixels: Tensor | None = None) -> None:
        if r:
            if pixels is not None:
                memory.inputs[..., -pixels.shape[-1] :] = pixels
            memory.lowered = self._back(memory, r)
        above = memory.hidden[1:]
        memory.gates = above @ self.state[0, self.hidden :] + self.bias[0]
        if sides is not None:
            known = slice(self.features, self.features + sides.shape[-1])
            memory.inputs[..., known] = sides
            memory.gates += sides @ memory.kernel[0, known]

    def step(self, x: Float[Tensor, " n features"], memory: DiagonalMemory, c: int) -> Float[Tensor, " n hidden"]:
        memory.inputs[c, :, : self.features] = x
        gates = torch.addmm(memory.gates[c], torch.cat([x, memory.hidden[c]], 1), memory.own)
        memory.hidden[c + 1], memory.cells[c + 1] = lstm(gates, memory.cells[c])
        return memory.hidden[c + 1] + memory.lowered[c]

    def _back(self, memory: DiagonalMemory, r: int) -> Float[Tensor, " W n hidden"]:
        """The states of row r − 1 from right to left."""
        above = memory.lowered if r > 1 else self.first_hidden[1].expand_as(memory.lowered)
        gates = memory.inputs @ memory.kernel[1] + above @ self.state[1, self.hidden :] + self.bias[1]
        hidden, cell = (first[1].expand_as(above[0]) for first in (self.first_hidden, self.first_cell))
        states = []
        for ahead in gates.flip(0):
            hidden, cell = lstm(torch.addmm(ahead, hidden, self.state[1, : self.hidden]), cell)
            states.append(hidden)
        return torch.stack(states[::-1])
