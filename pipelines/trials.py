"""Trials on Ray Tune: each is a small actor that drives a Ray Train job, or trains by itself where `workers` is 0.

What a trial reports goes through Tune to the driver, which alone writes: the ledger and MLflow.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune

from dgm_core.data.shards import open_dataset
from pipelines import train
from pipelines.cluster import FINAL, run_job
from pipelines.params import Cluster, JobFailed, Usage, resolve
from pipelines.place import Place
from pipelines.search import UNTUNED, Case, Values, score, with_values

DRIVER_MEMORY = 2**28  # bytes; what a trial's own actor reserves where its workers hold the CPUs
REPORT_SECONDS = 2.0  # a decision to stop a trial should not wait long for what it decides on
RAY_SETTINGS = ("RAY_TRAIN_", "RAY_CHDIR_", "RAY_ACCEL_")


@dataclass(frozen=True)
class Plan:
    """What all trials of a search share; pickles."""

    case: Case
    cluster: Cluster  # of one trial
    place: Place
    data: str  # a reference of `place`
    judge: str | None
    state: str  # where the trials' states are: a folder, or a prefix in the storage
    root: str = field(default_factory=os.getcwd)
    environment: Mapping[str, str] = field(
        default_factory=lambda: {k: v for k, v in os.environ.items() if k.startswith(RAY_SETTINGS)}
    )

    @property
    def alone(self) -> bool:
        """Whether a trial trains in its own actor."""
        return self.cluster.most == 0

    def job(self, number: int, values: Values) -> dict[str, Any]:
        """What `train.job` is given for a trial."""
        case = self.case
        with self.place.opened(self.data) as folder:
            spec = open_dataset(folder).spec
        run = with_values(case.run, values)
        _, config, recipe = resolve(case.name, run, spec, UNTUNED)
        recipe = recipe.merged({"steps": case.steps, "evaluate_every": case.every, "monitor": (case.metric, case.mode)})
        schedule = {**vars(self.cluster.schedule), "checkpoint_every": case.every}
        return {
            "model": run.model,
            "config": config.model_dump(mode="json"),
            "recipe": recipe.model_dump(mode="json"),
            "place": self.place,
            "data": self.data,
            "judge": self.judge,
            "seed": run.seed,
            "init_from": self.place.send(Path(self.root, "models", run.init_from)) if run.init_from else None,
            "report_seconds": min(self.cluster.report_seconds, REPORT_SECONDS),
            "schedule": schedule,
            "overfit_batches": None,
            "validate": True,
            "folder": f"{self.state}/{label(number)}",
        }


def label(number: int) -> str:
    """A trial's name."""
    return f"{number:03d}"


class Results:
    """Makes of a job's reports what Tune is told: one result a validation, with all rows of history up to it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.values: list[float] = []
        self.rows: list[str] = []
        self.images: dict[int, bytes] = {}
        self.seen = 0

    def of(self, payload: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self.images.update(payload["images"])
        for line in payload["rows"]:
            row = json.loads(line)
            if row["step"] <= self.seen:  # a job that starts again tells its history again
                continue
            self.seen = int(row["step"])
            self.rows.append(line)
            if math.isfinite(row.get(self.case.metric, math.nan)):
                self.values.append(row[self.case.metric])
                yield self._result()

    def last(self) -> dict[str, Any]:
        """After a job that ended by itself."""
        if not self.values:
            return self.failure(f"{self.case.metric} was never a finite number")
        return {**self._result(), "ended": True}

    def failure(self, why: str) -> dict[str, Any]:
        rows, images = self._taken()
        return {
            "step": self.seen,
            "score": math.inf if self.case.mode == "min" else -math.inf,
            "error": why,
            "rows": rows,
            "images": images,
        }

    def _result(self) -> dict[str, Any]:
        rows, images = self._taken()
        worth = score(self.values, self.case.mode, self.case.keeps_best)
        return {"step": self.seen, "score": worth, "rows": rows, "images": images}

    def _taken(self) -> tuple[list[str], dict[int, bytes]]:
        taken = self.rows, self.images
        self.rows, self.images = [], {}
        return taken


def run_trial(config: Mapping[str, Any], plan: Plan) -> None:
    """What Tune runs for a trial."""
    os.environ.update(plan.environment)
    if os.path.isdir(plan.root):
        os.chdir(plan.root)  # relative paths mean here what they mean to the stage
    number = int(tune.get_context().get_trial_name() or 0)
    results = Results(plan.case)
    try:
        job = plan.job(number, config["values"])
        name = f"{Path(plan.state).parent.name}-{label(number)}"
        if plan.alone:
            _train_here(job, plan, name, results)
        else:
            _train_elsewhere(job, plan, name, results)
    except (JobFailed, Usage, *FINAL) as error:
        tune.report(results.failure(str(error)))
        return
    tune.report(results.last())


def _train_here(job: dict[str, Any], plan: Plan, name: str, results: Results) -> None:
    def pass_on(payload: Mapping[str, Any]) -> None:
        for result in results.of(payload):
            tune.report(result)

    run_job(train.job, job, plan.cluster, name=name, on_report=pass_on)


def _train_elsewhere(job: dict[str, Any], plan: Plan, name: str, results: Results) -> None:
    """Drive a Ray Train job from a thread, and pass on what its controller puts into a queue.

    `TuneReportCallback` does the same through a queue of Tune's own, whose reader can wait for ever where the job ends
    while a report is still on its way.
    """
    from ray.util.queue import Empty, Queue

    queue = Queue(actor_options={"num_cpus": 0})
    failed: list[BaseException] = []

    def drive() -> None:
        try:
            run_job(train.job, job, plan.cluster, name=name, on_report=queue.put)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=drive, daemon=True)  # a stopped trial does not wait for it
    thread.start()
    while True:
        running = thread.is_alive()
        try:
            payload = queue.get(timeout=0.2)
        except Empty:
            if running:
                continue
            break
        for result in results.of(payload):
            tune.report(result)
    queue.shutdown()
    if failed:
        raise failed[0]


def slots(cluster: Cluster, trials: int, has: Mapping[str, float]) -> tuple[int, int]:
    """How many trials run side by side on a cluster that has these resources, and the CPUs of each worker.

    Without `cpus_per_worker` there are as many as the CPUs allow, and they share what is over.
    """
    workers = max(1, cluster.least)
    room = [trials, has.get("CPU", 1) // (workers * (cluster.cpus_per_worker or 1))]
    if cluster.gpus_per_worker:
        room.append(has.get("GPU", 0) // (workers * cluster.gpus_per_worker))
    side_by_side = max(1, int(min(room)))
    return side_by_side, cluster.cpus_per_worker or max(1, int(has.get("CPU", 1) // (side_by_side * workers)))


def resources(plan: Plan) -> dict[str, float]:
    """Of a trial's own actor. One that only drives holds no CPU: a hundredth of one would keep a worker from its."""
    if not plan.alone:
        return {"memory": DRIVER_MEMORY}
    gpus = {"gpu": plan.cluster.gpus_per_worker} if plan.cluster.gpus_per_worker else {}
    return {"cpu": plan.cluster.cpus_per_worker or 1, **gpus}


def free_placement_groups(seconds: float) -> int:
    """Wait until the placement groups of this driver's trials are gone, and remove those that stay; how many did.

    A stopped trial takes its Ray Train controller with it, which cannot tidy up after itself: Ray's own cleaner does,
    a moment later.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    own = ray.get_runtime_context().get_job_id()  # the last bytes of what the job makes

    def left() -> list[str]:
        table: dict[str, Any] = ray.util.placement_group_table()
        return [key for key, group in table.items() if key.endswith(own) and group["state"] != "REMOVED"]

    deadline = time.monotonic() + seconds
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    leaked = left()
    for key in leaked:
        with suppress(Exception):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key))))
    return len(leaked)
