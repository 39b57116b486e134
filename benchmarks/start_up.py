"""A stage's start and nothing else: connect, start a worker group, and say when its first line ran.

Its workers and its controller import this file, so it imports no more than they do in a training stage.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pipelines.training_job  # noqa: F401  what a worker of a training stage imports
from pipelines.cluster import run_job
from pipelines.connect import connected
from pipelines.params import Cluster
from pipelines.worker import Worker
from pipelines.writer import Writer


def one_job() -> None:
    import ray.train.torch  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="dgm-start-") as name:
        cluster = Cluster(storage=name)
        with connected(cluster):
            report = Writer(str(Path(name) / "spool"))
            print(run_job(_now, {}, cluster, name="start", on_report=report), flush=True)


def _now(config: Mapping[str, Any], worker: Worker) -> float:
    return time.time()
