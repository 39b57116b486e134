"""What a file or folder holds, and everything that is wrong with it, before anything is trained on it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from dgm_core.contract import DataMismatch
from dgm_core.data import shards
from dgm_core.data.sources import parse
from dgm_core.data.sources.base import Map, Source
from dgm_core.data.sources.pictures import EXTENSIONS as PICTURES
from dgm_core.data.sources.sounds import EXTENSIONS as SOUNDS

_SUFFIXES = (("parquet", {".parquet"}), ("npz", {".npz"}), ("csv", {".csv"}), ("images", PICTURES), ("wav", SOUNDS))


@dataclass
class Report:
    """`lines` say what is there, `problems` what is wrong and how to mend it."""

    path: Path
    kind: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        end = [f"problem: {p}" for p in self.problems] or ["nothing is wrong with it"]
        return "\n".join([f"{self.path}: {self.kind}", *(f"  {line}" for line in self.lines), *end])


def check(path: str | os.PathLike[str], config: Source | None = None, *, map: Map = map) -> Report:  # noqa: A002
    """Look at everything at `path`, pixels and samples included.

    `config` says how it is going to be read (`size`, `channels`, `length` …); without it the source is guessed and its
    defaults are tried.
    """
    where = Path(path).expanduser().absolute()
    if (where / "spec.json").is_file():
        return _check_prepared(where)
    if config is None:
        if not where.exists():
            return Report(where, "nothing", problems=[f"{where} does not exist; correct the path"])
        config = _guess(where)
    if config is None:
        known = "IDX, Parquet, npz, CSV, pictures, recordings"
        return Report(where, "unknown", problems=[f"{where} holds nothing that can be read; known are {known}"])
    plan = config.plan(seed=0, map=map, deep=True)
    report = Report(where, f"source: {config.source}", plan.lines, plan.problems)
    if plan.spec is not None and report.ok:
        levels = f"{plan.spec.levels} levels" if plan.spec.levels else "real numbers"
        report.lines.append(f"examples: {plan.spec.kind} {_times(plan.spec.shape)}, {levels}")
        counts: dict[str, int] = {}
        for part in plan.parts:
            counts[part.split or "no split of its own"] = (
                counts.get(part.split or "no split of its own", 0) + part.examples
            )
        report.lines.append("counts: " + ", ".join(f"{split} {count}" for split, count in counts.items()))
        if plan.class_names:
            report.lines.append(f"{len(plan.class_names)} classes: {', '.join(plan.class_names[:20])}")
    return report


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape)


def _check_prepared(where: Path) -> Report:
    report = Report(where, "a prepared data set")
    try:
        dataset = shards.open_dataset(where)
        report.lines += [
            f"{dataset.info['name']}, variant {dataset.info['variant']}, from {dataset.info['source']}",
            f"examples: {dataset.spec.kind} {_times(dataset.spec.shape)}",
            "counts: " + ", ".join(f"{split} {count}" for split, count in dataset.info["counts"].items()),
        ]
        shards.verify(where)
        for split in shards.SPLITS:
            dataset.split(split)
    except DataMismatch as problem:
        report.problems.append(str(problem))
    return report


def _guess(where: Path) -> Source | None:
    files = [where] if where.is_file() else [p for p in where.rglob("*") if p.is_file() and not p.name.startswith(".")]
    if any("idx" in p.name and ("images" in p.name or "labels" in p.name) for p in files):
        return parse({"source": "idx", "path": str(where)})
    found = {name: [p for p in files if p.suffix.lower() in suffixes] for name, suffixes in _SUFFIXES}
    name = max(found, key=lambda key: len(found[key]))
    if not found[name]:
        return None
    return parse({"source": name, "path": str(found[name][0] if name == "npz" else where)})
