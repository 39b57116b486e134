"""What one core takes: a large product, a round of each model at its paper's size, reading an example, validating."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.scale.account import Account, Recorder
from benchmarks.scale.settings import Examples, Setting
from dgm_core.capabilities import HasCodes, HasEnergy, HasLikelihood, HasPosterior
from dgm_core.config import Recipe
from dgm_core.contract import Batch, Clock, DataSpec, GenerativeModel
from dgm_core.data.batches import Stream, one_pass
from dgm_core.data.shards import Dataset, write_dataset
from dgm_core.models.autoregressive.base import RasterModel
from dgm_core.training.trainer import Trainer, TrainingData

ROUNDS = 4  # the first is not counted
BUDGET = 1.0  # seconds that a round may be expected to take
TOO_SLOW = 8.0  # seconds that a round of the fewest examples may be expected to take at most
VALIDATED, BATCH, GRID = (
    1000,
    250,
    36,
)  # examples that rank 0 scores, in batches, and pictures that it draws: `pipelines.train`


class Timed:
    """A data source that notes when each play asks for its batch: the trainer runs as it is."""

    def __init__(self, data: TrainingData, clock: Any = time.perf_counter) -> None:
        self.data, self.clock = data, clock
        self.asked: list[float] = []

    def at(self, position: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        self.asked.append(self.clock())
        return self.data.at(position, size, rank=rank, world=world)

    def one_pass(self, size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        return self.data.one_pass(size, rank=rank, world=world)

    def rounds(self, plays: int, skip: int = 1) -> list[float]:
        """Seconds of each whole round after the first `skip`."""
        starts = self.asked[skip * plays :: plays]
        return [after - before for before, after in itertools.pairwise(starts)]


class Stored:
    """The trainer's view of a prepared data set's training split."""

    def __init__(self, dataset: Dataset, recipe: Recipe, seed: int = 0) -> None:
        self.split = dataset.split("train")
        self.stream = Stream(self.split, seed=seed, augment=recipe.augment)

    def at(self, position: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        return self.stream.at(position, size, rank=rank, world=world)

    def one_pass(self, size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        return one_pass(self.split, size, rank=rank, world=world)


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of one core in float32."""
    a = torch.randn(size, size)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        torch.mm(a, a)
        times.append(time.process_time() - start)
    return 2 * size**3 / statistics.median(times)


def step(setting: Setting, a: Account, matmul: float) -> dict[str, Any]:
    """A round's seconds of processor time, which others on the machine do not lengthen; or why it was not run."""
    expected = a.flops(1) / (0.5 * matmul)
    if 2 * expected > TOO_SLOW:
        return {"skipped": f"a round of two examples would take about {2 * expected:.0f} s"}
    batch = int(max(2, min(a.batch, BUDGET / expected)))
    recipe = setting.defaults()[1]
    torch.manual_seed(0)
    model = setting.build()
    source = Timed(Examples(setting.spec, 2 * batch), time.process_time)
    trainer = Trainer(model, recipe.merged({"steps": ROUNDS, "batch_size": batch}), source)
    if a.gradient_bytes():
        trainer.entered = [turn.name for turn in trainer.turns]  # starts from data are no part of a round
    trainer.fit()
    plays = round(sum(a.plays.values()))
    seconds = statistics.median(source.rounds(plays))
    return {"batch": batch, "seconds": seconds, "flops_per_second": a.flops(batch) / seconds}


def read_seconds(spec: DataSpec, n: int = 128, repeats: int = 5) -> float:
    """Processor time to take one example, of a random order, from a prepared data set in the page cache."""
    whole = Examples(spec, n).whole._replace(index=None)
    with tempfile.TemporaryDirectory(prefix="dgm-scaling-") as folder:
        splits = {"train": [whole], "val": [whole.rows(slice(0, 1))], "test": [whole.rows(slice(0, 1))]}
        stream = Stream(write_dataset(Path(folder) / "data", spec, splits, {}).split("train"), seed=0)
        times = []
        for i in range(repeats):
            start = time.process_time()
            batch = stream.at(i * n, n)
            times.append(time.process_time() - start)
            assert len(batch.x) == n
        return statistics.median(times) / n


def validation(setting: Setting) -> dict[str, float]:
    """Kernels and operations of what rank 0 does while the others wait: scoring, and drawing the grid of samples.

    Scoring counts one pass of the loss over each example, where anything is scored at all; annealed importance
    sampling and bounds of many samples come on top.
    """
    with torch.device("meta"):
        model = setting.build().eval()
        batch = Examples(setting.spec, BATCH, "meta").whole
        score = Recorder()
        with torch.no_grad(), score:
            model.loss(batch, model.turns()[-1].name, Clock(0, 1))
        kernels, flops = _grid(setting, model)
    scored = VALIDATED if isinstance(model, HasLikelihood | HasPosterior | HasCodes | HasEnergy) else 0
    return {
        "score_kernels": scored / BATCH * score.kernels,
        "score_flops": scored / BATCH * score.flops,
        "draw_kernels": kernels,
        "draw_flops": flops,
    }


def _grid(setting: Setting, model: GenerativeModel) -> tuple[float, float]:
    """Kernels and operations of drawing the grid of samples; a raster model's grow with its coordinates."""
    if not isinstance(model, RasterModel):
        found = _drawn(model)
        return found.kernels, found.flops
    sizes = (2, 3)
    small, large = (_drawn(_resized(setting, side)) for side in sizes)
    area = [side * side * setting.spec.dims / math.prod(setting.spec.shape[-2:]) for side in sizes]
    more = setting.spec.dims - area[0]
    return (
        small.kernels + more * (large.kernels - small.kernels) / (area[1] - area[0]),
        small.flops + more * (large.flops - small.flops) / (area[1] - area[0]),
    )


def _resized(setting: Setting, side: int) -> GenerativeModel:
    spec = DataSpec(
        setting.spec.kind, (*setting.spec.shape[:-2], side, side), setting.spec.levels, setting.spec.classes
    )
    return type(setting.build())(setting.defaults()[0], spec).eval()


def _drawn(model: GenerativeModel) -> Recorder:
    found = Recorder()
    with torch.no_grad(), found:
        drawn: Tensor = model.sample(GRID)
    assert drawn.shape[0] == GRID
    return found
