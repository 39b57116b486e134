"""Cached sampling beside the naive loop of the same model: `python -m benchmarks.sampling`.

Both draw 16 grids of 32×32 from 10 layers in single precision. The naive loop runs the whole network for every
coordinate; as each of its 1,024 passes costs the same, it is timed on `PASSES` of them, spread evenly over the grid,
and scaled. That both draw the same tokens is checked at those coordinates in double precision, where rounding does not
decide a draw.
"""

from __future__ import annotations

import statistics
import sys

import torch
from torch import Tensor

from benchmarks.harness import Row, interleave, report
from dgm_core.contract import DataSpec
from dgm_core.models.autoregressive.base import RasterModel
from dgm_core.models.autoregressive.gated_pixel_cnn import GatedPixelCNN
from dgm_core.models.autoregressive.pixel_snail import PixelSnail
from dgm_core.nn.incremental import draw_categorical

BATCH, SIDE, PASSES = 16, 32, 4
GOAL = 10.0


def models() -> dict[str, RasterModel]:
    """Ten layers each, at a width that one naive pass takes about a second on two cores."""
    image = DataSpec("image", (1, SIDE, SIDE), 256)
    codes = DataSpec("codes", (SIDE, SIDE), 512)
    gated = GatedPixelCNN.Config(channels=64, depth=10, kernel=3, head=64)
    snail = PixelSnail.Config(channels=64, hidden=64, blocks=2, depth=5, kernel=3, heads=4, output_depth=2)
    return {"gated_pixel_cnn": GatedPixelCNN(gated, image).eval(), "pixel_snail": PixelSnail(snail, codes).eval()}


@torch.no_grad()
def naive_draws(model: RasterModel, canvas: Tensor, noise: Tensor) -> list[Tensor]:
    """What the naive loop draws at `PASSES` coordinates, given all that precedes each of them."""
    drawn = []
    for position in range(SIDE * SIDE // PASSES - 1, SIDE * SIDE, SIDE * SIDE // PASSES):
        r, c = divmod(position, SIDE)
        seen = canvas.clone()
        seen.flatten(1)[:, position:] = 0
        drawn.append(draw_categorical(model.network(seen, None)[:, 0, r, c], noise[:, 0, r, c]))
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
    setting = f"batch {BATCH}, {SIDE}×{SIDE}, 10 layers, float32"
    for name, model in models().items():
        same = agreement(model)
        canvas = torch.randint(model.data.levels or 0, (BATCH, 1, SIDE, SIDE))
        noise = torch.rand(canvas.shape)
        scale = SIDE * SIDE / PASSES
        pairs = interleave(lambda m=model: m.sample(BATCH), lambda m=model, x=canvas, u=noise: naive_draws(m, x, u))
        naive = scale * statistics.median(pairs.peer)
        rows += [
            Row(f"{name}: cached over naive ({setting})", scale * pairs.ratio, GOAL),
            Row(f"{name}: tokens equal to the naive loop's (float64)", 100 * same, 100.0, unit="%"),
            Row(f"{name}: seconds, cached, whole grid", statistics.median(pairs.ours), None, unit="s"),
            Row(f"{name}: seconds, naive, {PASSES} of {SIDE * SIDE} passes, scaled", naive, None, unit="s"),
        ]
    return report("sampling", rows)


if __name__ == "__main__":
    sys.exit(main())
