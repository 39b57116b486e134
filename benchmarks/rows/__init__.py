"""Quality rows: what a model must reach on real data, beside what was published.

Each file here holds one row or a few that belong together; they are found by themselves. A row is a function from a
scratch folder to its measured figures, under the name that `python -m benchmarks.results NAME` takes:

    @row(model="ppca", data="logit-MNIST", estimator="exact", minutes=15, figures={"test": Figure("nll_nats", ...)})
    def ppca_logit_mnist(workdir: Path) -> Measured: ...
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT

Measured = Mapping[str, float | Sequence[float]]  # figure -> its value, or one value a seed


@dataclass(frozen=True)
class Bound:
    """Where a figure must lie, ends included."""

    low: float | None = None
    high: float | None = None
    text: str = ""

    def met(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high) and value == value


def at_least(low: float) -> Bound:
    return Bound(low=low, text=f"≥ {low:g}")


def at_most(high: float) -> Bound:
    return Bound(high=high, text=f"≤ {high:g}")


def within(centre: float, distance: float) -> Bound:
    return Bound(centre - distance, centre + distance, f"{centre:g} ± {distance:g}")


@dataclass(frozen=True)
class Figure:
    """One number of a row. Without a bound it is context: a reference, a ceiling, a floor."""

    metric: str
    bound: Bound | None = None
    unit: str = "nats"
    published: str = ""
    source: str = ""


@dataclass(frozen=True)
class QualityRow:
    """What is measured, how, how long it may take on two idle cores, and what it must come to."""

    name: str
    model: str
    data: str
    estimator: str
    minutes: float
    figures: Mapping[str, Figure]
    seeds: Sequence[int]
    run: Callable[[Path], Measured]


_ROWS: dict[str, QualityRow] = {}


def row(
    *, model: str, data: str, estimator: str, minutes: float, figures: Mapping[str, Figure], seeds: Sequence[int] = (0,)
) -> Callable[[Callable[[Path], Measured]], Callable[[Path], Measured]]:
    """Register the function as a row under its own name."""

    def register(run: Callable[[Path], Measured]) -> Callable[[Path], Measured]:
        if (known := _ROWS.get(run.__name__)) and known.run.__module__ != run.__module__:
            raise ValueError(f"two rows are called {run.__name__}: in {known.run.__module__} and {run.__module__}")
        _ROWS[run.__name__] = QualityRow(run.__name__, model, data, estimator, minutes, figures, seeds, run)
        return run

    return register


def all_rows() -> dict[str, QualityRow]:
    """Every row of every file in this folder, by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_ROWS.items()))


def real_data(folder: str) -> Path:
    """A folder of the real data sets, which are not part of the repository."""
    root = Path(os.environ.get("DGM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (root / folder).is_dir():
        raise SystemExit(f"{root / folder} is missing: set DGM_SHARED_DATA to the folder that holds {folder}/")
    return root / folder
