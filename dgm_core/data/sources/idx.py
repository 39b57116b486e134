"""IDX files, the format of MNIST and its relatives: `train-images-idx3-ubyte` …, gzipped or not."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.data.sources.base import SPLIT_NAMES, Amount, Arrays, Map, Part, Plan, Source, label_problems

_SPLIT = re.compile(r"(?:^|[^a-z])(train|t10k|test|val|valid|validation)(?:[^a-z]|$)")


class Idx(Source):
    source: Literal["idx"] = "idx"
    val: Amount = Field(1 / 6, description="of MNIST's 60,000 training images: 10,000")
    classes: int | None = Field(None, ge=1, description="None: the highest label and those below it")

    def plan(self, *, seed: int, map: Map = map, deep: bool = False) -> Plan:  # noqa: A002
        plan = Plan()
        folder = self.located(plan)
        if folder is None:
            return plan
        images, labels = _find(folder, "images", plan), _find(folder, "labels", plan)
        if not images:
            plan.problems.append(f"{folder} has no file named *images*idx3*; correct `path`, or choose another source")
        shapes: dict[tuple[int, ...], Path] = {}
        given: dict[Path, np.ndarray] = {}
        for split, path in sorted(images.items(), key=lambda item: str(item[0])):
            try:
                shape = read(path).shape if deep else header(path)
                if len(shape) != 3:
                    raise DataMismatch(
                        f"{path} has {len(shape)} axes; images have 3 (number, height, width); replace it"
                    )
                shapes.setdefault(shape[1:], path)
                if labels and split not in labels:
                    raise DataMismatch(f"{path} has no labels beside it, other files have; add them, or remove all")
                if split in labels:
                    given[labels[split]] = y = read(labels[split])
                    if y.shape != shape[:1]:
                        raise DataMismatch(
                            f"{labels[split]} has {len(y)} labels for {shape[0]} images; fetch both again"
                        )
                plan.parts.append(Part(split, shape[0], (str(path), str(labels[split]) if split in labels else None)))
                plan.lines.append(f"{path.name}: {shape[0]} grey images of {shape[1]}×{shape[2]}")
            except DataMismatch as problem:
                plan.problems.append(str(problem))
        if len(shapes) > 1:
            told = ", ".join(f"{h}×{w} in {path}" for (h, w), path in shapes.items())
            plan.problems.append(f"images have {len(shapes)} sizes: {told}; keep those of one")
        if plan.problems:
            return plan
        highest = max((int(y.max()) for y in given.values()), default=-1)
        plan.class_names = [str(k) for k in range(self.classes or highest + 1)] if given else []
        for path, y in given.items():
            plan.problems += label_problems(str(path), y.astype(np.int64), plan.class_names)
        plan.spec = DataSpec("image", (1, *next(iter(shapes))), 256, classes=len(plan.class_names))
        return plan

    def decode(self, payload: Any) -> Arrays:
        images, labels = payload
        y = read(Path(labels)).astype(np.int64) if labels else None
        return Arrays(read(Path(images))[:, None], y)


def header(path: Path) -> tuple[int, ...]:
    """The shape that a file declares."""
    return _parsed(path, _content(path, 4 + 4 * 255))[0]


def read(path: Path) -> np.ndarray:
    """The whole array, uint8."""
    content = _content(path, -1)
    shape, start = _parsed(path, content)
    found = len(content) - start
    if found != math.prod(shape):
        state = "is cut off" if found < math.prod(shape) else "has bytes left over"
        raise DataMismatch(f"{path} {state}: {found} bytes of data, its header says {math.prod(shape)}; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _content(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            return file.read(size)
    except (EOFError, OSError, zlib.error) as error:
        raise DataMismatch(f"{path} is cut off or damaged ({error}); fetch it again") from error


def _parsed(path: Path, content: bytes) -> tuple[tuple[int, ...], int]:
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataMismatch(f"{path} is no IDX file: it does not begin with two zero bytes; replace or remove it")
    kind, axes = content[2], content[3]
    if kind != 0x08:
        raise DataMismatch(
            f"{path} holds values of IDX type 0x{kind:02x}; only unsigned bytes (0x08) are read; use npz"
        )
    if len(content) < 4 + 4 * axes:
        raise DataMismatch(f"{path} is cut off within its header; fetch it again")
    return tuple(int(n) for n in np.frombuffer(content, ">u4", count=axes, offset=4)), 4 + 4 * axes


def _find(folder: Path, what: str, plan: Plan) -> dict[str | None, Path]:
    """Split -> file."""
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    found: dict[str | None, Path] = {}
    for path in files:
        if path.is_file() and what in path.name and "idx" in path.name:
            word = _SPLIT.search(path.name.lower())
            split = SPLIT_NAMES[word.group(1)] if word else None
            if split in found:
                plan.problems.append(f"{path} and {found[split].name} are for the same split; keep one of them")
            found[split] = path
    return found
