"""Cached sampling beside the naive loop of the same model: `python -m benchmarks.sampling`.

Both draw 16 grids of 32×32 from at least ten layers in single precision. The naive loop runs the whole network for
every coordinate; as each of its 1,024 passes costs the same, it is timed on `PASSES` of them, spread evenly over the
grid, and scaled. That both draw the same tokens is checked at those coordinates in double precision, where rounding
does not decide a draw.
"""

from __future__ import annotations

import statistics
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Row, interleave, report
from dgm_core.contract import DataSpec
from dgm_core.models.autoregressive.base import RasterModel
from dgm_core.models.autoregressive.diagonal_bilstm import DiagonalBiLSTM
from dgm_core.models.autoregressive.gated_pixel_cnn import GatedPixelCNN
from dgm_core.models.autoregressive.pixel_cnn import PixelCNN
from dgm_core.models.autoregressive.pixel_cnn_pp import PixelCNNPP
from dgm_core.models.autoregressive.pixel_snail import PixelSnail
from dgm_core.models.autoregressive.row_lstm import RowLSTM
from dgm_core.nn.incremental import draw_categorical

BATCH, SIDE, PASSES = 16, 32, 4


class Case(NamedTuple):
    """A model, what its layers are, and how many times faster than the naive loop it is to be."""

    model: RasterModel
    depth: str
    goal: float


def cases() -> dict[str, Case]:
    """The papers' depths or ten layers, at widths that one naive pass takes about a second or two on two cores."""
    image = DataSpec("image", (1, SIDE, SIDE), 256)
    codes = DataSpec("codes", (SIDE, SIDE), 512)
    gated = GatedPixelCNN.Config(channels=64, depth=10, kernel=3, head=64)
    snail = PixelSnail.Config(channels=64, hidden=64, blocks=2, depth=5, kernel=3, heads=4, output_depth=2)
    plain = PixelCNN.Config(hidden=64, depth=10, head=64)
    logistic = PixelCNNPP.Config(features=64, depth=2, resolutions=3)  # 3 · 2 blocks down and 2 + 3 + 3 back
    return {
        "gated_pixel_cnn": Case(GatedPixelCNN(gated, image), "10 layers", 10.0),
        "pixel_snail": Case(PixelSnail(snail, codes), "10 layers", 10.0),
        "pixel_cnn": Case(PixelCNN(plain, image), "10 blocks", 20.0),
        "pixel_cnn_pp": Case(PixelCNNPP(logistic, image), "14 blocks a stream", 20.0),
        "row_lstm": Case(RowLSTM(RowLSTM.Config(hidden=32, depth=12, head=64), image), "12 layers", 20.0),
        "diagonal_bilstm": Case(
            DiagonalBiLSTM(DiagonalBiLSTM.Config(hidden=32, depth=12, head=64), image), "12 layers", 20.0
        ),
    }


@torch.no_grad()
def naive_draws(model: RasterModel, canvas: Tensor, noise: Tensor) -> list[Tensor]:
    """What the naive loop draws at `PASSES` coordinates, given all that precedes each of them."""
    drawn = []
    for position in range(SIDE * SIDE // PASSES - 1, SIDE * SIDE, SIDE * SIDE // PASSES):
        r, c = divmod(position, SIDE)
        seen = canvas.clone()
        seen.flatten(1)[:, position:] = 0
        said = model.network(seen, None)
        if isinstance(model, PixelCNNPP):  # parameters of a mixture (B, params, H, W), not logits (B, C, H, W, levels)
            logits = model.network.mixture.log_masses(said[:, :, r, c], seen[:, :, r, c], 0)
        else:
            logits = said[:, 0, r, c]
        drawn.append(draw_categorical(logits, noise[:, 0, r, c]))
    return drawn


def agreement(model: RasterModel) -> float:
    """Share of the checked tokens on which both agree, in double precision and with the same random numbers."""
    model.double()
    torch.manual_seed(0)
    canvas = model.sample(BATCH).view(BATCH, 1, SIDE, SIDE).long()
    torch.manual_seed(0)
    noise = torch.rand(canvas.shape, dtype=torch.float64)
    naive = torch.stack(naive_draws(model, canvas, noise), 1)
    checked = canvas.flatten(1)[:, SIDE * SIDE // PASSES - 1 :: SIDE * SIDE // PASSES]
    model.float()
    return (naive == checked).double().mean().item()


def main() -> int:
    torch.manual_seed(0)
    rows = []
    for name, (model, depth, goal) in cases().items():
        model.eval()
        setting = f"batch {BATCH}, {SIDE}×{SIDE}, {depth}, float32"
        same = agreement(model)
        canvas = torch.randint(model.data.levels or 0, (BATCH, 1, SIDE, SIDE))
        noise = torch.rand(canvas.shape)
        scale = SIDE * SIDE / PASSES
        pairs = interleave(lambda m=model: m.sample(BATCH), lambda m=model, x=canvas, u=noise: naive_draws(m, x, u))
        naive = scale * statistics.median(pairs.peer)
        rows += [
            Row(f"{name}: cached over naive ({setting})", scale * pairs.ratio, goal),
            Row(f"{name}: tokens equal to the naive loop's (float64)", 100 * same, 100.0, unit="%"),
            Row(f"{name}: seconds, cached, whole grid", statistics.median(pairs.ours), None, unit="s"),
            Row(f"{name}: seconds, naive, {PASSES} of {SIDE * SIDE} passes, scaled", naive, None, unit="s"),
        ]
    return report("sampling", rows)


if __name__ == "__main__":
    sys.exit(main())
