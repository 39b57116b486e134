"""What runs in Ray's controller process: the hook that hears reports, and the writer that spools them for MLflow.

It imports nothing heavy, so that a job does not wait for its controller to import torch or MLflow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import BackendConfig, UserCallback
from ray.train.backend import Backend

from pipelines.spool import Spool

log = logging.getLogger(__name__)


class Writer:
    """Appends rows of history and pictures to a run's spool; the driver, on the same machine, sends them to MLflow."""

    def __init__(self, folder: str, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        self._unwritten: list[Mapping[str, Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Writer, (self.folder, self.prefix)

    def __call__(self, payload: Mapping[str, Any]) -> None:
        """Take `rows` (JSON lines of history) and `images` ({step: PNG bytes}); what a full disk refuses is kept."""
        self._unwritten.append(payload)
        while self._unwritten:
            try:
                self._append(self._unwritten[0])
            except OSError as error:
                log.warning("tracking: %s cannot be written (%s); kept until the next report", self.folder, error)
                return
            self._unwritten.pop(0)

    def _append(self, payload: Mapping[str, Any]) -> None:
        spool, now, images = Spool(Path(self.folder)), int(time.time() * 1000), {}
        key = f"{self.prefix}samples"
        for step, png in payload.get("images", {}).items():
            name = f"{key.replace('/', '~')}+step+{int(step)}+timestamp+{now}+"  # as MLflow names images with a slider
            path = spool.blob(name, ".png")
            path.write_bytes(png)
            images[str(step)] = path.name
        rows = list(payload.get("rows", ()))
        if rows or images:
            spool.append("history", prefix=self.prefix, rows=rows, key=key, images=images)


@dataclass
class TorchSetup(BackendConfig):
    """Ray's `TorchConfig`, but the controller imports torch only for a group of several workers."""

    backend: str | None = None
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[Backend]:
        return _TorchSetup


class _TorchSetup(Backend):
    share_cuda_visible_devices = True

    def __init__(self) -> None:
        self.started = False

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        if len(worker_group) == 1:
            return  # one worker has nobody to talk to
        from ray.train.torch import TorchConfig

        assert isinstance(backend_config, TorchSetup)
        config = TorchConfig(backend=backend_config.backend, timeout_s=backend_config.timeout_s)
        config.backend_cls().on_start(worker_group, config)
        self.started = True

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        if self.started:
            from ray.train.torch import TorchConfig

            config = TorchConfig()
            config.backend_cls().on_shutdown(worker_group, config)
            self.started = False


class Reports(UserCallback):
    """Hands rank 0's payloads to `on_report`, which must pickle."""

    def __init__(self, on_report: Callable[[Mapping[str, Any]], None]) -> None:
        self.on_report = on_report

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        try:
            self.on_report(metrics[0])
        except Exception:  # a callback's error would end the run; tracking is not worth that
            log.exception("metrics were not recorded")
