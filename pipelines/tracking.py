"""MLflow: one run an entry of `params.yaml`, kept through retries and continued by `evaluate`.

The driver opens and closes the run. While a job runs, metrics come through Ray's reports to the controller process,
whose `Writer` is the only one that logs: SQLite has one writer, and no step is logged twice.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.params import Tracking, Usage
from pipelines.writer import Writer

log = logging.getLogger(__name__)


class Tracker:
    """The driver's end of one MLflow run."""

    def __init__(self, settings: Tracking, name: str, state: Path) -> None:
        """Connect, and create the store and the experiment at first use.

        Args:
            name: of the run in params.yaml.
            state: folder that remembers the MLflow run's id from one stage to the next.
        """
        import mlflow
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self.settings, self.name = settings, name
        self.uri = store_uri(settings)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        mlflow.set_tracking_uri(self.uri)
        self.client = MlflowClient(tracking_uri=self.uri)
        self.memory = state / "tracking" / f"{name}.json"
        try:
            self.experiment = self._experiment()
        except MlflowException as error:
            raise Usage(f"the tracking store {self.uri} cannot be used: {error.message.splitlines()[0]}") from None
        self.run_id = ""

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.settings.experiment)
        if found is not None:
            return found.experiment_id
        local = self.uri.startswith("sqlite")
        location = (Path(self.settings.artifacts).resolve() / self.settings.experiment).as_uri() if local else None
        return self.client.create_experiment(self.settings.experiment, artifact_location=location)

    def open(self, run_id: str | None, tags: Mapping[str, str]) -> str:
        """Continue the run `run_id`, or start one where it is None or this server does not know it."""
        from mlflow.exceptions import MlflowException

        known = None
        if run_id is not None:
            try:
                known = self.client.get_run(run_id)
            except MlflowException:
                log.warning("MLflow at %s does not know run %s; starting a new one", self.uri, run_id)
        tags = {**dict(tags), **_provenance()}
        if known is not None and known.info.lifecycle_stage == "active":
            self.run_id = known.info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            for key, value in tags.items():
                self.client.set_tag(self.run_id, key, value)
        else:
            if run_id is not None:
                tags["dgm.continues"] = run_id
            run = self.client.create_run(self.experiment, run_name=self.name, tags=tags)
            self.run_id = run.info.run_id
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        self.memory.write_text(json.dumps({"run_id": self.run_id, "uri": self.uri, "url": self.url}))
        return self.run_id

    def remembered(self) -> str | None:
        """The id that the last stage of this run left."""
        if not self.memory.exists():
            return None
        memory = json.loads(self.memory.read_text())
        return memory["run_id"] if memory["uri"] == self.uri else None

    @property
    def url(self) -> str:
        base = self.uri if self.uri.startswith("http") else "http://127.0.0.1:5000"
        return f"{base}/#/experiments/{self.experiment}/runs/{self.run_id}"

    @contextmanager
    def running(self, run_id: str | None, **tags: str) -> Iterator[Tracker]:
        """Open the run for the block: FINISHED when it ends well, FAILED otherwise, never RUNNING."""
        self.open(run_id, tags)
        monitor = self._system_monitor()
        status = "FAILED"
        try:
            yield self
            status = "FINISHED"
        finally:
            if monitor is not None:
                monitor.finish()
            self.client.set_terminated(self.run_id, status)

    def _system_monitor(self) -> Any:
        if not self.settings.system_metrics:
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        monitor = SystemMetricsMonitor(self.run_id, resume_logging=True)
        monitor.start()
        return monitor

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Flat parameters (those logged by an earlier attempt are left as they were) and the whole as JSON."""
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        flat = {k: str(v)[:6000] for k, v in _flatten(config) if k not in known}
        params = [Param(k, v) for k, v in flat.items()]
        for start in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[start : start + 100])
        self.client.log_dict(self.run_id, dict(config), "config.json")

    def log_results(self, metrics: Mapping[str, float], folder: Path) -> None:
        """Final numbers and a folder of figures."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(k, float(v), now, 0) for k, v in metrics.items() if math.isfinite(v)]
        for start in range(0, len(batch), 1000):
            self.client.log_batch(self.run_id, metrics=batch[start : start + 1000])
        self.client.log_artifacts(self.run_id, str(folder), "evaluation")

    def writer(self, prefix: str = "") -> Writer:
        return Writer(self.uri, self.run_id, prefix)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".replace("*", "_"), value


def store_uri(settings: Tracking) -> str:
    """Where runs are kept: `MLFLOW_TRACKING_URI`, else params.yaml's, with a file's path made absolute.

    Raises:
        Usage: the scheme is not one that MLflow's stores have.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or settings.uri
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    if uri.split(":")[0] not in ("http", "https", "postgresql", "postgresql+psycopg2", "mysql", "mssql"):
        raise Usage(f"tracking uri {uri!r} is not accepted: give sqlite:///FILE, a database's URI, or http(s)://SERVER")
    return uri


def _provenance() -> dict[str, str]:
    """What DVC says of the stage that runs, and git of the code."""
    names = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
    tags = {name.lower().replace("_", ".", 1): os.environ[name] for name in names if os.environ.get(name)}
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        tags["mlflow.source.git.commit"] = done.stdout.strip()
    return tags
