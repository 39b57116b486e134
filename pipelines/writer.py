"""What runs in Ray's controller process: the hook that hears reports, and the writer that logs them into MLflow.

It imports nothing heavy, so that a job does not wait for its controller to import torch.
"""

from __future__ import annotations

import io
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.train import UserCallback

_ROUND = "round"  # logged with every row: the last one says what is logged already


class Writer:
    """Logs rows of history into one MLflow run; pickles, and connects when first used."""

    def __init__(self, uri: str, run_id: str, prefix: str = "") -> None:
        self.uri, self.run_id, self.prefix = uri, run_id, prefix
        self._client: Any = None
        self._lock = threading.Lock()
        self._last = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return Writer, (self.uri, self.run_id, self.prefix)

    def connect(self) -> Any:
        """The client, made at first use, and what the run has been told already."""
        with self._lock:
            if self._client is None:
                from mlflow.tracking import MlflowClient

                client = MlflowClient(tracking_uri=self.uri)
                logged = client.get_metric_history(self.run_id, self.prefix + _ROUND)
                self._last = max((m.step for m in logged), default=-1)
                self._client = client
            return self._client

    def __call__(self, payload: Mapping[str, Any]) -> None:
        """Log `rows` (JSON lines of history) and `images` ({step: PNG bytes})."""
        from mlflow.entities import Metric

        client, now, metrics, skipped = self.connect(), int(time.time() * 1000), [], set()
        known = self._last
        for row in map(json.loads, payload.get("rows", ())):
            step = int(row.pop("step"))
            if step <= self._last:
                continue
            self._last = step
            metrics.append(Metric(self.prefix + _ROUND, step, now, step))
            for key, value in row.items():
                if math.isfinite(value):
                    metrics.append(Metric(self.prefix + key, value, now, step))
                else:
                    skipped.add(key)
        for start in range(0, len(metrics), 1000):  # MLflow's limit for one batch
            client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        if skipped:
            client.set_tag(self.run_id, "dgm.not_finite", ", ".join(sorted(skipped)))
        for step, png in payload.get("images", {}).items():
            if int(step) > known:
                _log_image(client, self.run_id, png, key=self.prefix + "samples", step=int(step))


def _log_image(client: Any, run_id: str, png: bytes, *, key: str, step: int) -> None:
    from PIL import Image

    client.log_image(run_id, Image.open(io.BytesIO(png)), key=key, step=step, synchronous=True)


class Reports(UserCallback):
    """Hands rank 0's payloads to `on_report`, which must pickle."""

    def __init__(self, on_report: Callable[[Mapping[str, Any]], None]) -> None:
        self.on_report = on_report

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In the controller. MLflow takes seconds to import and to connect: better while the workers start than in
        # mid-training.
        self.__dict__.update(state)
        if isinstance(self.on_report, Writer):
            threading.Thread(target=self.on_report.connect, daemon=True).start()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        try:
            self.on_report(metrics[0])
        except Exception:  # a callback's error would end the run; tracking is not worth that
            logging.getLogger(__name__).exception("metrics were not recorded")
