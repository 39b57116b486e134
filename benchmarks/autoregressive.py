"""Training speed of the autoregressive family: `python -m benchmarks.autoregressive`.

A masked convolution beside a plain one of the same size; a training step (loss and gradients) of `diagonal_bilstm`
beside the same model whose recurrence runs over pixels instead of diagonals, and beside `row_lstm`'s step. The loop
over pixels is spared what is common to both: K^is is applied to the whole map at once, both directions are batched, and
autograd differentiates it. That it computes the same is checked first, in double precision.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, interleave, report
from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.autoregressive.base import RasterModel
from dgm_core.models.autoregressive.diagonal_bilstm import DiagonalBiLSTM
from dgm_core.models.autoregressive.row_lstm import RowLSTM
from dgm_core.nn import recurrent
from dgm_core.nn.causal import MaskedConv, channel_groups, channel_mask
from dgm_core.nn.scan import Plan, lstm

BATCH, SIDE, CHANNELS = 64, 32, 64  # of the convolution
IMAGE, LAYERS, UNITS = 28, 3, 32  # of the recurrent networks


def by_pixel(gates: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, plan: Plan) -> Tensor:
    """What `nn.scan.scan` computes, one position after the other."""
    directions, positions, batch, _ = gates.shape
    sees: list[list[int | None]] = [[None] * len(plan.steps[0].reads) for _ in range(positions)]
    for step in plan.steps:
        for tap, (here, there) in enumerate(step.reads):
            for position, seen in zip(range(here.start, here.stop), range(there.start, there.stop), strict=True):
                sees[position][tap] = seen
    first = hidden[:, None].expand(directions, batch, -1), cell[:, None].expand(directions, batch, -1)
    states: list[tuple[Tensor, Tensor]] = []
    for position, taps in enumerate(sees):
        before = [first if seen is None else states[seen] for seen in taps]
        reached = torch.cat([h for h, _ in before], -1)
        states.append(lstm(torch.baddbmm(gates[:, position], reached, weight), before[plan.carry][1]))
    return torch.stack([h for h, _ in states], 1)


def step(model: RasterModel, x: Tensor) -> Tensor:
    """A training step but for the optimiser's."""
    model.zero_grad()
    loss = model.loss(Batch(x), "model", Clock(0, 1)).value
    loss.backward()
    return loss.detach()


def step_by_pixel(model: RasterModel, x: Tensor) -> Tensor:
    with mock.patch.object(recurrent, "scan", by_pixel):
        return step(model, x)


def disagreement(model: RasterModel, x: Tensor) -> float:
    """Greatest difference of the loss and of any gradient between both ways, in double precision."""
    model.double()
    ours = [step(model, x), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    theirs = [step_by_pixel(model, x), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.float()
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def convolve(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).sum().backward()

    return run


def main() -> int:
    torch.manual_seed(0)
    groups = channel_groups(CHANNELS, 3)
    masked = MaskedConv(CHANNELS, CHANNELS, 3, channel_mask(groups, groups))
    plain = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    grid = torch.randn(BATCH, CHANNELS, SIDE, SIDE, requires_grad=True)
    convolution = interleave(convolve(masked, grid), convolve(plain, grid))

    data = DataSpec("image", (1, IMAGE, IMAGE), 2)
    diagonal = DiagonalBiLSTM(DiagonalBiLSTM.Config(hidden=UNITS, depth=LAYERS, head=UNITS), data)
    row = RowLSTM(RowLSTM.Config(hidden=UNITS, depth=LAYERS, head=UNITS), data)
    x = torch.randint(2, (BATCH, 1, IMAGE, IMAGE), dtype=torch.uint8)
    difference = disagreement(diagonal, x[:4])
    loop = interleave(lambda: step(diagonal, x), lambda: step_by_pixel(diagonal, x))
    rows = interleave(lambda: step(row, x), lambda: step(diagonal, x))

    size = f"3×3, {CHANNELS} channels, {SIDE}×{SIDE}, batch {BATCH}, float32"
    setting = f"{IMAGE}×{IMAGE}, {LAYERS} layers, {UNITS} units, batch {BATCH}, float32"
    return report(
        "autoregressive",
        [
            Row(f"masked over plain convolution, forward and backward ({size})", 1 / convolution.ratio, 1.1, False),
            Row(f"diagonal_bilstm: loop over pixels over ours ({setting})", loop.ratio, 5.0),
            Row("diagonal_bilstm: greatest difference of both (float64)", difference, 1e-9, False, unit=""),
            Row("diagonal_bilstm's step over row_lstm's", rows.ratio, 2.0, False),
            Row("diagonal_bilstm: seconds a step", statistics.median(rows.peer), None, unit="s"),
            Row("row_lstm: seconds a step", statistics.median(rows.ours), None, unit="s"),
            Row("diagonal_bilstm: seconds a step, loop over pixels", statistics.median(loop.peer), None, unit="s"),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
