"""The recurrence of convolutional LSTMs over grids: states that are computed together, step by step.

A. van den Oord et al., 2016. arXiv:1601.06759, §3.1 and §3.2. At a position with input x, h⁻ being the states that the
state-to-state kernel reaches and c⁻ the cell that is carried on,

    [o, f, i, g] = σ(K^ss ⊛ h⁻ + K^is ⊛ x)  (tanh for g),   c = f ⊙ c⁻ + i ⊙ g,   h = o ⊙ tanh(c)          (eq. 3)

A `Plan` says in which order. Features stand as (positions, B, channels), positions in that order: what is computed
together lies together, and skewing a map is a permutation, without the paper's offset positions. K^is is applied to the
whole map beforehand; a step is then one product with K^ss and the gates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class Step(NamedTuple):
    """Positions whose states are computed together and, for each tap of the state-to-state kernel, where it reaches."""

    block: slice
    reads: tuple[tuple[slice, slice], ...]  # positions of this block, and those of the block before that they see
    bare: tuple[slice, ...]  # positions of this block that see beyond the edge


class Plan(NamedTuple):
    """In which order states are computed, and what each sees. The cell is carried on along tap `carry`."""

    order: list[int]  # raster index of each position
    steps: list[Step]
    carry: int


def row_plan(height: int, width: int, kernel: int) -> Plan:
    """Row by row; a position sees `kernel` states of the row above, centred on its own column."""
    blocks = [[(r, c) for c in range(width)] for r in range(height)]
    taps = [(-1, offset) for offset in range(-(kernel // 2), kernel // 2 + 1)]
    return _plan(blocks, taps, width, kernel // 2)


def diagonal_plan(height: int, width: int) -> Plan:
    """Diagonal by diagonal, each from the top; a position sees the state to its left, then the one above it."""
    diagonals = range(height + width - 1)
    blocks = [[(r, t - r) for r in range(max(0, t - width + 1), min(height, t + 1))] for t in diagonals]
    return _plan(blocks, [(0, -1), (-1, 0)], width, 0)


def _plan(blocks: list[list[tuple[int, int]]], taps: list[tuple[int, int]], width: int, carry: int) -> Plan:
    place = {at: i for i, at in enumerate(at for block in blocks for at in block)}
    steps = []
    for block in blocks:
        reads, bare = [], []
        for down, right in taps:
            seen = [(place[r, c], place.get((r + down, c + right))) for r, c in block]
            inside = [(i, j) for i, j in seen if j is not None]
            reads.append((_run([i for i, _ in inside]), _run([j for _, j in inside])))
            bare.append(_run([i for i, j in seen if j is None]))
        steps.append(Step(_run([place[at] for at in block]), tuple(reads), tuple(bare)))
    return Plan([r * width + c for r, c in place], steps, carry)


def _run(positions: list[int]) -> slice:
    """Positions that follow each other: in these plans, what lies together is seen by what lies together."""
    return slice(positions[0], positions[-1] + 1) if positions else slice(0, 0)


def skew(x: Float[Tensor, " B C H W"], order: Tensor) -> Float[Tensor, " H*W B C"]:
    """A map as positions in a plan's order."""
    return x.flatten(2).permute(2, 0, 1).index_select(0, order)


def unskew(x: Float[Tensor, " H*W B C"], order: Tensor, width: int) -> Float[Tensor, " B C H W"]:
    """The inverse of `skew`."""
    return x.index_select(0, order.argsort()).permute(1, 2, 0).unflatten(2, (-1, width))


class _Scan(torch.autograd.Function):
    """The recurrence, with its derivative written out: a tape of its many small steps would cost more than they do."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, plan: Plan) -> Tensor:
        size, taps = hidden.shape[1], len(plan.steps[0].reads)
        around = (1, *gates.shape[1:3], 1)
        seen = hidden.repeat(1, taps)[:, None, None].repeat(around)  # h⁻, one tap beside the other
        carried = cell[:, None, None].repeat(around)  # c⁻
        active = gates.new_empty(gates.shape)
        squashed, out = torch.empty_like(carried), torch.empty_like(carried)
        before, start = cell, 0  # the last block's cells, and where it starts
        for block, reads, _ in plan.steps:
            for tap, (here, there) in enumerate(reads):
                seen[:, here, :, tap * size : (tap + 1) * size] = out[:, there]
            here, there = reads[plan.carry]
            if there.stop:
                carried[:, here] = before[:, there.start - start : there.stop - start]
            now = active[:, block]
            torch.baddbmm(gates[:, block].flatten(1, 2), seen[:, block].flatten(1, 2), weight, out=now.flatten(1, 2))
            # tanh(x) = 2σ(2x) − 1, and torch's σ is several times as fast as its tanh.
            now[..., 3 * size :].mul_(2)
            now.sigmoid_()
            now[..., 3 * size :].mul_(2).sub_(1)
            o, f, i, g = now.chunk(4, -1)
            before, start = (f * carried[:, block]).addcmul_(i, g), block.start
            squashed[:, block] = (2 * before).sigmoid_().mul_(2).sub_(1)
            torch.mul(o, squashed[:, block], out=out[:, block])
        ctx.save_for_backward(active, seen, carried, squashed, weight)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        active, seen, carried, squashed, weight = ctx.saved_tensors
        size, transposed = carried.shape[-1], weight.transpose(1, 2)
        d_out, d_cells, d_gates = grads[0].clone(), torch.zeros_like(carried), torch.empty_like(active)
        d_hidden, d_cell = carried.new_zeros(2, weight.shape[0], size)
        for block, reads, bare in reversed(ctx.plan.steps):
            o, f, i, g = active[:, block].chunk(4, -1)
            d_h, d = d_out[:, block], d_gates[:, block]
            d_c = d_cells[:, block]
            d_c += torch.ops.aten.tanh_backward(d_h * o, squashed[:, block])
            torch.mul(d_h, squashed[:, block], out=d[..., :size])
            torch.mul(d_c, carried[:, block], out=d[..., size : 2 * size])
            torch.mul(d_c, g, out=d[..., 2 * size : 3 * size])
            torch.mul(d_c, i, out=d[..., 3 * size :])
            sigmoids, tanh = d[..., : 3 * size], d[..., 3 * size :]
            torch.ops.aten.sigmoid_backward.grad_input(sigmoids, active[:, block, :, : 3 * size], grad_input=sigmoids)
            torch.ops.aten.tanh_backward.grad_input(tanh, g, grad_input=tanh)
            d_c *= f
            d_seen = torch.bmm(d.flatten(1, 2), transposed).view(*d_c.shape[:3], -1)
            for tap, ((here, there), edge) in enumerate(zip(reads, bare, strict=True)):
                d_tap = d_seen[..., tap * size : (tap + 1) * size]
                if there.stop:
                    d_out[:, there] += d_tap[:, here.start - block.start : here.stop - block.start]
                if edge.stop:
                    d_hidden += d_tap[:, edge.start - block.start : edge.stop - block.start].sum((1, 2))
            here, there = reads[ctx.plan.carry]
            d_cells[:, there] = d_cells[:, here]
            d_cell += d_cells[:, bare[ctx.plan.carry]].sum((1, 2))
        d_weight = torch.bmm(seen.flatten(1, 2).transpose(1, 2), d_gates.flatten(1, 2))
        return d_gates, d_weight, d_hidden, d_cell, None


def scan(
    gates: Float[Tensor, " D P B 4*h"],
    weight: Float[Tensor, " D taps*h 4*h"],
    hidden: Float[Tensor, " D h"],
    cell: Float[Tensor, " D h"],
    plan: Plan,
) -> Float[Tensor, " D P B h"]:
    """The states of D independent recurrences, from K^is ⊛ x, from K^ss, and from the initial state and cell."""
    return _Scan.apply(gates.to(weight.dtype), weight, hidden, cell, plan)  # type: ignore[return-value]


def lstm(gates: Float[Tensor, " *n 4*h"], cell: Float[Tensor, " *n h"]) -> tuple[Tensor, Tensor]:
    """State and cell of one position."""
    o, f, i, g = gates.chunk(4, -1)
    cell = torch.addcmul(f.sigmoid() * cell, i.sigmoid(), g.tanh())
    return o.sigmoid() * cell.tanh(), cell
