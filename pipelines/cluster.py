"""Ray: start or join a cluster, run a training job on it, map over parts, bring results home.

With `workers: 0` the same calls run in this process, without Ray.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from dgm_core.config import RecipeError
from dgm_core.contract import DataMismatch
from dgm_core.training.checkpoint import CheckpointError
from dgm_core.training.history import NonFiniteLoss
from pipelines.connect import NO_DASHBOARD, connected
from pipelines.params import Cluster, Interrupted, JobFailed
from pipelines.placement import drives_itself, free_placement_groups
from pipelines.storage import Storage, StorageError

if TYPE_CHECKING:
    from ray.train import UserCallback

__all__ = ["Here", "Worker", "call", "connected", "device", "keep_parts", "map_parts", "run_job"]

WATCH_SECONDS = 0.5  # between looks for the mark that asks a job to stop
CLEANER_SECONDS = 5.0  # that Ray's own has to free what a dead controller held

# Errors that come again however often a job is restarted: they end it at once, with their own words.
FINAL = (NonFiniteLoss, DataMismatch, CheckpointError, RecipeError, StorageError)


class Worker(Protocol):
    """What a job's function sees of where it runs."""

    device: torch.device
    leads_node: bool  # one worker of each node does

    def report(self, payload: Mapping[str, Any]) -> None:
        """Send plain values to the job's `on_report`; under Ray a barrier over its workers."""
        ...

    def asked_to_stop(self) -> bool:
        """Whether SIGTERM came to the stage: checkpoint, and go. Rank 0 knows."""
        ...

    def preempted(self) -> bool:
        """Whether a node of the job will be taken away soon: checkpoint. Under Ray a barrier over its workers."""
        ...


@dataclass
class Here:
    """This process is the job's only worker."""

    device: torch.device
    on_report: Callable[[Mapping[str, Any]], None]
    leads_node: bool = True
    stopping: threading.Event = field(default_factory=threading.Event)

    def report(self, payload: Mapping[str, Any]) -> None:
        self.on_report(payload)

    def asked_to_stop(self) -> bool:
        return self.stopping.is_set()

    def preempted(self) -> bool:
        return False


def _resources(cluster: Cluster, workers: int) -> dict[str, float]:
    """Of one of `workers` workers: what `cluster:` says, or an equal share of the CPUs that fits on the nodes.

    `DGM_JOBS` jobs run side by side: the share is of a cluster that they have between them.
    """
    import ray

    workers *= int(os.environ.get("DGM_JOBS", "1"))

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fitting = (c for c in range(max(1, *nodes), 1, -1) if sum(n // c for n in nodes) >= workers)
    cpus = cluster.cpus_per_worker or next(fitting, 1)
    return {"CPU": cpus, **({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})}


def run_job(
    job: Callable[[Mapping[str, Any], Worker], Any],
    config: Mapping[str, Any],
    cluster: Cluster,
    *,
    name: str,
    on_report: Callable[[Mapping[str, Any]], None],
    callbacks: Sequence[UserCallback] = (),
) -> Any:
    """Run `job(config, worker)` as a Ray Train job on `cluster.workers` workers; rank 0's return value comes back.

    A worker or node that dies takes the group with it, and Ray starts the group again, up to `cluster.max_failures`
    times; a dead controller is started again here: either way the job finds its own checkpoint. `on_report` gets rank
    0's payloads in Ray's controller process: it must pickle. SIGTERM asks the job to checkpoint and stop.

    Raises:
        JobFailed: with the job's own words, for what no restart mends.
        Interrupted: SIGTERM came, and the job has checkpointed.
    """
    if cluster.most == 0:
        here = Here(torch.device("cuda" if torch.cuda.is_available() and cluster.gpus_per_worker else "cpu"), on_report)
        with _on_sigterm(here.stopping.set):
            return job(config, here)
    folders = _Folders(cluster, name)
    entry = _Entry(job, folders.stop_key, NO_DASHBOARD not in os.environ)
    with _on_sigterm(folders.ask_to_stop):
        kind, value = _fit(
            lambda: _trainer(entry, config, cluster, folders, on_report, callbacks), cluster.max_failures
        )
    folders.delete()
    if kind == "failed":
        raise JobFailed(value)
    if kind == "interrupted":
        raise Interrupted(value)
    return value


def _fit(make: Callable[[], Any], max_failures: int) -> Any:
    """Ray restarts a controller's workers; nobody restarts the controller, which also dies of a worker that does not
    live through the group's start."""
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, TrainingFailedError

    last: Exception | None = None
    for attempt in range(max_failures + 1):
        if attempt and drives_itself():  # a search frees what its trials leave when it ends
            free_placement_groups(CLEANER_SECONDS)
        try:
            return make().fit().return_value
        except RayActorError as error:
            last = error
        except ControllerError as error:
            if not isinstance(error.controller_failure, RayActorError):
                raise JobFailed(f"Ray Train gave up: {error.controller_failure}") from error
            last = error
        except TrainingFailedError as error:
            raise JobFailed(f"given up after {max_failures} restarts (cluster.max_failures): {error}") from error
    raise JobFailed(f"Ray Train's controller died {max_failures + 1} times: {last}") from last


class _Folders:
    """Ray's own folder for a job, and the file whose presence asks the job to stop."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.storage = Storage(cluster.storage if cluster.shared else str(cluster.local), cluster.storage_patience_s)
        self.key = f"ray/{name}"
        self.stop_key = (self.storage, f"stop/{name}")
        self.storage.delete(self.stop_key[1])

    def ask_to_stop(self) -> None:
        self.storage.write(self.stop_key[1], b"")

    def delete(self) -> None:
        for key in (self.key, self.stop_key[1]):
            self.storage.delete(key)


@contextmanager
def _on_sigterm(ask: Callable[[], None]) -> Iterator[None]:
    """The first SIGTERM asks nicely, a second one ends this process; elsewhere than in the main thread, neither."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def first(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        ask()

    signal.signal(signal.SIGTERM, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _trainer(
    entry: Callable[[Mapping[str, Any]], Any],
    config: Mapping[str, Any],
    cluster: Cluster,
    folders: _Folders,
    on_report: Callable[[Mapping[str, Any]], None],
    callbacks: Sequence[UserCallback],
) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.controller import Reports, TorchSetup
    from pipelines.elastic import FreshScaling

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            # Two of Ray Train's helpers are processes of their own, seconds of a stage's start on few cores: one that
            # serves Ray Data, which no job here uses, and one that frees placement groups when the driver dies, which
            # a cluster that dies with the driver does not need (and which asks a dashboard that it does not have).
            idle = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if NO_DASHBOARD in os.environ else set())
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in idle]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            if self.scaling_config.elasticity_enabled:
                arguments["scaling_policy"] = FreshScaling(self.scaling_config)
            return super()._initialize_and_run_controller(**arguments)

    elastic = not isinstance(cluster.workers, int)
    extra: dict[str, Any] = {"elastic_resize_monitor_interval_s": cluster.resize_seconds} if elastic else {}
    filesystem, root = folders.storage.filesystem
    return Trainer(
        entry,
        train_loop_config=dict(config),
        torch_config=TorchSetup(),  # pyright: ignore[reportArgumentType]
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(cluster, cluster.most),
            **extra,
        ),
        run_config=ray.train.RunConfig(
            name=folders.key.rpartition("/")[2],
            storage_path=f"{root}/ray",
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
            ),
            callbacks=[Reports(on_report), *callbacks],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


class _Entry:
    """The function that Ray's workers run; its class is importable, so only the arguments travel."""

    def __init__(
        self, job: Callable[[Mapping[str, Any], Worker], Any], stop: tuple[Storage, str], preemptible: bool
    ) -> None:
        self.job, self.stop, self.preemptible = job, stop, preemptible
        self.__name__ = getattr(job, "__name__", "job")

    def __call__(self, config: Mapping[str, Any]) -> tuple[str, Any]:
        import ray
        import ray.train.torch

        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        worker = _RayWorker(ray.train.torch.get_device(), self.stop, self.preemptible)
        try:
            result = self.job(config, worker)
            worker.finish()
            return "done", result
        except Interrupted as stopped:
            worker.finish()
            return "interrupted", str(stopped)
        except FINAL as error:
            return "failed", f"{type(error).__name__}: {error}"


class _RayWorker:
    """Reports from a thread of its own: `ray.train.report` waits for the controller's next poll, training does not."""

    def __init__(self, device: torch.device, stop: tuple[Storage, str], preemptible: bool) -> None:
        import ray.train

        self.device, self.preemptible = device, preemptible
        self.leads_node = ray.train.get_context().get_local_rank() == 0
        self.storage, self.stop_key = stop
        self.thread = ThreadPoolExecutor(1)
        self.last: Future[None] | None = None
        self.watch: threading.Thread | None = None
        self.stopping = threading.Event()

    def report(self, payload: Mapping[str, Any]) -> None:
        import ray.train

        self.finish()  # one at a time, and what went wrong with the last is said here
        self.last = self.thread.submit(ray.train.report, dict(payload))

    def finish(self) -> None:
        if self.last is not None:
            self.last.result()

    def asked_to_stop(self) -> bool:
        if self.watch is None:
            self.watch = threading.Thread(target=self._watch, daemon=True)
            self.watch.start()
        return self.stopping.is_set()

    def _watch(self) -> None:
        """Look for the mark in a thread of its own: a store that is slow, or away, delays no training."""
        while not self.stopping.is_set():
            try:
                if self.storage.exists(self.stop_key):
                    self.stopping.set()
            except StorageError:
                pass  # it says nothing while it is away; whoever needs it says so
            self.stopping.wait(WATCH_SECONDS)

    def preempted(self) -> bool:
        if not self.preemptible:
            return False
        import ray.train

        self.finish()  # both are barriers of the same group
        return ray.train.get_preemption_info() is not None


def call(function: Callable[..., Any], *args: Any, cluster: Cluster) -> Any:
    """Run one function on one of the cluster's workers, with that worker's share of CPUs (and GPU)."""
    if cluster.most == 0:
        return function(*args)
    import ray
    from ray.exceptions import RayTaskError

    resources = _resources(cluster, 1)
    task: Any = ray.remote(_on_worker).options(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_retries=cluster.max_failures
    )
    try:
        return ray.get(task.remote(function, int(resources["CPU"]), *args))
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, FINAL) else error from None


def map_parts(
    function: Callable[[Any], Any],
    parts: Sequence[Any],
    cluster: Cluster,
    *,
    what: str,
    near: bool = False,
    gpus: float = 0,
) -> Iterator[Any]:
    """`function` of each part, in order, on as many CPUs as the cluster has; with progress on a terminal.

    A part whose worker or node dies is done again elsewhere, so `function` must be one that can be.

    Args:
        near: on this process's own node, where it gives the cluster CPUs: the parts are on its disk.
        gpus: of each worker.
    """
    bar = tqdm(total=len(parts), desc=what, disable=None, unit="part")
    if cluster.most == 0:
        for part in parts:
            yield function(part)
            bar.update()
        bar.close()
        return
    import ray
    from ray.exceptions import RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "max_retries": cluster.max_failures}
    here = ray.get_runtime_context().get_node_id()
    if near and any(n["NodeID"] == here and n["Resources"].get("CPU", 0) >= 1 for n in ray.nodes()):
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    task: Any = ray.remote(_on_worker).options(**options)
    ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # no more results in memory than this
    waiting = [task.remote(function, 1, part) for part in parts[:ahead]]
    for i in range(len(parts)):
        try:
            value = ray.get(waiting.pop(0))
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, FINAL) else error from None
        if i + ahead < len(parts):
            waiting.append(task.remote(function, 1, parts[i + ahead]))
        bar.update()
        yield value
    bar.close()


def keep_parts(
    function: Callable[[Any], Mapping[str, np.ndarray]],
    parts: Sequence[Any],
    cluster: Cluster,
    folder: Path,
    *,
    what: str,
    gpus: float = 0,
) -> list[Path]:
    """`map_parts` into one npz file a part; parts whose files are there from an attempt before are not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i}.npz" for i in range(len(parts))]
    missing = [(file, part) for file, part in zip(files, parts, strict=True) if not file.exists()]
    found = map_parts(function, [part for _, part in missing], cluster, what=what, gpus=gpus)
    for (file, _), arrays in zip(missing, found, strict=True):
        aside = file.with_suffix(".partial")
        with open(aside, "wb") as sink:
            np.savez(sink, **arrays)
        os.replace(aside, file)
    return files


def _on_worker(function: Callable[..., Any], threads: int, *args: Any) -> Any:
    torch.set_num_threads(threads)
    return function(*args)


def device() -> torch.device:
    """The GPU that this worker was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
