"""Ray clusters of several nodes on this machine: nodes that see less of the disk, that die, and that come back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipelines.repro import BIN, free_port

PATIENCE = 90.0
STARTED = "Ray runtime started"  # what `ray start` says when its node has joined


@dataclass
class Node:
    """One `ray start --block` and everything below it."""

    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """All of its processes at once, as when a machine loses power."""
        for child in [psutil.Process(self.process.pid), *self.below()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
        self.process.wait()

    def below(self) -> list[psutil.Process]:
        """Every process that it started, and that those started."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@dataclass
class Nodes:
    """A head and its nodes. `environment` is what a driver needs to join."""

    address: str
    environment: dict[str, str]
    log: Path
    started: list[Node] = field(default_factory=list)

    def add(self, cpus: int, hidden: Sequence[Path] = ()) -> Node:
        """Start one more node; the folders in `hidden` are empty for it and all that runs on it."""
        ray = [str(BIN / "ray"), "start", "--block", f"--address={self.address}", f"--num-cpus={cpus}"]
        ray.append("--object-store-memory=100000000")
        mounts = " && ".join([*(f"mount -t tmpfs none '{path}'" for path in hidden), 'exec "$@"'])
        command = ["unshare", "--mount", "sh", "-c", mounts, "node", *ray] if hidden else ray
        expected = self.log.read_text().count(STARTED) + 1
        with open(self.log, "a") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True, env=self.environment)
        node = Node(process)
        self.started.append(node)
        deadline = time.monotonic() + PATIENCE
        while self.log.read_text().count(STARTED) < expected:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"the node did not join:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.3)
        return node

    def ask(self, expression: str) -> str:
        """The value of an expression in a driver of its own, as text."""
        script = (
            "import logging, ray; ray.init(logging_level=logging.ERROR, log_to_driver=False); "
            f"print('=>', repr({expression})); ray.shutdown()"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=self.environment, capture_output=True, text=True, check=True
        )
        return done.stdout.rpartition("=>")[2].strip()

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Of its nodes, those whose title contains one of these, such as RayTrainWorker or TrainController."""
        found = []
        for node in self.started:
            for process in node.below():
                with contextlib.suppress(psutil.NoSuchProcess):
                    line, alive = " ".join(process.cmdline()), process.status() != psutil.STATUS_ZOMBIE
                    if alive and line.startswith("ray::") and any(title in line for title in titles):
                        found.append(process)
        return found

    def free_cpus(self) -> tuple[float, float]:
        """(free, all)"""
        free, total = self.ask("(ray.available_resources().get('CPU', 0), ray.cluster_resources().get('CPU', 0))")[
            1:-1
        ].split(",")
        return float(free), float(total)


@contextmanager
def nodes(log: Path, head_cpus: int = 0, token: str = "") -> Iterator[Nodes]:
    """A head with a dashboard on loopback, for as long as the block lasts."""
    port, dashboard = free_port(), free_port()
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    environment |= {  # a dead node is noticed in seconds, not in half a minute
        "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "5000", "RAY_health_check_failure_threshold": "5",
    }  # fmt: skip
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
        f"--num-cpus={head_cpus}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        "--object-store-memory=100000000",
    ]  # fmt: skip
    heads = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
    with open(log, "a") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True, env=heads)
    cluster = Nodes(f"127.0.0.1:{port}", environment, log, [Node(process)])
    try:
        deadline = time.monotonic() + PATIENCE
        while STARTED not in log.read_text():
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"the head did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield cluster
    finally:
        for node in reversed(cluster.started):
            if node.process.poll() is None:
                node.kill()
