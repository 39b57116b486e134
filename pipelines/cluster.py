"""Run a training job on Ray's cluster; with `workers: 0` in this process, without Ray."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pipelines.command import Interrupted, JobFailed
from pipelines.connect import NO_DASHBOARD
from pipelines.params import Cluster
from pipelines.placement import drives_itself, free_placement_groups
from pipelines.storage import Storage
from pipelines.worker import Entry, Here, Worker

if TYPE_CHECKING:
    from ray.train import UserCallback

CLEANER_SECONDS = 5.0  # that Ray's own has to free what a dead controller held


def resources(cluster: Cluster, workers: int) -> dict[str, float]:
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
    entry = Entry(job, folders.stop_key, NO_DASHBOARD not in os.environ)
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
    from pipelines.scaling import FreshScaling, OwnCluster

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
            elif NO_DASHBOARD in os.environ:
                arguments["scaling_policy"] = OwnCluster(self.scaling_config)
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
            resources_per_worker=resources(cluster, cluster.most),
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
