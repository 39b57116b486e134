"""A NumPy archive: `x` (and `y`), or `x_train`, `x_test` … as Keras and MedMNIST name them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.data.sources.base import SPLIT_NAMES, Arrays, Map, Part, Plan, Source, label_problems


class Npz(Source):
    source: Literal["npz"] = "npz"
    x: str | None = Field(None, description="name of the data; None: x, images or data")
    y: str | None = Field(None, description="name of the labels; None: y, labels or label, if there is one")
    kind: Literal["image", "audio", "codes", "vector"] | None = Field(None, description="None: as the arrays suggest")
    levels: int | None = Field(None, ge=2, description="of integers; None: 256 for uint8")
    classes: int | None = Field(None, ge=1, description="None: the highest label and those below it")
    rate: int | None = Field(None, gt=0, description="of audio: samples a second")

    def plan(self, *, seed: int, map: Map = map, deep: bool = False) -> Plan:  # noqa: A002
        plan = Plan()
        path = self.located(plan)
        if path is None:
            return plan
        try:
            self._plan(path, plan)
        except DataMismatch as problem:
            plan.problems.append(str(problem))
        return plan

    def _plan(self, path: Path, plan: Plan) -> None:
        with _opened(path) as archive:
            names = archive.files
        data = _by_split(names, [self.x] if self.x else ["x", "X", "images", "data", "arr_0"])
        labels = _by_split(names, [self.y] if self.y else ["y", "Y", "labels", "label"])
        if not data or (self.y and not labels):
            wanted = (self.x or "x") if not data else self.y
            raise DataMismatch(
                f"{path} has no array {wanted!r}; it has {', '.join(names)}: give their names as `x`, `y`"
            )
        if labels and labels.keys() != data.keys():
            raise DataMismatch(f"{path}: {', '.join(data.values())} and {', '.join(labels.values())} do not pair up")
        highest, found_labels = -1, {}
        for split, name in data.items():
            x, spec = self._array(path, name)
            if plan.spec is not None and spec != plan.spec:
                raise DataMismatch(
                    f"{path}: {name} has examples of {spec.shape}, others of {plan.spec.shape}; keep one shape"
                )
            plan.spec = spec
            if split in labels:
                y = found_labels[labels[split]] = _labels(path, labels[split], len(x))
                highest = max(highest, int(y.max(initial=-1)))
            plan.parts.append(Part(split, len(x), (str(path), name, labels.get(split))))
            plan.lines.append(f"{name}: {x.dtype} {x.shape}")
        if labels and plan.spec is not None:
            plan.class_names = [str(k) for k in range(self.classes or highest + 1)]
            for name, y in found_labels.items():
                plan.problems += label_problems(f"{path}, {name}", y, plan.class_names)
            plan.spec = DataSpec(plan.spec.kind, plan.spec.shape, plan.spec.levels, len(plan.class_names))
        if plan.spec is not None and plan.spec.kind == "audio" and self.rate:
            plan.facts["sample_rate"] = self.rate

    def decode(self, payload: Any) -> Arrays:
        path, name, label = payload
        x, _ = self._array(Path(path), name)
        return Arrays(x, None if label is None else _labels(Path(path), label, len(x)))

    def _array(self, path: Path, name: str) -> tuple[np.ndarray, DataSpec]:
        """The array as stored in shards, and its spec without classes."""
        x = _load(path, name)
        kind, levels = self.kind, self.levels
        integer = x.dtype.kind in "iub"
        if kind is None and x.dtype == np.uint8 and x.ndim in (3, 4):
            kind = "image"
        if kind is None and not integer and x.ndim == 2:
            kind = "vector"
        if integer and levels is None:
            levels = 256 if x.dtype == np.uint8 else 2 if x.dtype == np.bool_ else None
        if kind is None or (integer and levels is None) or x.dtype.kind not in "iubf":
            raise DataMismatch(
                f"{path}: {name} is {x.dtype} {x.shape}; give `kind` (image, audio, codes, vector), and `levels` for "
                "integers; values are numbers"
            )
        if not integer:
            levels = None
        if not len(x):
            raise DataMismatch(f"{path}: {name} is empty; put examples in, or remove it")
        if levels is not None and not 0 <= x.min() <= x.max() < levels:
            raise DataMismatch(
                f"{path}: {name} holds {x.min()} … {x.max()}; with {levels} levels values are 0 … {levels - 1}"
            )
        if levels is None and not np.isfinite(x).all():
            bad = int(np.argwhere(~np.isfinite(x))[0][0])
            raise DataMismatch(f"{path}: {name} holds NaN or infinite values, first in example {bad}; remove them")
        if kind == "image":
            x = _channels_first(x)
        try:
            spec = DataSpec(kind, x.shape[1:], levels)
        except DataMismatch as problem:
            raise DataMismatch(f"{path}: {name} is {x.dtype} {x.shape}; {problem}") from problem
        return x.astype(np.float32 if levels is None else np.uint8 if levels <= 256 else np.int64), spec


def _opened(path: Path) -> Any:
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataMismatch(f"{path} cannot be read as a NumPy archive ({error}); write it with numpy.savez") from error
    if isinstance(archive, np.ndarray):
        raise DataMismatch(f"{path} holds a single array; write it with numpy.savez(file, x=…, y=…)")
    return archive


def _load(path: Path, name: str) -> np.ndarray:
    try:
        with _opened(path) as archive:
            return archive[name]
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, DataMismatch):
            raise
        raise DataMismatch(f"{path}: {name} is damaged, or holds objects ({error}); store plain numbers") from error


def _labels(path: Path, name: str, count: int) -> np.ndarray:
    y = _load(path, name)
    if y.dtype.kind not in "iu" or y.size != count:
        raise DataMismatch(f"{path}: {name} is {y.dtype} {y.shape}; {count} integer labels are needed")
    return y.reshape(-1).astype(np.int64)


def _by_split(names: list[str], wanted: list[str]) -> dict[str | None, str]:
    """Split -> array name, for the first of the wanted names that is there."""
    for base in wanted:
        if base in names:
            return {None: base}
        found: dict[str | None, str] = {}
        for word, split in SPLIT_NAMES.items():
            for name in (f"{base}_{word}", f"{word}_{base}"):
                if name in names:
                    found[split] = name
        if found:
            return found
    return {}


def _channels_first(x: np.ndarray) -> np.ndarray:
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        return np.moveaxis(x, 3, 1)
    return x
