"""Stage `train@<run>`: train one entry of `params.yaml: runs` as a Ray Train job.

    python -m pipelines.train RUN [--set recipe.steps=500] [--overfit-batches N]

Outs: `models/<run>/` (the finished run; further seeds under `seeds/`) and `plots/<run>/` (curves).
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgm_core import runs
from dgm_core.config import Recipe
from dgm_core.contract import DataSpec, GenerativeModel
from dgm_core.data.shards import open_dataset
from dgm_core.training import history
from dgm_core.training.optimisers import named_players
from pipelines import state
from pipelines.cluster import run_job
from pipelines.command import JobFailed, run_main
from pipelines.connect import connected, refuse_early
from pipelines.mirror import bring
from pipelines.params import Params, Run, load_params, resolve
from pipelines.place import Place
from pipelines.progress import Progress
from pipelines.serving import log_model
from pipelines.tracking import Tracker
from pipelines.training_job import job


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
