"""Stage `train@<run>`: train one entry of `params.yaml: runs` as a Ray Train job.

    python -m pipelines.train RUN [--set recipe.steps=500] [--overfit-batches N]

Outs: `models/<run>/` (the finished run; further seeds under `seeds/`) and `plots/<run>/` (curves).
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgm_core import distributed, runs
from dgm_core.config import Recipe
from dgm_core.contract import Batch, DataSpec, GenerativeModel
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
from dgm_core.training.optimisers import named_players
from dgm_core.training.trainer import Schedule, Trainer
from pipelines import state
from pipelines.cluster import Worker, connected, run_job
from pipelines.connect import refuse_early
from pipelines.mirror import Mirror, bring
from pipelines.node_metrics import node_metrics
from pipelines.params import Interrupted, JobFailed, Params, Run, load_params, resolve, run_main
from pipelines.place import Place
from pipelines.progress import Progress
from pipelines.serving import log_model
from pipelines.state import wait_for_lock
from pipelines.tracking import Tracker


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
        reporter.images[trainer.step] = sample_grid(averaged, dataset)
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
    distributed.barrier()


class _Undrawn(TorchFunctionMode):
    """Leaves weights as they were allocated: pages that nothing writes to cost neither time nor memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def check(model_class: type[GenerativeModel], config: Any, recipe: Recipe, spec: DataSpec) -> int:
    """Build the model, so that what is wrong with it is said before anything starts; its size.

    Not on `meta`, and without optimisers: both make torch import its compiler, seconds of every stage's start.
    """
    with _Undrawn():
        model = model_class(config, spec)
    named_players(model, recipe)
    return sum(p.numel() for p in model.parameters())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.train", description="Train one run of params.yaml.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run")
    parser.add_argument("--overfit-batches", type=int, metavar="N", help="train on the first N batches only; no outs")
    given = parser.parse_args(argv)
    params = load_params(overrides=[f"runs.{given.run}.{item}" for item in given.set])
    run = params.run(given.run)
    refuse_early(params.cluster)
    data, place = Path("data") / run.data, Place.of(params.cluster)
    dataset = open_dataset(data)
    model_class, config, recipe = resolve(given.run, run, dataset.spec)
    size = check(model_class, config, recipe, dataset.spec)
    key = state.fingerprint(
        run=run.model_dump(), config=config.model_dump(), recipe=recipe.model_dump(),
        data=state.folder_checksum(data), code=state.code_hash(run.family), overfit=given.overfit_batches,
    )  # fmt: skip
    jobs = [
        {
            "model": run.model,
            "config": config.model_dump(mode="json"),
            "recipe": recipe.model_dump(mode="json"),
            "place": place,
            "data": place.send(data),
            "seed": seed,
            "init_from": place.send(Path("models", run.init_from)) if run.init_from else None,
            "report_seconds": params.cluster.report_seconds,
            "schedule": vars(params.cluster.schedule),
            "overfit_batches": given.overfit_batches,
            "validate": not given.overfit_batches,
        }
        for seed in range(run.seed, run.seed + run.seeds)
    ]
    with state.in_progress(params.cluster, f"train-{given.run}", key) as folder:
        if given.overfit_batches:
            return _overfit(given.run, params, jobs[0], folder)
        _train(given.run, run, params, jobs, folder, size)
    return 0


def _train(name: str, run: Run, params: Params, jobs: Sequence[dict[str, Any]], folder: Path, size: int) -> None:
    tracker = Tracker(params.tracking, name, params.cluster.local)
    with tracker.running(None, memo=folder / "mlflow.json", stage="train", model=run.model, data=run.data):
        tracker.log_config({"run": run.model_dump(), "config": jobs[0]["config"], "recipe": jobs[0]["recipe"],
                            "parameters": size, "workers": params.cluster.workers})  # fmt: skip
        with connected(params.cluster):
            for job_config in jobs:
                _one_seed(name, job_config, params, tracker, folder)
        with runs.replaced_folder(Path("models") / name) as out:
            for i, job_config in enumerate(jobs):
                target = out if i == 0 else out / "seeds" / str(job_config["seed"])
                shutil.copytree(_seed_folder(folder, job_config) / "result", target, dirs_exist_ok=True)
        _write_curves(history.read(_seed_folder(folder, jobs[0]) / "history.jsonl"), name, jobs[0]["recipe"]["monitor"])
        if params.tracking.log_model:
            log_model(tracker, Path("models") / name)


def _one_seed(name: str, config: dict[str, Any], params: Params, tracker: Tracker, folder: Path) -> None:
    own, place = _seed_folder(folder, config), config["place"]
    own.mkdir(exist_ok=True)
    if (own / "result").exists():
        return
    at = str(own) if place.storage is None else f"state/{folder.name}/{own.name}"
    metrics = (tracker.uri, tracker.run_id) if params.tracking.system_metrics else None
    config = {**config, "folder": at, "system_metrics": metrics}
    first = config["seed"] == params.runs[name].seed
    writer = tracker.writer("" if first else f"seed{config['seed']}/")
    label = name if params.runs[name].seeds == 1 else f"{name} seed {config['seed']}"
    with Progress(own / "history.jsonl", config["recipe"]["steps"], label):
        if place.storage is None or not bring(place.storage, at, own):  # it may have ended without its driver
            run_job(job, config, params.cluster, name=f"{folder.name}-{own.name}", on_report=writer)
    if place.storage is not None and not bring(place.storage, at, own):
        raise JobFailed(f"the job ended, but {at} in {params.cluster.storage} holds no finished run")


def _seed_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    return folder / f"seed{config['seed']}"


def _overfit(name: str, params: Params, config: dict[str, Any], folder: Path) -> int:
    """Train on few examples, in this process, and say how the loss went: a model that cannot learn these by heart has
    a bug."""
    own = folder / "overfit"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    here = params.cluster.model_copy(update={"workers": 0})
    data = str(Path("data", params.runs[name].data).resolve())
    with Progress(own / "history.jsonl", config["recipe"]["steps"], name):
        settings = {**config, "place": Place(None), "data": data, "folder": str(own)}
        run_job(job, settings, here, name=f"{folder.name}-overfit", on_report=_ignore)
    rows = history.read(own / "history.jsonl")
    for key in sorted(k for k in rows[0] if k.endswith("/loss")):
        sys.stdout.write(f"{key}: {rows[0][key]:.4g} → {rows[-1][key]:.4g} in {int(rows[-1]['step'])} rounds\n")
    return 0


def _ignore(_: Mapping[str, Any]) -> None:
    """An over-fitting trial is not tracked."""


def _write_curves(rows: Sequence[Mapping[str, float]], name: str, monitor: Sequence[str] | None) -> None:
    """`curves.csv` with everything, and two narrow files for `dvc plots`: `loss.csv` and `validation.csv`."""
    names = sorted({key for row in rows for key in row} - {"step"})
    losses = [key for key in names if key.endswith("/loss")]
    watched = monitor[0] if monitor else next((key for key in names if key.startswith("val/")), None)
    with runs.replaced_folder(Path("plots") / name) as out:
        _write_csv(out / "curves.csv", rows, {key: key for key in names})
        _write_csv(out / "loss.csv", rows, {losses[0]: "loss"} if losses else {})
        _write_csv(out / "validation.csv", [r for r in rows if watched in r], {watched: "value"} if watched else {})


def _write_csv(path: Path, rows: Sequence[Mapping[str, float]], columns: Mapping[str, str]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns.values()])
        for row in rows:
            writer.writerow([int(row["step"]), *(row.get(key, "") for key in columns)])


if __name__ == "__main__":
    from pipelines.train import main as stage  # by its own name, so that workers can import what they are sent

    run_main(stage)
