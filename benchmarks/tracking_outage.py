"""A tracking server that dies in mid-run: what training notices of it, and what MLflow holds afterwards.

    python -m benchmarks.tracking_outage [--seconds 60]

The stage `train@vae` runs as its command under Ray, on one CPU, and logs to `mlflow server` on PostgreSQL with its
artefacts in an S3 store. The server is killed (SIGKILL) for so many seconds. Rates are taken during the outage, and in
as long a time before it and after it, without the seconds in which the server starts. They are rounds a second, divided
by what a process that only multiplies matrices does in the same seconds: whatever else the machine has to do falls on
both alike.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from benchmarks.harness import ROOT, Row, report
from dgm_core.training import history
from tests.servers import Mlflow, mlflow_server, object_store, postgres

WARM_UP = 10.0  # seconds of training that count for nothing
SETTLED = 5.0  # the same, after the server is back


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracking_outage")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the server is away")
    seconds = parser.parse_args().seconds
    with (
        tempfile.TemporaryDirectory(prefix="dgm-outage-") as name,
        postgres() as database,
        object_store() as store,
        mlflow_server(database.uri, f"s3://{store.bucket}", store.env) as server,
    ):
        os.chdir(name)
        os.environ["MLFLOW_TRACKING_URI"] = server.uri
        rows = _measure(Path(name), server, seconds)
        os.chdir(ROOT)
    return report("tracking_outage", rows)


def _measure(folder: Path, server: Mlflow, seconds: float) -> list[Row]:
    rate = _calibrate(folder)
    write_params(folder, steps=round(rate * (4.5 * seconds + 100)))
    with _stage("pipelines.train", "vae") as stage:
        while rounds(folder) == 0:
            _alive(stage)
        with yardstick() as count:
            time.sleep(WARM_UP)
            before = _rates(folder, stage, count, seconds)
            server.kill()
            during = _rates(folder, stage, count, seconds)
            server.restart()
            time.sleep(SETTLED)
            after = _rates(folder, stage, count, seconds)
        _finish(stage)
    for when, (trained, multiplied) in (("before", before), ("during", during), ("after", after)):
        print(f"  {when}: {trained:.1f} rounds a second, yardstick {multiplied:.1f}")
    relative = [trained / multiplied for trained, multiplied in (before, during, after)]
    logged, trained, run = _steps(server.uri, folder)
    return [
        Row(f"rounds per second while the server is away for {seconds:g} s, over those before and after",
            2 * relative[1] / (relative[0] + relative[2]), 0.9),
        Row("rounds per second while the server is away", during[0], None, unit="/s"),
        Row("logged rounds that are missing afterwards", len(set(trained) - set(logged)), 0, at_least=False, unit=""),
        Row("logged rounds that are there twice", len(logged) - len(set(logged)), 0, at_least=False, unit=""),
        Row("rounds logged", len(trained), None, unit=""),
        Row("runs that are not FINISHED", int(run.info.status != "FINISHED"), 0, at_least=False, unit=""),
    ]  # fmt: skip


def write_params(folder: Path, steps: int) -> None:
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    vae: dict[str, Any] = params["runs"]["vae"]
    vae["recipe"] = {"steps": steps, "evaluate_every": max(1, steps // 20)}
    shown = {"datasets": params["datasets"], "runs": {"vae": vae}, "tracking": {"log_model": True}}
    shown["cluster"] = {"workers": 1, "cpus_per_worker": 1, "report_seconds": 2}
    yaml.dump(shown, folder / "params.yaml")


def _calibrate(folder: Path) -> float:
    """Rounds a second of this machine; the data is prepared on the way."""
    write_params(folder, steps=2000)
    for command in (("pipelines.prepare", "digits_binary"), ("pipelines.train", "vae")):
        with _stage(*command) as stage:
            _finish(stage)
    rows = _curves(folder)
    return (float(rows[-1]["step"]) - float(rows[0]["step"])) / (
        float(rows[-1]["train/seconds"]) - float(rows[0]["train/seconds"])
    )


@contextmanager
def _stage(*command: str) -> Iterator[subprocess.Popen[str]]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",  # no worker gives way to the yardstick, or to whatever else runs
    }  # fmt: skip
    stage = subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield stage
    finally:
        if stage.poll() is None:
            stage.terminate()  # it unwinds, and takes its Ray cluster with it
            stage.wait()


def _finish(stage: subprocess.Popen[str]) -> None:
    output, _ = stage.communicate(timeout=3600)
    if stage.returncode != 0:
        raise RuntimeError(output)


def _alive(stage: subprocess.Popen[str]) -> None:
    if stage.poll() is not None:
        raise RuntimeError(f"the stage ended too early: {stage.communicate()[0]}")
    time.sleep(0.2)


def rounds(folder: Path) -> int:
    """Up to which round the history on the disk goes."""
    files = sorted((folder / ".dgm").glob("**/history.jsonl"), key=lambda p: p.stat().st_mtime)
    rows = history.read(files[-1]) if files else []
    return int(rows[-1]["step"]) if rows else 0


def _rates(folder: Path, stage: subprocess.Popen[str], count: Any, seconds: float) -> tuple[float, float]:
    """Rounds, and matrices of the yardstick, a second."""
    start, first, multiplied = time.monotonic(), rounds(folder), count.value
    while time.monotonic() - start < seconds:
        _alive(stage)
    passed = time.monotonic() - start
    return (rounds(folder) - first) / passed, (count.value - multiplied) / passed


@contextmanager
def yardstick() -> Iterator[Any]:
    """A count that a process of its own raises as fast as one CPU lets it."""
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0, lock=False)
    process = context.Process(target=_multiply, args=(count,), daemon=True)
    process.start()
    try:
        yield count
    finally:
        process.kill()
        process.join()


def _multiply(count: Any) -> None:
    torch.set_num_threads(1)
    x = torch.eye(256)
    while True:
        x = x @ x
        count.value += 1


def _curves(folder: Path) -> list[Mapping[str, str]]:
    with open(folder / "plots/vae/curves.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["train/seconds"]]


def _steps(uri: str, folder: Path) -> tuple[list[int], list[int], Any]:
    """Of the last run: the rounds that MLflow holds, and those that were trained."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(json.loads((folder / ".dgm/tracking/vae.json").read_text())["run_id"])
    logged = [m.step for m in client.get_metric_history(run.info.run_id, "round")]
    return logged, [int(row["step"]) for row in _curves(folder)], run


if __name__ == "__main__":
    raise SystemExit(main())
