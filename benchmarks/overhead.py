"""The cost of the stack: training inside Ray Train and MLflow against the bare trainer, and a stage's start-up.

    python -m benchmarks.overhead

Steady state: the default graph's VQ-VAE-2, same data, seed, rounds and CPUs, in one session of a local Ray cluster.
The bare run is `Trainer.fit` in a process of its own, the other the stage's job inside a worker of Ray Train that
reports its rows to MLflow; both by the wall clock from round 500 on. Start-up: from a process's start to its job's
first line, beyond importing the libraries.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import fit
from benchmarks.harness import ROOT, Row, report
from dgm_core.training import history
from pipelines.cluster import run_job
from pipelines.connect import connected
from pipelines.params import Cluster, Tracking, load_params
from pipelines.parts import call
from pipelines.place import Place
from pipelines.tracking import Tracker
from pipelines.training_job import job

PAIRS = 11
ROUNDS = 1500
WARM_UP = 500


def bare(config: Mapping[str, Any]) -> None:
    """Train with no Ray Train, no reports and no MLflow, on a worker's CPUs."""
    import torch

    from dgm_core.config import Recipe
    from dgm_core.data.shards import open_dataset
    from dgm_core.models import CATALOG
    from dgm_core.training.trainer import Schedule, Trainer
    from pipelines.training_job import Training

    data = open_dataset(config["data"])
    recipe = Recipe.model_validate(config["recipe"])
    model_class = CATALOG[config["model"]]
    torch.manual_seed(0)
    model = model_class(model_class.Config.model_validate(config["config"]), data.spec)
    Trainer(
        model, recipe, Training(data, recipe, 0), folder=Path(config["folder"]), schedule=Schedule(**config["schedule"])
    ).fit()


def main() -> int:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    params = load_params(ROOT / "params.yaml")
    run = params.runs["vqvae"]
    with tempfile.TemporaryDirectory(prefix="dgm-overhead-") as name:
        folder = Path(name)
        os.chdir(folder)
        data = fit.dataset(folder, "digits", source="digits", size=16)
        from pipelines.params import resolve

        _, config, recipe = resolve("vqvae", run, data.spec)
        recipe = recipe.merged({"steps": ROUNDS, "evaluate_every": None, "monitor": None})
        base = {
            "model": run.model, "config": config.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json"),
            "data": str(data.path), "place": Place(None), "seed": 0, "init_from": None,
             "report_seconds": params.cluster.report_seconds,
            "schedule": vars(params.cluster.schedule), "overfit_batches": None, "validate": False,
        }  # fmt: skip
        cluster = Cluster(storage=str(folder / "state"))
        tracker = Tracker(Tracking(system_metrics=False, log_model=False), "overhead", folder / "state")
        ratios = []
        with connected(cluster), tracker.running(None):
            for pair in range(PAIRS + 1):  # the first is a warm-up
                rate = {}
                for kind in ("bare", "stack") if pair % 2 else ("stack", "bare"):
                    own = folder / f"{kind}{pair}"
                    own.mkdir()
                    given = {**base, "folder": str(own)}
                    if kind == "bare":
                        call(bare, given, cluster=cluster)
                    else:
                        writer = tracker.writer(f"pair{pair}/")
                        run_job(job, given, cluster, name=own.name, on_report=writer)
                    rate[kind] = steady(own)
                if pair:
                    ratios.append(rate["stack"] / rate["bare"])
        ratios.sort()
        rows = [Row(f"rounds per second, in the stack over bare (median of {PAIRS} pairs)", ratios[PAIRS // 2], 0.95)]
        rows += [Row(f"the same, the {which} pair", ratios[i], None) for which, i in (("lowest", 0), ("highest", -1))]
        rows += _start_up(folder)
    return report("overhead", rows)


def steady(folder: Path) -> float:
    """Rounds per second by the wall clock from the warm-up to the last log: reports and checkpoints are in it."""
    rows = history.read(folder / "history.jsonl")
    first, last = next(row for row in rows if row["step"] >= WARM_UP), rows[-1]
    return (last["step"] - first["step"]) / (last["train/seconds"] - first["train/seconds"])


def _start_up(folder: Path) -> list[Row]:
    """Seconds from a process's start to its job's first line, beyond imports: a cluster of its own, and joining one."""
    from pipelines.repro import ray_head

    imports = _seconds("import time, torch, ray, ray.train.torch, mlflow, pipelines.train; print(time.time())", {})
    one = "import mlflow, pipelines.train; from benchmarks.start_up import one_job; one_job()"
    alone = _seconds(one, {"RAY_AUTH_MODE": "disabled"})
    with ray_head() as address:
        joining = _seconds(one, {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"})
    return [
        Row("imports of a training stage", imports, None, False, "s"),
        Row("a stage's start beyond them, with a cluster of its own", alone - imports, 10, False, "s"),
        Row("a stage's start beyond them, joining a cluster", joining - imports, 5, False, "s"),
    ]


def _seconds(code: str, environment: Mapping[str, str]) -> float:
    """From the start of a fresh interpreter to the time that it prints last; median of three."""
    times = []
    for _ in range(3):
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        times.append(float(done.stdout.split()[-1]) - started)
    return sorted(times)[1]


if __name__ == "__main__":
    from benchmarks.overhead import main as benchmark  # by its own name, so that workers can import what they are sent

    raise SystemExit(benchmark())
