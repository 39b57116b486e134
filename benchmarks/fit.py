"""Train a model of the catalogue for a quality row: the trainer that the pipeline runs, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dgm_core.config import Recipe
from dgm_core.contract import Batch, GenerativeModel
from dgm_core.data.batches import one_pass
from dgm_core.data.prepare import prepare
from dgm_core.data.shards import Dataset
from dgm_core.data.sources import parse
from dgm_core.models import CATALOG
from dgm_core.training import checkpoint
from dgm_core.training.trainer import Trainer
from pipelines.training_job import Training


def dataset(workdir: Path, name: str, **source: Any) -> Dataset:
    """Prepare `source` (as under `datasets:` in params.yaml) in `workdir`."""
    return prepare(parse(source), workdir / name, name=name)


def train(
    name: str,
    data: Dataset,
    *,
    config: Mapping[str, Any] = {},
    recipe: Mapping[str, Any] = {},
    seed: int = 0,
    evaluate: Callable[[GenerativeModel], Mapping[str, float]] | None = None,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
) -> GenerativeModel:
    """The paper's defaults but for what is given; the averaged weights where the recipe keeps an average."""
    model_class = CATALOG[name]
    defaults, steps = model_class.defaults(data.spec)
    steps = steps.merged(recipe)
    torch.manual_seed(seed)
    model = model_class(defaults.merged(config), data.spec)
    trainer = Trainer(
        model,
        steps,
        Training(data, steps, seed),
        seed=seed,
        device=device,
        evaluate=evaluate,
        folder=folder,
        on_log=_say(steps),
    )
    trainer.fit()
    with trainer.averaged() as averaged:
        state = {key: value.clone() for key, value in checkpoint.model_state(averaged).items()}
    checkpoint.load_model_state(model, state)
    model.calibrate(one_pass(data.split("train"), steps.batch_size_at(0.0)))
    return model.eval()


def held_out(data: Dataset, size: int = 1000) -> Iterator[Batch]:
    """The test split once, in order."""
    return one_pass(data.split("test"), size)


def _say(recipe: Recipe, seconds: float = 30) -> Callable[[int, Mapping[str, float]], None]:
    """A line now and then: where training stands, and its losses."""
    started = said = time.monotonic()

    def line(step: int, numbers: Mapping[str, float]) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < seconds and step < recipe.steps:
            return
        said = now
        watched = ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if k.endswith("/loss") or k.startswith("val/"))
        left = (now - started) * (recipe.steps - step) / step
        print(f"  round {step} of {recipe.steps}, {left:.0f} s to go: {watched}", flush=True)

    return line
