"""Timing ours against a peer, and a table that says of each goal whether it was met.

Both are run back to back, taking turns to go first, so that whatever else the machine does falls on both alike; what
counts is the median over pairs of the peer's time divided by ours.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dgm_core.evaluation.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Pairs:
    """Seconds of each run, in pairs; `ratio` is how many times faster ours is (the median over pairs)."""

    ours: list[float]
    peer: list[float]
    ratio: float


@dataclass(frozen=True)
class Row:
    """One measured figure and its goal; without a goal it is only shown."""

    what: str
    value: float
    goal: float | None
    at_least: bool = True
    unit: str = "×"

    @property
    def met(self) -> bool:
        """A NaN meets no goal."""
        if self.goal is None:
            return True
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def interleave(ours: Callable[[], Any], peer: Callable[[], Any], pairs: int = 7, warmup: int = 1) -> Pairs:
    """Time both `pairs` times, after `warmup` untimed runs of each."""
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1; given: {pairs}")
    for _ in range(warmup):
        ours()
        peer()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(pairs):
        for is_ours in (True, False) if i % 2 == 0 else (False, True):
            seconds[is_ours].append(_seconds(ours if is_ours else peer))
    ratio = statistics.median(p / o for o, p in zip(seconds[True], seconds[False], strict=True))
    return Pairs(seconds[True], seconds[False], ratio)


def report(name: str, rows: Sequence[Row], folder: Path = RESULTS) -> int:
    """Print the table, store it as `folder/name.json`, and return the exit code: 1 where a goal is missed."""
    cells = [("", "measured", "goal", "")]
    for row in rows:
        sign = "≥" if row.at_least else "≤"
        goal = "–" if row.goal is None else f"{sign} {row.goal:g} {row.unit}"
        verdict = "" if row.goal is None else "met" if row.met else "MISSED"
        cells.append((row.what, f"{row.value:.4g} {row.unit}", goal, verdict))
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    print(f"\n{name}")
    for what, value, goal, verdict in cells:
        print(f"  {what:<{widths[0]}}  {value:>{widths[1]}}  {goal:>{widths[2]}}  {verdict}".rstrip())
    stored = {
        "name": name,
        "command": f"python -m benchmarks.{name}",
        "rows": [
            {"what": r.what, "value": r.value, "goal": r.goal, "at_least": r.at_least, "unit": r.unit, "met": r.met}
            for r in rows
        ],
        **circumstances(),
    }
    write_json(folder / f"{name}.json", stored)
    return 0 if all(row.met for row in rows) else 1


def circumstances() -> dict[str, Any]:
    """When, on what and with what something was measured."""
    gpu = {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()} if torch.cuda.is_available() else {}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), **gpu},
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "numpy", "ray", "mlflow", "scikit-learn")},
        },
    }


def revision() -> str:
    """The commit, and whether code beside it was changed; "unknown" outside a git checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.toml", "*.yaml")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with changes" if changed else commit


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """An interrupted run leaves the old figures whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels are queued: without it only the queueing is timed
    return time.perf_counter() - start


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
