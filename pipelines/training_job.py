"""The training job, as each worker of it runs: build, train or go on, leave a finished run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dgm_core import distributed, runs
from dgm_core.config import Recipe
from dgm_core.contract import Batch, GenerativeModel
from dgm_core.data.batches import Stream, one_pass
from dgm_core.data.display import display_of, how_to_show
from dgm_core.data.shards import Dataset, open_dataset
from dgm_core.evaluation import drawing, figures
from dgm_core.evaluation.examples import quiet, take
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.sampling import draw
from dgm_core.evaluation.validation import validate
from dgm_core.models import CATALOG
from dgm_core.training import checkpoint, history
from dgm_core.training.trainer import Schedule, Trainer
from pipelines import snapshots
from pipelines.command import Interrupted
from pipelines.mirror import Mirror
from pipelines.node_metrics import node_metrics
from pipelines.place import Place
from pipelines.state import wait_for_lock
from pipelines.worker import Worker


class Training:
    """The trainer's view of a data set's training split; `first` examples only, over and over, to over-fit them."""

    def __init__(self, dataset: Dataset, recipe: Recipe, seed: int, first: int | None = None) -> None:
        self.split = dataset.split("train")
        self.stream = Stream(self.split, seed=seed, augment=recipe.augment)
        self.first = first

    def at(self, position: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        return self.stream.at(position % self.first if self.first else position, size, rank=rank, world=world)

    def one_pass(self, size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        return one_pass(self.split, size, rank=rank, world=world)


class Reporter:
    """Gathers rows of history and sample grids, and reports them from every rank at once, not too often."""

    def __init__(self, worker: Worker, seconds: float) -> None:
        self.worker, self.seconds = worker, seconds
        self.rows: list[str] = []
        self.images: dict[int, bytes] = {}
        self.reported_at = time.monotonic()
        self.notice = self.warned = False

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        self.rows.append(json.dumps({"step": step, **numbers}))
        if distributed.any_true(time.monotonic() - self.reported_at > self.seconds, self.worker.device):
            self.flush()
            self.notice = self.worker.preempted() and not self.warned
            self.warned = self.warned or self.notice

    def preempted(self) -> bool:
        """Once, after a notice that a node will be taken away."""
        notice, self.notice = self.notice, False
        return notice

    def flush(self) -> None:
        self.worker.report({"rows": self.rows, "images": self.images})
        self.rows, self.images, self.reported_at = [], {}, time.monotonic()


def job(config: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """What every worker runs: build, train or go on, and leave the finished run in `folder/result`."""
    place: Place = config["place"]
    with ExitStack() as held:
        dataset = open_dataset(held.enter_context(place.opened(config["data"])))
        model_class = CATALOG[config["model"]]
        torch.manual_seed(config["seed"])  # the same start on every rank
        model = model_class(model_class.Config.model_validate(config["config"]), dataset.spec)
        if config["init_from"]:
            start = runs.load(held.enter_context(place.opened(config["init_from"])))
            checkpoint.load_model_state(model, checkpoint.model_state(start))
        if worker.leads_node and config.get("system_metrics"):
            held.enter_context(node_metrics(*config["system_metrics"]))
        mirror = place.mirror(config["folder"])
        folder = Path(config["folder"]) if mirror is None else mirror.folder
        if distributed.rank() == 0:
            held.enter_context(wait_for_lock(folder / "worker.lock", 60))
        if mirror is not None:
            mirror.pull()
        # Searches compare what samples by their distance from the data; a stage of its own leaves that to `evaluate`.
        judge = Judge.load(held.enter_context(place.opened(config["judge"]))) if config.get("judge") else None
        outcome = _fit(config, worker, model, dataset, judge, folder, mirror)
        if mirror is not None:
            if distributed.rank() == 0:
                mirror.deliver(folder / "result")
            distributed.barrier()
            shutil.rmtree(folder, ignore_errors=True)  # this node's copy has served
    return outcome


def _fit(
    config: Mapping[str, Any],
    worker: Worker,
    model: GenerativeModel,
    dataset: Dataset,
    judge: Judge | None,
    folder: Path,
    mirror: Mirror | None,
) -> dict[str, Any]:
    recipe = Recipe.model_validate(config["recipe"])
    reporter = Reporter(worker, config["report_seconds"])
    for row in history.read(folder / "history.jsonl"):  # a kill may have come before they were reported
        reporter.rows.append(json.dumps(row))

    def evaluate(averaged: GenerativeModel) -> Mapping[str, float]:
        reporter.images[trainer.step] = picture = sample_grid(averaged, dataset)
        snapshots.keep(folder, trainer.step, picture)
        return validate(averaged, one_pass(dataset.split("val"), 250), dataset.spec, dataset.info, judge=judge)

    first = config["overfit_batches"] * recipe.batch_size_at(0.0) if config["overfit_batches"] else None
    trainer = Trainer(
        model,
        recipe,
        Training(dataset, recipe, config["seed"], first),
        seed=config["seed"],
        device=worker.device,
        folder=folder,
        schedule=Schedule(**config["schedule"]),
        evaluate=evaluate if config["validate"] else None,
        on_log=reporter.row,
        on_save=mirror.push if mirror is not None else _kept_where_it_is,
        hurry=reporter.preempted,
        stop=Asked(worker),
    )
    if config["init_from"]:  # k-means, data-dependent starts and closed forms would undo the weights
        trainer.entered = [turn.name for turn in trainer.turns]
    outcome = trainer.fit()
    reporter.flush()
    if outcome.stopped == "interrupted":
        if mirror is not None and distributed.rank() == 0:
            mirror.settle()
        raise Interrupted(f"stopped after round {outcome.step}, as asked; start the stage again to go on from there")
    _export(trainer, model, config, folder, dataset)
    return {"step": outcome.step, "stopped": outcome.stopped}


def _kept_where_it_is(_: Path) -> None:
    """The job's folder is on a disk that the driver sees."""


class Asked:
    """Whether the stage was asked to stop; looks at most once in `seconds`, and on rank 0 only."""

    def __init__(self, worker: Worker, seconds: float = 1.0) -> None:
        self.worker, self.seconds = worker, seconds
        self.looked_at, self.answer = 0.0, False

    def __call__(self) -> bool:
        now = time.monotonic()
        if distributed.rank() == 0 and not self.answer and now - self.looked_at > self.seconds:
            self.looked_at, self.answer = now, self.worker.asked_to_stop()
        return self.answer


def sample_grid(model: GenerativeModel, dataset: Dataset, n: int = 36) -> bytes:
    """A PNG of samples, always for the same noise."""
    examples = take(one_pass(dataset.split("val"), 250), n)
    with quiet(model, seed=0):
        x = draw(model, n, examples, {}, n).x
        if dataset.spec.kind == "vector":
            found = figures.plane(model, examples.x, x, dataset.spec)
            assert found is not None
            return found[0]
        return drawing.grid(drawing.pictures(x, dataset.spec, display_of(dataset.info)), 6)


def _export(
    trainer: Trainer, model: GenerativeModel, config: Mapping[str, Any], folder: Path, dataset: Dataset
) -> None:
    """The weights that will sample: the best by the monitor, else the last; averaged, calibrated."""
    best = folder / "best.pt"
    with trainer.averaged() as averaged:
        last = {k: v.clone() for k, v in checkpoint.model_state(averaged).items()}
        chosen = checkpoint.load(best, trainer.device)["model"] if best.exists() else last
        checkpoint.load_model_state(averaged, chosen)
        averaged.calibrate(
            b.to(trainer.device)
            for b in one_pass(
                dataset.split("train"),
                trainer.recipe.batch_size_at(0.0),
                rank=distributed.rank(),
                world=distributed.world_size(),
            )
        )
        chosen = checkpoint.model_state(averaged)
        if distributed.rank() == 0:
            metrics = {k: v for k, v in trainer.metrics.items() if k.startswith("val/")}
            with runs.replaced_folder(folder / "result") as out:
                runs.save_run(out, config["model"], model, trainer.recipe, chosen, metrics)
                runs.write_json(out / "data.json", how_to_show(dataset.info))
                if (film := snapshots.film_of(folder)) is not None:
                    (out / snapshots.FILM).write_bytes(film)
    distributed.barrier()
