"""Data sets on disk: uncompressed Arrow IPC shards, memory-mapped, with `spec.json` and `info.json` beside them.

A shard holds one record batch: `x` as a fixed-size list (uint8, int64 or float32), `y` (int64) where there are labels,
and one fixed-size list a context. A data set is written into a sibling folder, flushed to disk and renamed, so that it
is there whole or not at all. Reading (`dataset.py`) is offered from here too.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch

from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.data.dataset import Dataset, Split, column, open_dataset, sha256, verify

SPLITS = ("train", "val", "test")
SHARD_BYTES = 64 * 2**20

__all__ = ["Dataset", "ShardWriter", "Split", "open_dataset", "verify", "write_dataset"]


class ShardWriter:
    """Write a data set whole or not at all.

    Use as a context: `add` arrays to splits, `finish` once at the end. Leaving without `finish`, or by an error,
    removes everything written. `info` given to `finish` is completed with counts, files and checksums.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: DataSpec,
        *,
        grey_levels: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """`grey_levels`: of what is stored, where the spec's binary values are drawn from it batch by batch."""
        self.path, self.spec, self.shard_bytes = Path(path).absolute(), spec, shard_bytes
        stored = replace(spec, levels=grey_levels) if grey_levels else spec
        self._stored = {"x": stored, **{column(name): given for name, given in spec.context.items()}}
        self._pending: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in SPLITS}
        self._files: dict[str, dict[str, int]] = {}
        self._class_counts = {name: np.zeros(spec.classes, np.int64) for name in SPLITS}
        self._aside = self.path.with_name(f".{self.path.name}.partial-{socket.gethostname()}-{os.getpid()}")

    def __enter__(self) -> Self:
        ours = (self.path / "spec.json").is_file() or (self.path.is_dir() and not any(self.path.iterdir()))
        if self.path.exists() and not ours:
            raise DataMismatch(
                f"{self.path} exists and is no prepared data set, so it is left alone; give another folder"
            )
        with self._writing():
            _sweep(self._aside)
            self._aside.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._aside, ignore_errors=True)

    def add(
        self, split: str, x: np.ndarray, y: np.ndarray | None = None, context: Mapping[str, np.ndarray] = {}
    ) -> None:
        """Append examples to a split; what does not fit the spec is refused."""
        if split not in SPLITS:
            raise DataMismatch(f"split {split!r} is not known; accepted: {', '.join(SPLITS)}")
        given = {"x": x, **{column(name): values for name, values in context.items()}}
        if given.keys() != self._stored.keys():
            raise DataMismatch(f"columns {sorted(given)} were given, the spec has {sorted(self._stored)}")
        columns = {name: _checked(name, values, self._stored[name], len(x)) for name, values in given.items()}
        if (y is not None) != (self.spec.classes > 0):
            raise DataMismatch(f"the spec has {self.spec.classes} classes, labels were {'not ' * (y is None)}given")
        if y is not None:
            y = np.ascontiguousarray(y, dtype=np.int64)
            if y.shape != (len(x),) or (len(y) and not 0 <= y.min() <= y.max() < self.spec.classes):
                raise DataMismatch(f"labels must be ({len(x)},) numbers in 0 … {self.spec.classes - 1}")
            columns["y"] = y
            self._class_counts[split] += np.bincount(y, minlength=self.spec.classes)
        self._pending[split].append(columns)
        if sum(array.nbytes for part in self._pending[split] for array in part.values()) >= self.shard_bytes:
            self._flush(split)

    def finish(self, info: Mapping[str, Any]) -> Dataset:
        """Write what is left, `spec.json` and `info.json`; put the folder in its place."""
        for split in SPLITS:
            self._flush(split)
        counts = {s: sum(f["examples"] for n, f in self._files.items() if n.startswith(f"{s}-")) for s in SPLITS}
        if not all(counts.values()):
            empty = ", ".join(name for name, count in counts.items() if not count)
            raise DataMismatch(f"no example fell to {empty}: more data is needed, or other shares for val and test")
        spec, completed = self.spec, {**info, "counts": counts, "files": self._files}
        if spec.classes:
            completed["class_counts"] = {name: c.tolist() for name, c in self._class_counts.items()}
            spec = replace(spec, class_shares=tuple(self._class_counts["train"] / counts["train"]))
        with self._writing():
            completed["sha256"] = {name: sha256(self._aside / name) for name in self._files}
            for name, value in (("spec.json", spec.to_dict()), ("info.json", completed)):
                (self._aside / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
            for file in (*self._aside.iterdir(), self._aside):
                _fsync(file)
            self._swap_in()
            _fsync(self.path.parent)
        return open_dataset(self.path)

    def _swap_in(self) -> None:
        if not self.path.exists():
            self._aside.rename(self.path)
            return
        old = self._aside.with_name(self._aside.name + "-old")
        self.path.rename(old)
        try:
            self._aside.rename(self.path)
        except OSError:
            old.rename(self.path)
            raise
        shutil.rmtree(old)

    def _flush(self, split: str) -> None:
        if not any(len(part["x"]) for part in self._pending[split]):
            return
        columns, arrays = {n: np.concatenate([p[n] for p in self._pending[split]]) for n in self._pending[split][0]}, {}
        for name, values in columns.items():
            flat = pa.array(values.reshape(-1))
            arrays[name] = flat if name == "y" else pa.FixedSizeListArray.from_arrays(flat, self._stored[name].dims)
        batch = pa.record_batch(list(arrays.values()), names=list(arrays))
        number = sum(name.startswith(f"{split}-") for name in self._files)
        file = self._aside / f"{split}-{number:05d}.arrow"
        with self._writing():
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            self._files[file.name] = {"examples": len(columns["x"]), "bytes": file.stat().st_size}
        self._pending[split] = []

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full" if full else (error.strerror or str(error))
            mend = "free some space, or give a folder on another disk" if full else "mend that"
            raise OSError(
                error.errno, f"{self.path} was not written: {why}. Nothing half-written is kept; {mend}."
            ) from error


def _checked(name: str, values: np.ndarray, spec: DataSpec, count: int) -> np.ndarray:
    want = torch.empty(0, dtype=spec.dtype).numpy().dtype
    if values.dtype != want or values.shape != (count, *spec.shape):
        raise DataMismatch(f"{name} is {values.dtype} {values.shape}; the spec says {want} {(count, *spec.shape)}")
    if spec.levels is None and not np.isfinite(values).all():
        raise DataMismatch(f"{name} holds NaN or infinite values; remove them, or say which are missing")
    _check_levels(name, values, spec)
    return np.ascontiguousarray(values)


def _check_levels(name: str, values: np.ndarray, spec: DataSpec) -> None:
    if spec.levels is not None and values.size and not 0 <= values.min() <= values.max() < spec.levels:
        raise DataMismatch(f"{name} holds {values.min()} … {values.max()}; the spec's values are 0 … {spec.levels - 1}")


def _sweep(aside: Path) -> None:
    """Remove what writers of the same data set left on this machine when they were killed."""
    prefix = aside.name.rsplit("-", 1)[0]
    for left in aside.parent.iterdir() if aside.parent.is_dir() else ():
        pid = left.name.removeprefix(f"{prefix}-").split("-")[0]
        if left.name.startswith(f"{prefix}-") and pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_dataset(
    path: str | os.PathLike[str],
    spec: DataSpec,
    splits: Mapping[str, Iterable[Batch]],
    info: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Dataset:
    """Store batches as a data set like any other (codes with their context, for example)."""
    with ShardWriter(path, spec, shard_bytes=shard_bytes) as writer:
        for split, batches in splits.items():
            for batch in batches:
                y = batch.y.cpu().numpy() if spec.classes and batch.y is not None else None
                context = {name: _as_stored(name, batch.context[name], s) for name, s in spec.context.items()}
                writer.add(split, _as_stored("x", batch.x, spec), y, context)
        return writer.finish(
            {
                "name": Path(path).name,
                "source": "written",
                "variant": "plain",
                "original": spec.to_dict(),
                "transforms": [],
                "class_names": [],
                **info,
            }
        )


def _as_stored(name: str, values: torch.Tensor, spec: DataSpec) -> np.ndarray:
    array = values.detach().cpu()
    _check_levels(name, array.numpy(), spec)  # before the cast, which would wrap around
    return array.to(spec.dtype).numpy()
