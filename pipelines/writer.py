"""Appends what a job reports to its run's spool, in whichever process hears the reports.

Under Ray that is the controller, so nothing heavy is imported: a job does not wait for torch or MLflow there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
