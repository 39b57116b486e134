"""What every source of data says of itself: a configuration, a plan of parts, and how one part is decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from pydantic import AfterValidator, Field

from dgm_core.config import Strict
from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.data.shards import SHARD_BYTES
from dgm_core.data.transforms import Transforms

A = TypeVar("A")
B = TypeVar("B")

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "t10k": "test",
}  # fmt: skip


class Map(Protocol):
    """The builtin `map`, or one that spreads the work over machines; results come in the order of the inputs."""

    def __call__(self, f: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]: ...


class Arrays(NamedTuple):
    """Decoded examples: x as the plan's spec says, labels and contexts beside it."""

    x: np.ndarray
    y: np.ndarray | None = None
    context: dict[str, np.ndarray] = {}


@dataclass(frozen=True)
class Part:
    """A share of a source that one worker decodes: plain data, pickled to wherever the worker is."""

    split: str | None  # None where the source has no splits of its own
    examples: int
    payload: Any
    groups: tuple[int, ...] | None = None  # per example: crops of one recording stay in one split


@dataclass
class Plan:
    """What a source holds, found without decoding it. With `problems` nothing may be written."""

    parts: list[Part] = field(default_factory=list)
    spec: DataSpec | None = None
    class_names: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # goes into info.json
    lines: list[str] = field(default_factory=list)  # what a person should know of it
    problems: list[str] = field(default_factory=list)  # what is wrong, where, and how to mend it

    def refuse(self) -> None:
        """Raise if anything is wrong."""
        refuse(self.problems)


def refuse(problems: Sequence[str], shown: int = 10) -> None:
    """Raise `DataMismatch` with the first of the problems, and how many more there are."""
    if problems:
        more = [f"… and {len(problems) - shown} more"] if len(problems) > shown else []
        raise DataMismatch("\n".join([*problems[:shown], *more]))


def _share(value: float) -> float:
    if value != int(value) and not 0 < value < 1:
        raise ValueError("give a share between 0 and 1, or a whole number of examples")
    return value


Amount = Annotated[float, Field(gt=0), AfterValidator(_share)]  # below 1: a share; from 1: so many examples


class Source(Strict, ABC):
    """Where data comes from, and the variant to make of it."""

    source: Any  # each source's own literal
    path: str = Field("", description="file or folder")
    val: Amount = Field(0.1, description="share or number of examples carved out if the source has no such split")
    test: Amount = Field(0.1, description="as `val`")
    transform: Transforms = Field((), description="named variant: a transform, or several in order")
    shard_bytes: int = Field(SHARD_BYTES, ge=1, description="size from which a shard is written out")

    @abstractmethod
    def plan(self, *, seed: int, map: Map = map, deep: bool = False) -> Plan:  # noqa: A002
        """Look at everything, decode nothing. `deep` decodes too, to find files that are cut off."""

    @abstractmethod
    def decode(self, payload: Any) -> Arrays:
        """One part's examples; a pure function of this configuration and the payload."""

    def located(self, plan: Plan) -> Path | None:
        """The absolute path, or None and a problem where there is nothing."""
        if not self.path:
            plan.problems.append(f"source {self.source!r} needs `path`: a file or folder")
            return None
        path = Path(self.path).expanduser().absolute()
        if not path.exists():
            plan.problems.append(f"{path} does not exist; correct `path` (it is relative to {Path.cwd()})")
            return None
        return path

    def embedded(self, plan: Plan) -> None:
        """For sources that need no file."""
        if self.path:
            plan.problems.append(f"source {self.source!r} comes from no file; leave `path` empty")


def chunks(items: Sequence[A], size: int) -> list[Sequence[A]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def label_problems(where: str, labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Labels that name no class."""
    bad = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if not len(bad):
        return []
    return [
        f"{where}: label {labels[bad[0]]} of example {bad[0]} is out of range ({len(bad)} such); "
        f"with {len(names)} classes labels are 0 … {len(names) - 1}: correct the labels, or give `classes`"
    ]
