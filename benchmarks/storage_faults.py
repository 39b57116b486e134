"""Nodes that leave and come back, with notice or without, and a storage that goes away, in mid-run.

    python -m benchmarks.storage_faults [--seconds 60]

Elastic: `train@vae` with `workers: [1, 2]` on two nodes of one CPU each; one node is killed, another one joins later.
Rounds and data position must be kept, and training must be further than before the kill soon. Preemption: a node says
that it will be taken away; a checkpoint must come before it is, and training go on from there on another. Storage: the
same run with one worker and its state in an S3 store, which is cut off for so many seconds in mid-run; training must
go on meanwhile, and no checkpoint be lost or half-read.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.faults import LIMIT, RUN, Soak, project
from benchmarks.harness import Row, report
from dgm_core.training import history
from pipelines.repro import BIN
from pipelines.storage import Storage
from tests.gate import gate
from tests.nodes import nodes
from tests.servers import object_store


def elastic(steps: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="dgm-elastic-") as name, nodes(Path(name) / "ray.log") as cluster:
        folder = Path(name)
        project(folder, steps, workers=[1, 2], resize_seconds=5, checkpoint_every=50)
        leaving = [cluster.add(cpus=1), cluster.add(cpus=1)][1]
        state = Soak(folder, cluster, steps, 0)
        stage = state.start()
        _until(lambda: _workers(state) == 2, "two workers", state)
        before, at = state.rounds(), time.monotonic()
        cluster.started.remove(leaving)
        leaving.kill()
        _until(lambda: _workers(state) == 1 and state.rounds() > before, "one worker went on", state)
        shrunk, behind = time.monotonic() - at, state.rounds()
        at = time.monotonic()
        cluster.add(cpus=1)
        joined = time.monotonic() - at
        _until(lambda: _workers(state) == 2 and state.rounds() > behind, "two workers again", state)
        grown = time.monotonic() - at - joined
        if stage.wait(LIMIT) != 0:
            raise RuntimeError((folder / "stage.log").read_text()[-3000:])
        problems = state.tracking_problems(runs=1)
        _say(problems)
    return [
        Row("a node is killed: until training is further than before, on the other", shrunk, 20, False, "s"),
        Row("a node joins: until two workers are further than one was (looked for every 5 s)", grown, None, False, "s"),
        Row("rounds missing, twice, or a run that is not FINISHED", len(problems), 0, False, ""),
    ]


def preemption(steps: int) -> list[Row]:
    """No checkpoint is due by rounds or time, so that the one that comes is the notice's."""
    with tempfile.TemporaryDirectory(prefix="dgm-preemption-") as name, nodes(Path(name) / "ray.log") as cluster:
        folder = Path(name)
        project(folder, steps, checkpoint_every=None, checkpoint_seconds=LIMIT, report_seconds=2)
        leaving = cluster.add(cpus=1)
        state = Soak(folder, cluster, steps, 0)
        stage, shared = state.start(), Storage(str(folder / "shared"))
        _until(lambda: any(_rounds(job) for job in (folder / "cache/jobs").glob("*")), "it trains", state)
        if _stored(shared):
            raise RuntimeError("a checkpoint came before the notice")
        node = cluster.ask("[n['NodeID'] for n in ray.nodes() if n['Resources'].get('CPU')][0]").strip("'")
        at = time.monotonic()
        subprocess.run(
            [str(BIN / "ray"), "drain-node", f"--address={cluster.address}", f"--node-id={node}",
             "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=120"],
            env=cluster.environment, check=True, capture_output=True,
        )  # fmt: skip
        _until(lambda: _stored(shared) > 0, "a checkpoint after the notice", state)
        noticed, kept = time.monotonic() - at, _stored(shared)
        cluster.started.remove(leaving)
        leaving.kill()
        cluster.add(cpus=1)
        _until(lambda: state.rounds() > kept, "another node goes on", state)
        if stage.wait(LIMIT) != 0:
            raise RuntimeError((folder / "stage.log").read_text()[-3000:])
        problems = state.tracking_problems(runs=1)
        _say(problems)
    return [
        Row("a node will be taken away: from the notice until a checkpoint is stored", noticed, None, False, "s"),
        Row("rounds missing, twice, or a run that is not FINISHED, after it was taken", len(problems), 0, False, ""),
    ]


def storage(seconds: float, steps: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="dgm-storage-") as name, object_store() as store:
        folder = Path(name)
        os.environ.update(store.env)
        with gate(int(store.env["AWS_ENDPOINT_URL"].rpartition(":")[2])) as door, nodes(folder / "ray.log") as cluster:
            options = f"endpoint_override=127.0.0.1:{door.port}&scheme=http&region=us-east-1"
            uri = f"s3://{store.bucket}/dgm?{options}"
            project(folder, steps, storage=uri, checkpoint_every=20, storage_patience_s=4 * seconds)
            cluster.add(cpus=1)
            state = Soak(folder, cluster, steps, 0)
            expected, _ = state.undisturbed()
            stage = state.start()
            state.runs += 1
            shared = Storage(uri, patience=5)
            _until(lambda: _stored(shared) > 0, "a first checkpoint is stored", state)
            local = next(iter((folder / "cache/jobs").glob("*")))
            time.sleep(random.Random(0).uniform(1, 3))
            first = _rounds(local)
            door.close()
            time.sleep(seconds)
            gained = _rounds(local) - first
            stored = 0
            door.open()
            at = time.monotonic()
            while stage.poll() is None and stored <= first:
                stored = max(stored, _stored(shared))
                time.sleep(0.2)
            caught_up = time.monotonic() - at
            if stage.wait(LIMIT) != 0:
                raise RuntimeError((folder / "stage.log").read_text()[-3000:])
            problems = state.problems(expected)
            _say(problems)
    return [
        Row(f"rounds trained while the storage was away for {seconds:g} s", gained, 1, unit=""),
        Row("after it is back: until a newer checkpoint is stored", caught_up, None, False, "s"),
        Row("weights, rounds, tracking or leftovers that are not as without it", len(problems), 0, False, ""),
    ]


def _workers(state: Soak) -> int:
    files = list((state.folder / "shared/state").glob(f"train-{RUN}-*/seed0/history.jsonl"))
    files += list((state.folder / "cache/jobs").glob("*/history.jsonl"))
    rows = history.read(max(files, key=lambda f: f.stat().st_mtime)) if files else []
    return int(rows[-1]["train/workers"]) if rows else 0


def _rounds(folder: Path) -> int:
    rows = history.read(folder / "history.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def _stored(storage: Storage) -> int:
    """The round of the checkpoint in the storage, which must be a whole one; 0 for none."""
    for key in storage.keys("state"):
        if key.endswith("/last.pt") and (data := storage.read(key)):
            return int(torch.load(io.BytesIO(data), weights_only=True)["step"])
    return 0


def _until(ready: Callable[[], bool], what: str, state: Soak) -> None:
    deadline = time.monotonic() + LIMIT
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"it never came: {what}\n{(state.folder / 'stage.log').read_text()[-3000:]}")
        time.sleep(0.2)


def _say(problems: list[str]) -> None:
    for problem in problems:
        print(f"  wrong: {problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage_faults")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the storage is away")
    parser.add_argument("--steps", type=int, default=20000)
    given = parser.parse_args()
    return report(
        "storage_faults", [*elastic(given.steps), *preemption(given.steps), *storage(given.seconds, given.steps)]
    )


if __name__ == "__main__":
    raise SystemExit(main())
