"""Where a job's function runs: in a Ray worker, or in this process.

Ray's workers import this file, so it imports nothing of Ray before it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dgm_core.config import RecipeError
from dgm_core.contract import DataMismatch
from dgm_core.training.checkpoint import CheckpointError
from dgm_core.training.history import NonFiniteLoss
from pipelines.command import Interrupted
from pipelines.storage import Storage, StorageError

WATCH_SECONDS = 0.5  # between looks for the mark that asks a job to stop

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


class Entry:
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


def device() -> torch.device:
    """The GPU that this worker was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
