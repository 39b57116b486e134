"""Ray: start or join a cluster, run a training job on it, map over parts, bring results home.

With `workers: 0` the same calls run in this process, without Ray.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from dgm_core.config import RecipeError
from dgm_core.contract import DataMismatch
from dgm_core.training.checkpoint import CheckpointError
from dgm_core.training.history import NonFiniteLoss
from pipelines.params import Cluster, JobFailed, Usage

# Errors that come again however often a job is restarted: they end it at once, with their own words.
FINAL = (NonFiniteLoss, DataMismatch, CheckpointError, RecipeError)


class Worker(Protocol):
    """What a job's function sees of where it runs."""

    device: torch.device

    def report(self, payload: Mapping[str, Any]) -> None:
        """Send plain values to the job's `on_report`; under Ray a barrier over its workers."""
        ...


@dataclass
class Here:
    """This process is the job's only worker."""

    device: torch.device
    on_report: Callable[[Mapping[str, Any]], None]

    def report(self, payload: Mapping[str, Any]) -> None:
        self.on_report(payload)


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Join the cluster at `RAY_ADDRESS`, else start one here for as long as the block lasts.

    Raises:
        Usage: nothing answers at the address, or the cluster is smaller than `cluster:` asks for.
    """
    if cluster.workers == 0:
        yield
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(cluster.start_timeout_s))
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same on the driver and its workers
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = os.environ.get("RAY_ADDRESS") or "local"
    if ":" in address:
        _preflight(address)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        # Ray Train's placement-group cleaner asks the dashboard's State API, and ends 12 s late where there is none.
        ray.init(address=address, include_dashboard=True, dashboard_host="127.0.0.1", **quiet)
    else:
        ray.init(address=address, **quiet)
    try:
        _check_size(cluster, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def _preflight(address: str) -> None:
    if "://" in address:
        raise Usage(
            f"RAY_ADDRESS={address} is a client address; run this on a machine of the cluster and give host:port "
            "of its head (usually port 6379)"
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        raise Usage(
            f"nothing answers at RAY_ADDRESS={address} ({error}); start a head there with `ray start --head`, or unset "
            "RAY_ADDRESS to start a cluster here"
        ) from None


def _check_size(cluster: Cluster, has: Mapping[str, float]) -> None:
    cpus = cluster.workers * (cluster.cpus_per_worker or 1)
    gpus = cluster.workers * cluster.gpus_per_worker
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > has.get(name, 0):
            raise Usage(
                f"cluster: {cluster.workers} workers need {needed:g} {name}s; there are {has.get(name, 0):g}; lower "
                f" cluster.workers or cluster.{name.lower()}s_per_worker, or join a larger cluster (RAY_ADDRESS)"
            )


def _resources(cluster: Cluster, workers: int) -> dict[str, float]:
    import ray

    cpus = cluster.cpus_per_worker or max(1, int(ray.cluster_resources().get("CPU", 1)) // workers)
    return {"CPU": cpus, **({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})}


def run_job(
    job: Callable[[Mapping[str, Any], Worker], Any],
    config: Mapping[str, Any],
    cluster: Cluster,
    *,
    name: str,
    on_report: Callable[[Mapping[str, Any]], None],
) -> Any:
    """Run `job(config, worker)` as a Ray Train job on `cluster.workers` workers; rank 0's return value comes back.

    A worker that dies takes the group with it, and Ray starts the group again, up to `cluster.max_failures` times: the
    job finds its own checkpoint. `on_report` gets rank 0's payloads in Ray's controller process: it must pickle.
    """
    if cluster.workers == 0:
        device = torch.device("cuda" if torch.cuda.is_available() and cluster.gpus_per_worker else "cpu")
        return job(config, Here(device, on_report))
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.writer import Reports

    resources = _resources(cluster, cluster.workers)
    trainer = TorchTrainer(
        _Entry(job, int(resources["CPU"])),
        train_loop_config=dict(config),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str((Path(cluster.storage) / "ray").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=3),
            callbacks=[Reports(on_report)],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    outcome: Any = trainer.fit().return_value
    kind, value = outcome
    if kind == "failed":
        raise JobFailed(value)
    return value


class _Entry:
    """The function that Ray's workers run; its class is importable, so only the arguments travel."""

    def __init__(self, job: Callable[[Mapping[str, Any], Worker], Any], threads: int) -> None:
        self.job = job
        self.threads = threads
        self.__name__ = getattr(job, "__name__", "job")

    def __call__(self, config: Mapping[str, Any]) -> tuple[str, Any]:
        import ray.train.torch

        torch.set_num_threads(self.threads)
        worker = _RayWorker(ray.train.torch.get_device())
        try:
            result = self.job(config, worker)
            worker.finish()
            return "done", result
        except FINAL as error:
            return "failed", f"{type(error).__name__}: {error}"


class _RayWorker:
    """Reports from a thread of its own: `ray.train.report` waits for the controller's next poll, training does not."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.thread = ThreadPoolExecutor(1)
        self.last: Future[None] | None = None

    def report(self, payload: Mapping[str, Any]) -> None:
        import ray.train

        self.finish()  # one at a time, and what went wrong with the last is said here
        self.last = self.thread.submit(ray.train.report, dict(payload))

    def finish(self) -> None:
        if self.last is not None:
            self.last.result()


def call(function: Callable[..., Any], *args: Any, cluster: Cluster) -> Any:
    """Run one function on one of the cluster's workers, with that worker's share of CPUs (and GPU)."""
    if cluster.workers == 0:
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


def map_parts(function: Callable[[Any], Any], parts: Sequence[Any], cluster: Cluster, *, what: str) -> Iterable[Any]:
    """`function` of each part, in order, on as many CPUs as the cluster has; with progress on a terminal."""
    bar = tqdm(total=len(parts), desc=what, disable=None, unit="part")
    if cluster.workers == 0:
        for part in parts:
            yield function(part)
            bar.update()
        bar.close()
        return
    import ray
    from ray.exceptions import RayTaskError

    task: Any = ray.remote(_on_worker).options(num_cpus=1, max_retries=cluster.max_failures)
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


def _on_worker(function: Callable[..., Any], threads: int, *args: Any) -> Any:
    torch.set_num_threads(threads)
    return function(*args)


class Progress:
    """A bar in this process for a job that writes its history to a file that this process sees."""

    def __init__(self, history: Path, total: int, what: str) -> None:
        self.history, self.total, self.what = history, total, what

    def __enter__(self) -> Progress:
        import threading

        self.bar = tqdm(total=self.total, desc=self.what, disable=None, unit="round")
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        if not self.bar.disable:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()
        self.bar.close()

    def _watch(self) -> None:
        from dgm_core.training import history

        while not self.done.wait(1.0):
            rows = history.read(self.history)
            if rows:
                row = rows[-1]
                self.bar.update(int(row["step"]) - self.bar.n)
                self.bar.set_postfix({k.split("/", 1)[1]: f"{v:.4g}" for k, v in row.items() if k.endswith("/loss")})


def wait_for_lock(path: Path, seconds: float) -> Any:
    """Hold an exclusive lock on a file for as long as the returned object lives; the kernel frees a dead holder's."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115  (the caller holds it open)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise Usage(
                    f"another process is at work in {path.parent}; wait for it, or stop it (the lock frees itself)"
                ) from None
            time.sleep(0.2)


def device() -> torch.device:
    """The GPU that this worker was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
