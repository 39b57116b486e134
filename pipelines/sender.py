"""Sends what a spool holds to MLflow: in order, once, for as long as it takes, without anyone waiting.

An entry may be sent twice (a process dies between sending and noting it), so each is made to be harmless the second
time: points carry the time at which they were spooled and MLflow keeps equal points once, artefacts have their names
from the spool, a model is found again by its tag. An entry may also be *spooled* twice (a job goes on from its
checkpoint and reports its history again): rounds and pictures that the run has already are dropped.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tenacity
from PIL import Image

from pipelines.spool import TERMINAL, Entry, Spool, files_of
from pipelines.tracking_store import reason

log = logging.getLogger(__name__)

ROUND = "round"  # logged last with every row: its latest value says what the run has
POINTS = 1000  # MLflow's limit for one batch
PARAMS = 100
LONGEST_PAUSE = 15.0  # between attempts, in seconds
SLOWEST = 1e6  # bytes per second that an upload is expected to make

_REFUSED = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"}  # the request is wrong, it seems
_REFUSALS = 3  # so often: a database that goes away under its server is a "bad request" too


class Sender:
    """Follows one spool in a thread of its own. The caller holds the spool's lock."""

    def __init__(self, spool: Spool, client: Any, run_id: str, hide: Callable[[str], str] = str) -> None:
        """
        Args:
            hide: takes secrets out of an error's text.
        """
        self.spool, self.hide = spool, hide
        self.applied = Applied(spool, client, run_id)
        self.failing = ""  # why nothing gets through at the moment
        self.offset = spool.sent
        self._wake, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._progress = time.monotonic()
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)

    def start(self) -> Sender:
        self._thread.start()
        return self

    def wake(self) -> None:
        """There is something new: do not wait for the next look."""
        self._wake.set()

    def settled(self, seconds: float, at_most: float = math.inf) -> bool:
        """Wait until all that is spooled by now is sent, but no longer than `seconds` while nothing gets through."""
        target = max((entry.end for entry in self.spool.read(self.offset)), default=self.offset)
        asked = time.monotonic()
        self._wake.set()
        with self._idle:
            while self.offset < target and self._thread.is_alive():
                expected = self.applied.uploading / SLOWEST
                left = min(max(self._progress, asked) + seconds + expected, asked + at_most) - time.monotonic()
                if left <= 0:
                    return False
                self._idle.wait(min(left, 0.5))
        return self.offset >= target

    def close(self, seconds: float) -> bool:
        """Send the rest and end; False if it could not be sent (see `settled`)."""
        self._closing.set()
        done = self.settled(seconds)
        self._given_up.set()
        self._wake.set()
        self._thread.join(2.0)  # it may hang in a request to a dead server; it ends with the process
        return done

    @property
    def ended(self) -> bool:
        """Whether nothing of it is at work any more."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._given_up.is_set():
            self._wake.clear()
            for entry in self.spool.read(self.offset):
                if not self._deliver(entry):
                    return
            self._wake.wait(0.5)

    def _deliver(self, entry: Entry) -> bool:
        """Send it, however often that takes; False when told to give up."""
        attempts = tenacity.Retrying(
            wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=LONGEST_PAUSE),
            stop=lambda _: self._given_up.is_set(),
            retry=tenacity.retry_if_exception_type(Exception),
            sleep=self._pause,
        )
        refusals = 0
        try:
            for attempt in attempts:
                with attempt:
                    try:
                        self.applied.apply(entry)
                        self.spool.acknowledge(entry)
                    except Exception as error:
                        refusals = refusals + 1 if is_refusal(error) else 0
                        if refusals < _REFUSALS:
                            self._say_failing(error)
                            raise
                        self._refuse(entry, error)
        except tenacity.RetryError:
            return False
        if self.failing and refusals < _REFUSALS:
            log.warning("tracking: MLflow answers again; what was kept is being sent")
        self.failing = ""
        with self._idle:
            self.offset, self._progress = entry.end, time.monotonic()
            self._idle.notify_all()
        return True

    def _refuse(self, entry: Entry, error: Exception) -> None:
        why = self.hide(reason(error))
        log.warning("tracking: MLflow refuses %s of run %s (%s); kept in %s",
                    entry.kind, self.applied.run_id, why, self.spool.folder)  # fmt: skip
        self.spool.refuse(entry, why)

    def _say_failing(self, error: Exception) -> None:
        why = self.hide(reason(error))
        if not self.failing:
            log.warning("tracking: MLflow fails (%s); everything is kept in %s and sent later", why, self.spool.folder)
        self.failing = why

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            self._given_up.wait(min(seconds, 1.0))
        elif self._closing.wait(seconds):
            return


def is_refusal(error: BaseException) -> bool:
    """Whether trying again is no use: the server answered, and said that what it was sent is wrong."""
    status = getattr(getattr(error, "response", None), "status_code", None)  # artefacts fail with requests' errors
    if status is not None:
        return status in (400, 404, 413)
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError)
    # What our own code cannot apply, it never will.
    wrong = isinstance(error, LookupError | TypeError | ValueError | AttributeError)
    return wrong or getattr(error, "error_code", None) in _REFUSED


class Applied:
    """Applies entries to one run, and knows which of them it has already."""

    def __init__(self, spool: Spool, client: Any, run_id: str) -> None:
        self.spool, self.client, self.run_id = spool, client, run_id
        self.uploading = 0  # bytes on their way at the moment
        self._rounds: dict[str, int] | None = None
        self._pictures: set[tuple[str, int]] | None = None

    def apply(self, entry: Entry) -> None:
        """Send one entry.

        Raises:
            Exception: whatever MLflow's client raises; the same entry may then be applied again.
        """
        kinds = {
            "history": self._history, "points": self._points, "params": self._params, "tags": self._tags,
            "artifacts": self._artifacts, "model": self._model, "status": self._status, "damaged": self._damaged,
        }  # fmt: skip
        self.uploading = sum(_size(self.spool.blobs / name) for name in files_of(entry))
        try:
            kinds[entry.kind](entry)
        finally:
            self.uploading = 0

    def _damaged(self, entry: Entry) -> None:
        log.warning("tracking: a damaged line of %s is left out", self.spool.journal)

    def _run(self) -> Any:
        return self.client.get_run(self.run_id)

    def _history(self, entry: Entry) -> None:
        """Rows of history and sample grids, each step of them once."""
        prefix = entry.content["prefix"]
        if self._rounds is None:
            metrics = self._run().data.metrics
            self._rounds = {k: int(v) for k, v in metrics.items() if k.rsplit("/")[-1] == ROUND}
        key, skipped = prefix + ROUND, set()
        points = _points_of(entry, self._rounds.get(key, -1), skipped)
        for start in range(0, len(points), POINTS):
            self.client.log_batch(self.run_id, metrics=points[start : start + POINTS])
        if points:
            self._rounds[key] = points[-1].step
        if skipped:
            said = self._run().data.tags.get("dgm.not_finite", "").split(", ")
            self.client.set_tag(self.run_id, "dgm.not_finite", ", ".join(sorted(skipped | set(filter(None, said)))))
        for step, name in entry.content["images"].items():
            self._picture(entry.content["key"], int(step), self.spool.blobs / name)

    def _picture(self, key: str, step: int, path: Path) -> None:
        """As MLflow's `log_image` does, but under the name that it has in the spool."""
        from mlflow.tracking.multimedia import compress_image_size

        if self._pictures is None:
            self._pictures = set(_steps_of(f.path for f in self.client.list_artifacts(self.run_id, "images")))
        mark = (key.replace("/", "~"), step)
        if mark in self._pictures:
            return
        content = io.BytesIO(path.read_bytes())
        try:
            reduced = compress_image_size(Image.open(content))
        except (OSError, SyntaxError) as error:  # of Pillow, which read memory: no use in trying again
            raise ValueError(f"{path.name} is no picture: {error}") from None
        small = path.with_name(f"{path.stem}+compressed.webp")
        reduced.save(small)
        self.client.set_tag(self.run_id, "mlflow.loggedImages", "True")
        self.client.log_artifact(self.run_id, str(small), "images")
        self.client.log_artifact(self.run_id, str(path), "images")  # last: it says that the picture is there
        small.unlink()
        self._pictures.add(mark)

    def _points(self, entry: Entry) -> None:
        """Metrics at one step; with `new`, only those whose value the run does not show already."""
        from mlflow.entities import Metric

        known = self._run().data.metrics if entry.content["new"] else {}
        step = entry.content["step"]
        found = {k: v for k, v in entry.content["metrics"].items() if math.isfinite(v) and known.get(k) != v}
        points = [Metric(k, v, entry.time, step) for k, v in found.items()]
        for start in range(0, len(points), POINTS):
            self.client.log_batch(self.run_id, metrics=points[start : start + POINTS])

    def _params(self, entry: Entry) -> None:
        """Those logged by an earlier attempt stay as they are: MLflow's parameters do not change."""
        from mlflow.entities import Param

        known = self._run().data.params
        params = [Param(k, v) for k, v in entry.content["params"].items() if k not in known]
        for start in range(0, len(params), PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + PARAMS])

    def _tags(self, entry: Entry) -> None:
        for key, value in entry.content["tags"].items():
            self.client.set_tag(self.run_id, key, value)

    def _artifacts(self, entry: Entry) -> None:
        path = self.spool.blobs / entry.content["blob"]
        self.client.log_artifacts(self.run_id, str(path), entry.content["path"] or None)

    def _model(self, entry: Entry) -> None:
        """A folder that `save_model` wrote becomes a logged model: the second half of MLflow's `log_model`."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        run, blob = self._run(), entry.content["blob"]
        path, experiments = self.spool.blobs / blob, [run.info.experiment_id]
        found = self.client.search_logged_models(experiments, filter_string=f"tags.`dgm.spooled` = '{blob}'")
        model = found[0] if found else self.client.create_logged_model(
            experiments[0], name=entry.content["name"], source_run_id=self.run_id, tags={"dgm.spooled": blob},
            params=dict(run.data.params),
        )  # fmt: skip
        if str(model.status) == "READY":
            return
        outputs = run.outputs.model_outputs if run.outputs else []
        if model.model_id not in [output.model_id for output in outputs]:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        about = Model.load(str(path))
        about.artifact_path, about.run_id = model.artifact_location, self.run_id
        about.model_id = about.model_uuid = model.model_id
        about.save(str(path / "MLmodel"))
        self.client.log_model_artifacts(model.model_id, str(path))
        self.client.finalize_logged_model(model.model_id, "READY")

    def _status(self, entry: Entry) -> None:
        status = entry.content["status"]
        if status in TERMINAL:
            self.client.set_terminated(self.run_id, status, end_time=entry.time)
        else:
            self.client.update_run(self.run_id, status=status)


def _points_of(entry: Entry, last: int, skipped: set[str]) -> list[Any]:
    """Points of the rows above `last`, each row's round behind its others; keys of what is not finite in `skipped`."""
    from mlflow.entities import Metric

    prefix, points = entry.content["prefix"], []
    for row in map(json.loads, entry.content["rows"]):
        step = int(row.pop("step"))
        if step <= last:
            continue
        last = step
        skipped |= {key for key, value in row.items() if not math.isfinite(value)}
        points += [Metric(prefix + k, v, entry.time, step) for k, v in row.items() if math.isfinite(v)]
        points.append(Metric(prefix + ROUND, step, entry.time, step))
    return points


def _steps_of(paths: Iterator[str]) -> Iterator[tuple[str, int]]:
    for path in paths:
        found = re.match(r"images/(.+)\+step\+(\d+)\+timestamp\+.*\.png$", path)
        if found:
            yield found[1], int(found[2])


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())
