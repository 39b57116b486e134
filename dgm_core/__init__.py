"""Classic deep generative models behind one contract. `dgm_core.load("models/flow").sample(16)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgm_core.contract import GenerativeModel

__all__ = ["load"]


def load(folder: str | Path, device: str = "cpu") -> GenerativeModel:
    """The trained model that a finished run's folder holds, in eval mode (see `dgm_core.runs.load`)."""
    from dgm_core.runs import load as load_run  # here, so that importing the package imports nothing else

    return load_run(folder, device)
