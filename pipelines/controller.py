"""What runs in Ray's controller process: the hook that hears reports, and the start of a group of workers.

It imports nothing heavy, so that a job does not wait for its controller to import torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.train import BackendConfig, UserCallback
from ray.train.backend import Backend

log = logging.getLogger(__name__)


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
