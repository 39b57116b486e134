"""MLflow: one run an entry of `params.yaml`, kept through retries and continued by `evaluate`.

    python -m pipelines.tracking flush      # send what a dead server, or a killed stage, left in .dgm/spool

A stage needs its tracking server when it starts. From then on everything goes through a spool on the driver's disk
(`pipelines.spool`), which the driver sends in the background: a server that dies delays nothing and loses nothing.
The driver is the only process that writes to the store, so SQLite has one writer.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgm_core.evaluation.files import write_atomically
from pipelines.command import Usage, run_main
from pipelines.leftovers import say_what_is_left, settle
from pipelines.node_metrics import Sampler, step_at
from pipelines.params import Tracking, home, load_params
from pipelines.sender import Sender
from pipelines.spool import Spool, folders, lock
from pipelines.tracking_store import connect, hide, masked, unusable
from pipelines.writer import Writer

log = logging.getLogger(__name__)

OPENING_SECONDS = 5.0


def spool_root() -> Path:
    """`DGM_SPOOL`, else the project's `.dgm/spool`: a folder on this machine's disk that outlives the stage."""
    return home() / (os.environ.get("DGM_SPOOL") or ".dgm/spool")


def memories(state: Path, name: str) -> list[Path]:
    """Notes of a run's MLflow id from one stage to the next: a DVC experiment's own, as several go on at once, and
    then that of what it started from."""
    experiment = os.environ.get("DVC_EXP_NAME")
    return [state / "tracking" / f"{note}.json" for note in ([f"{name}@{experiment}"] if experiment else []) + [name]]


class Tracker:
    """The driver's end of one MLflow run."""

    def __init__(self, settings: Tracking, name: str, state: Path, spool: Path | None = None) -> None:
        """Connect, and create the store and the experiment at first use.

        Args:
            name: of the run in params.yaml.
            state: folder that remembers the MLflow run's id from one stage to the next.
            spool: folder for what is on its way to MLflow; `spool_root()` where None.

        Raises:
            Usage: the store does not answer, or refuses us.
        """
        from mlflow.exceptions import MlflowException

        self.settings, self.name, self.root = settings, name, (spool or spool_root()).absolute()
        self.uri, self.client = connect(settings)
        self.memory = memories(state, name)[0]
        try:
            self.experiment = self._experiment()
        except MlflowException as error:
            raise unusable(self.uri, error) from None
        self.run_id = ""
        self.status: str | None = None  # what the run ends as; None: FINISHED or FAILED, as the block ends
        self._spool: Spool
        self._sender: Sender
        self._lock: Any = None
        self._started = 0

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.settings.experiment
        local = self.uri.startswith("sqlite")
        location = (home() / self.settings.artifacts / name).as_uri() if local else None
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another stage was quicker
                    raise
                found = self.client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise Usage(
                f"tracking: the experiment {name!r} was deleted in {masked(self.uri)}; restore it "
                f"(mlflow experiments restore -x {found.experiment_id}), or set another tracking.experiment"
            )
        return found.experiment_id

    def open(
        self,
        run_id: str | None,
        tags: Mapping[str, str],
        *,
        parent: str | None = None,
        memo: Path | None = None,
        if_killed: str = "FAILED",
    ) -> str:
        """Continue the run `run_id`, or start one where it is None or this server does not know it.

        Args:
            parent: run under which MLflow shows this one.
            memo: file of the caller's that keeps the run's id: read where `run_id` is None. A process killed between
                the run's creation and its note finds it again.
            if_killed: what the run becomes if this process dies and nobody continues it.
        """
        from mlflow.exceptions import MlflowException

        tags = {**tags, **_provenance(), **({"mlflow.parentRunId": parent} if parent else {})}
        try:
            run = self._begin(run_id, tags, memo)
        except MlflowException as error:
            raise unusable(self.uri, error) from None
        self.run_id, self._started = run.info.run_id, run.info.start_time
        self._open_spool(if_killed)
        self._spool.append("status", status="RUNNING")
        self._spool.append("tags", tags=tags)
        self._sender.settled(OPENING_SECONDS, at_most=OPENING_SECONDS)  # it is seen to run, as a rule, when it does
        note = {"run_id": self.run_id, "uri": masked(self.uri), "url": self.url}
        for path in {memo or self.memory, self.memory}:
            _write(path, note)
        return self.run_id

    def _begin(self, run_id: str | None, tags: dict[str, str], memo: Path | None) -> Any:
        """The run to continue, else a new one; `tags` say what it is to continue."""
        noted = _read(memo or self.memory)
        if memo is not None:
            run_id = run_id or noted.get("run_id")
        if run_id is not None:
            if (known := self._known(run_id)) is not None:
                return known
            log.warning("MLflow at %s does not know run %s; starting a new one", masked(self.uri), run_id)
            tags["dgm.continues"] = run_id
        elif found := self._opened(noted.get("opening")):
            return found[0]
        tags["dgm.opening"] = uuid.uuid4().hex
        _write(memo or self.memory, {"opening": tags["dgm.opening"]})
        return self.client.create_run(self.experiment, run_name=self.name, tags=tags)

    def _opened(self, opening: str | None) -> Any:
        """Runs that a process started which was killed before it noted their id: none, or one."""
        if opening is None:
            return []
        return self.client.search_runs([self.experiment], f"tags.`dgm.opening` = '{opening}'")

    def _known(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _open_spool(self, if_killed: str) -> None:
        self._spool = Spool(self.root / self.run_id)
        self._lock = lock(self._spool.folder, seconds=60)
        if self._lock is None:
            raise Usage(f"another process is at work on MLflow run {self.run_id}; wait for it, or stop it")
        self._spool.create(run_id=self.run_id, name=self.name, uri=masked(self.uri), if_killed=if_killed)
        self._sender = Sender(self._spool, self.client, self.run_id, lambda text: hide(text, self.uri)).start()

    def remembered(self) -> str | None:
        """The id that the last stage of this run left."""
        memory = _read(self.memory)
        return memory.get("run_id") if memory.get("uri") == masked(self.uri) else None

    @property
    def url(self) -> str:
        base = self.uri if self.uri.startswith("http") else "http://127.0.0.1:5000"
        return f"{base}/#/experiments/{self.experiment}/runs/{self.run_id}"

    @contextmanager
    def running(
        self, run_id: str | None, *, parent: str | None = None, memo: Path | None = None,
        if_killed: str = "FAILED", **tags: str,
    ) -> Iterator[Tracker]:  # fmt: skip
        """Open the run for the block: FINISHED when it ends well, FAILED otherwise, never RUNNING. See `open`.

        What earlier stages of this project could not send is sent meanwhile.
        """
        self.open(run_id, tags, parent=parent, memo=memo, if_killed=if_killed)
        stop = threading.Event()
        leftovers = threading.Thread(target=self._send_leftovers, args=(stop,), daemon=True)
        leftovers.start()
        sampler = Sampler(self._log_sample).start() if self.settings.system_metrics else None
        status = "FAILED"
        try:
            yield self
            status = "FINISHED"
        finally:
            if sampler is not None:
                sampler.finish()
            self._end(self.status or status)
            stop.set()
            leftovers.join(2.0)

    def _end(self, status: str) -> None:
        try:
            self._spool.append("status", status=status)
        except OSError as error:
            log.warning("tracking: %s cannot be written: %s", self._spool.folder, error)
            self.client.set_terminated(self.run_id, status)
        if self._sender.close(self.settings.flush_seconds) and not self._spool.refused:
            self._spool.remove()
        else:
            say_what_is_left(self._spool, self._sender.failing, self.uri)
        if self._sender.ended:  # else it hangs in a request, and the lock goes with this process
            self._lock.close()

    def _send_leftovers(self, stop: threading.Event) -> None:
        for folder in folders(self.root):
            if folder.name == self.run_id or stop.is_set():
                continue
            try:
                settle(folder, self.uri, self.client, self.settings.flush_seconds)
            except OSError as error:
                log.warning("tracking: %s cannot be read: %s", folder, error)

    def _log_sample(self, sample: Mapping[str, float], now: int) -> None:
        metrics = {f"system/{key}": value for key, value in sample.items()}
        self._spool.append("points", metrics=metrics, step=step_at(now, self._started), new=False)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Flat parameters (those logged by an earlier attempt are left as they were) and the whole as JSON."""
        self._spool.append("params", params={k: str(v)[:6000] for k, v in _flatten(config)})
        folder = self._spool.blob()
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        self._spool.append("artifacts", blob=folder.name, path="")
        self._sender.wake()

    def log_results(self, metrics: Mapping[str, float], folder: Path, path: str = "evaluation") -> None:
        """Final numbers and a folder of figures."""
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._spool.append("points", metrics=finite, step=0, new=True)
        blob = self._spool.blob()
        shutil.copytree(folder, blob)
        self._spool.append("artifacts", blob=blob.name, path=path)
        self._sender.wake()

    def model_folder(self) -> Path:
        """Where to save a model for `log_model`: not there yet, on the spool's disk."""
        return self._spool.blob()

    def log_model(self, folder: Path, name: str = "model") -> None:
        """Log what `save_model` of an MLflow flavour wrote into a `model_folder()`."""
        self._spool.append("model", blob=folder.name, name=name)
        self._sender.wake()

    def writer(self, prefix: str = "") -> Writer:
        return Writer(str(self._spool.folder), prefix)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".replace("*", "_"), value


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, note: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(note).encode())


def _provenance() -> dict[str, str]:
    """What DVC says of the stage that runs, and git of the code."""
    names = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
    tags = {name.lower().replace("_", ".", 1): os.environ[name] for name in names if os.environ.get(name)}
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        tags["mlflow.source.git.commit"] = done.stdout.strip()
    return tags


def flush(settings: Tracking, root: Path | None = None) -> dict[str, str]:
    """Send everything that is found: each run's name with what is left of it, "" for nothing."""
    found = folders(root or spool_root())
    if not found:
        return {}
    uri, client = connect(settings)
    return {
        f"{Spool(folder).about['name']} ({folder.name})": settle(folder, uri, client, settings.flush_seconds)
        for folder in found
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.tracking", description="Runs on their way to MLflow.")
    parser.add_argument("command", choices=["flush"], help="send what earlier stages could not")
    parser.parse_args(argv)
    outcome = flush(load_params().tracking)
    for name, left in outcome.items():
        sys.stdout.write(f"{name}: {left or 'everything is in MLflow'}\n")
    if not outcome:
        sys.stdout.write("nothing waits to be sent\n")
    return 1 if any(outcome.values()) else 0


if __name__ == "__main__":
    run_main(main)
