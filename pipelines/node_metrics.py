"""A node's CPU, memory, disk, network and GPU use as metrics of an MLflow run, sampled in a thread.

    with node_metrics(uri, run_id):     # in one worker of each node
        train()

Only a server takes metrics from many processes, so this does nothing for other stores. A worker on a node of a cluster
needs the server's credentials (`MLFLOW_TRACKING_USERNAME`, …) in that node's own environment.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

SECONDS = 10.0  # between samples; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL wins
KEPT = 4096  # samples that a dead server may cost memory for, half a day of them


class Sampler:
    """Calls `log_sample(metrics, time in ms)` every few seconds."""

    def __init__(self, log_sample: Callable[[Mapping[str, float], int], None]) -> None:
        self.log_sample = log_sample
        self.seconds = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or SECONDS)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)

    def start(self) -> Sampler:
        self._thread.start()
        return self

    def finish(self) -> None:
        self._end.set()
        self._thread.join(1.0)  # sampling takes milliseconds; a dead server's request is not waited for

    def _run(self) -> None:
        monitors = _monitors()
        while not self._end.wait(self.seconds):
            sample: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                sample.update(monitor.aggregate_metrics())
                monitor.clear_metrics()
            try:
                self.log_sample(sample, int(time.time() * 1000))
            except OSError as error:
                log.debug("a sample of system metrics is lost: %s", error)


def _monitors() -> list[Any]:
    """MLflow's own, so that names and units are those that its pages know."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        try:
            monitors.append(kind())
            break
        except Exception as error:  # no such GPU, or not the library that reads it
            log.debug("no %s: %s", kind.__name__, error)
    return monitors


def step_at(now: int, started: int) -> int:
    """Seconds since the run started: a run that goes on after a retry takes no step twice."""
    return max(0, (now - started) // 1000)


class _Direct:
    """Sends samples to a server from this process, and keeps them for as long as it does not answer."""

    def __init__(self, uri: str, run_id: str, node: str) -> None:
        self.uri, self.run_id, self.node = uri, run_id, node
        self.kept: deque[tuple[Mapping[str, float], int]] = deque(maxlen=KEPT)
        self.client: Any = None
        self.started = 0

    def __call__(self, sample: Mapping[str, float], now: int) -> None:
        self.kept.append((sample, now))
        try:
            self._send()
        except Exception as error:  # never the job's business
            log.debug("system metrics wait for the server: %s", error)

    def _send(self) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        if self.client is None:
            client = MlflowClient(tracking_uri=self.uri)
            self.started = client.get_run(self.run_id).info.start_time
            self.client = client
        while self.kept:
            metrics, when = self.kept[0]
            step = step_at(when, self.started)
            points = [Metric(f"system/{self.node}/{k}", v, when, step) for k, v in metrics.items()]
            self.client.log_batch(self.run_id, metrics=points)
            self.kept.popleft()


@contextmanager
def node_metrics(uri: str, run_id: str, node: str = "") -> Iterator[None]:
    """Log this node's use under `system/<node>/…` for as long as the block lasts.

    Args:
        uri: of the tracking server; anything but http(s) logs nothing.
        node: its name; the host's where empty.
    """
    if not uri.startswith(("http://", "https://")):
        yield
        return
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", node or socket.gethostname())
    sampler = Sampler(_Direct(uri, run_id, name)).start()
    try:
        yield
    finally:
        sampler.finish()
