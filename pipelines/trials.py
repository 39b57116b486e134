"""Trials on Ray Tune: each is a small actor that drives a Ray Train job, or trains by itself where `workers` is 0.

What a trial reports goes through Tune to the driver, which alone writes: the ledger and MLflow.
"""

from __future__ import annotations

import json
import math
import os
import queue
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.util import queue as ray_queue

from dgm_core.data.shards import open_dataset
from dgm_core.training.checkpoint import load
from pipelines import training_job
from pipelines.cluster import run_job
from pipelines.command import JobFailed, Usage
from pipelines.params import Cluster, resolve
from pipelines.place import Place
from pipelines.search import UNTUNED, Case, Values, score, with_values
from pipelines.storage import Storage
from pipelines.worker import FINAL

DRIVER_MEMORY = 2**28  # bytes; what a trial's own actor reserves where its workers hold the CPUs
STOP_SECONDS = 60.0  # that a stopped trial's job has for a checkpoint
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

    population: bool = False

    @property
    def alone(self) -> bool:
        """Whether a trial trains in its own actor."""
        return self.cluster.most == 0

    def job(self, number: int, values: Values) -> dict[str, Any]:
        """What `training_job.job` is given for a trial."""
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

    def __init__(self, case: Case, seen: int = 0) -> None:
        self.case, self.seen = case, seen
        self.values: list[float] = []
        self.rows: list[str] = []
        self.images: dict[int, bytes] = {}

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
                if self.seen < self.case.steps:  # the last is told when the job has ended well
                    yield self._result()

    def last(self) -> dict[str, Any]:
        """After a job that ended by itself."""
        if not self.values:
            return self.failure(f"{self.case.metric} was never a finite number")
        return {**self._result(), "ended": True, "done": True}

    def failure(self, why: str) -> dict[str, Any]:
        worst = math.inf if self.case.mode == "min" else -math.inf
        return {"step": self.seen, "score": worst, "error": why, "done": True, **self._taken()}

    def _result(self) -> dict[str, Any]:
        worth = score(self.values, self.case.mode, self.case.keeps_best)
        return {"step": self.seen, "score": worth, **self._taken()}

    def _taken(self) -> dict[str, Any]:
        taken = {"rows": self.rows, "images": self.images}
        self.rows, self.images = [], {}
        return taken


class Actor(tune.Trainable):
    """A trial. Its job runs in a thread of its own, from the first `step` on; each `step` waits for a validation.

    Ray's `TuneReportCallback` has a queue of Tune's own for this, whose reader can wait for ever where a job ends while
    a report is on its way; and a function that Tune stops cannot end its Ray Train job, whose workers then keep their
    CPUs from the next trial. Here `cleanup` asks the job to stop, and waits.
    """

    def setup(self, config: dict[str, Any], plan: Plan) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        os.environ.update(plan.environment)
        if os.path.isdir(plan.root):
            os.chdir(plan.root)  # relative paths mean here what they mean to the stage
        if plan.alone:
            torch.set_num_threads(plan.cluster.cpus_per_worker or 1)
        self.plan, self.number = plan, int(self.trial_name)
        self.values: Values = config["trial"]["values"]
        self.name = f"{Path(plan.state).parent.name}-{label(self.number)}"
        self.results = Results(plan.case)
        self.ready: deque[dict[str, Any]] = deque()
        self.failed: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.held = ExitStack()
        self.job = plan.job(self.number, self.values)
        if plan.population:
            self.job |= Member.job(self.job, plan, self.held)

    def step(self) -> dict[str, Any]:
        if self.thread is None:
            self._start()
            assert self.thread is not None
        told = True
        while not self.ready:
            if told:  # all that the job said so far is passed on, or was said before
                self.member.go.set()
            running = self.thread.is_alive()
            try:
                self.ready.extend(self.results.of(self.inbox.get(timeout=0.2)))
                told = True
            except (queue.Empty, ray_queue.Empty):
                told = False
                if not running:
                    return self._end()
        return self.ready.popleft()

    def _start(self) -> None:
        self.inbox: Any = queue.Queue() if self.plan.alone else ray_queue.Queue(actor_options={"num_cpus": 0})
        self.member = Member(self.inbox, self.plan)
        on_report = self.member.tell if self.plan.population else self.inbox.put

        def drive() -> None:
            try:
                run_job(training_job.job, self.job, self.plan.cluster, name=self.name, on_report=on_report)
            except BaseException as error:
                self.failed = error

        self.thread = threading.Thread(target=drive, daemon=True)
        self.thread.start()

    def _end(self) -> dict[str, Any]:
        if self.failed is None:
            return self.results.last()
        if isinstance(self.failed, (JobFailed, Usage, *FINAL)):  # it would come again
            return self.results.failure(str(self.failed))
        raise self.failed

    def cleanup(self) -> None:
        if self.thread is not None and self.thread.is_alive() and not self.plan.alone:
            with asked_to_stop(self.plan.cluster, self.name):
                self.thread.join(STOP_SECONDS)
        self.held.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        shutil.copy2(Path(self.job["folder"], "last.pt"), checkpoint_dir)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from a trial's state: this one's before it paused, or that of one that does better."""
        folder = Path(self.job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(checkpoint, "last.pt"), folder)
        self.results.seen = load(folder / "last.pt", "cpu")["step"]


class Member:
    """One of a population: it waits at each validation, when its state is on the disk, until it is told to go on."""

    def __init__(self, inbox: Any, plan: Plan) -> None:
        self.inbox, self.case = inbox, plan.case
        self.go = threading.Event()
        self.unsaid: dict[str, Any] | None = None

    @staticmethod
    def job(job: Mapping[str, Any], plan: Plan, held: ExitStack) -> dict[str, Any]:
        """Its state is on this node's disk; Tune carries it from trial to trial."""
        folder = job["folder"]
        if plan.place.storage is not None:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="dgm-member-"))
        return {
            "place": Place(None),
            "data": str(held.enter_context(plan.place.opened(plan.data))),
            "judge": str(held.enter_context(plan.place.opened(plan.judge))) if plan.judge else None,
            "folder": folder,
            "report_seconds": 0.0,  # every logged row
            "schedule": {**job["schedule"], "log_every": max(1, plan.case.every // 4)},
        }

    def tell(self, payload: Mapping[str, Any]) -> None:
        """What a validation said is passed on with the next report: only then is the state behind it saved."""
        if self.unsaid is not None:
            self.go.clear()
            self.inbox.put(self.unsaid)
            self.unsaid = None
            self.go.wait()
        if any(self.case.metric in json.loads(line) for line in payload["rows"]):
            self.unsaid = dict(payload)
        else:
            self.inbox.put(payload)


@contextmanager
def asked_to_stop(cluster: Cluster, name: str) -> Iterator[None]:
    """As SIGTERM does to a stage: the job checkpoints and ends."""
    storage = Storage(cluster.storage if cluster.shared else str(cluster.local), cluster.storage_patience_s)
    storage.write(f"stop/{name}", b"")
    try:
        yield
    finally:
        storage.delete(f"stop/{name}")


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
