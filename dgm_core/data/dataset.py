"""Prepared data sets, memory-mapped: `spec.json` and `info.json` beside Arrow shards that `shards.py` wrote.

Readers share the page cache and copy only the rows they ask for; nothing here grows with the number of examples.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.data import noise


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Map a prepared data set; a missing or cut-off file is refused by name."""
    folder = Path(path)
    try:
        spec = DataSpec.from_dict(json.loads((folder / "spec.json").read_text()))
        info = json.loads((folder / "info.json").read_text())
    except FileNotFoundError as error:
        raise DataMismatch(
            f"{folder} is no prepared data set ({error.filename} is missing); prepare it first"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataMismatch(f"{folder} has a damaged spec.json or info.json ({error}); prepare it again") from error
    for name, facts in info["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != facts["bytes"]:
            have = "is missing" if found is None else f"has {found} bytes instead of {facts['bytes']}"
            raise DataMismatch(f"{folder / name} {have}; prepare the data set again")
    return Dataset(folder, spec, info)


def verify(path: str | os.PathLike[str]) -> None:
    """Compare every shard with its recorded SHA-256; raise `DataMismatch` naming all that differ."""
    dataset = open_dataset(path)
    bad = [name for name, digest in dataset.info["sha256"].items() if sha256(dataset.path / name) != digest]
    if bad:
        raise DataMismatch(
            f"{dataset.path}: {', '.join(bad)} changed since they were written; prepare the data set again"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Dataset:
    """A prepared data set: where it is, what a model needs to know of it, and everything else worth knowing."""

    path: Path
    spec: DataSpec
    info: dict[str, Any]
    _splits: dict[str, Split] = field(default_factory=dict, repr=False, compare=False)

    def split(self, name: str) -> Split:
        """ "train", "val" or "test"."""
        if name not in self.info["counts"]:
            raise DataMismatch(f"{self.path} has no split {name!r}; it has {', '.join(self.info['counts'])}")
        if name not in self._splits:
            self._splits[name] = Split(self, name)
        return self._splits[name]

    @property
    def fingerprint(self) -> str:
        """One digest of the shards and the spec: equal contents, equal fingerprint."""
        whole = json.dumps([self.info["sha256"], self.spec.to_dict()], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:  # maps do not travel between processes; the path does
        return open_dataset, (str(self.path),)


class Split:
    """The examples of one split. Holds maps of the files, nothing that grows with the number of examples."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self.dataset, self.name, self.spec = dataset, name, dataset.spec
        dynamic = [t for t in dataset.info.get("transforms", ()) if t["name"] == "dynamic"]
        self._grey_levels: int | None = dynamic[0]["levels"] if dynamic else None
        files = sorted(f for f in dataset.info["files"] if f.rsplit("-", 1)[0] == name)
        self._shards = [_map_shard(dataset.path / f) for f in files]
        self._starts = np.cumsum([0] + [len(shard["x"]) for shard in self._shards])
        if len(self) != dataset.info["counts"][name]:
            raise DataMismatch(
                f"{dataset.path}: {name} has {len(self)} examples, info.json says otherwise; prepare it again"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray, *, draw: tuple[int, ...] = (noise.PASS, 0)) -> Batch:
        """The examples at `indices`, in that order, as CPU tensors of the spec's shape and dtype.

        Where the variant is dynamic binarisation, `draw` is the noise's key: the same key, the same draw of an example.
        """
        batch = self.stored(indices)
        if self._grey_levels is None:
            return batch
        assert batch.index is not None
        x = noise.bernoulli(draw, batch.index.numpy(), batch.x.numpy(), self._grey_levels)
        return batch._replace(x=torch.from_numpy(x))

    def stored(self, indices: np.ndarray) -> Batch:
        """As `rows`, but without the draw: the grey values under dynamic binarisation."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"{self.name} has {len(self)} examples; asked for {indices.min()} … {indices.max()}")
        x = self._gather("x", indices).reshape(len(indices), *self.spec.shape)
        y = torch.from_numpy(self._gather("y", indices)) if self.spec.classes else None
        context = {
            name: torch.from_numpy(self._gather(column(name), indices).reshape(len(indices), *spec.shape))
            for name, spec in self.spec.context.items()
        }
        return Batch(torch.from_numpy(x), y, context, torch.from_numpy(indices.copy()))

    def _gather(self, column: str, indices: np.ndarray) -> np.ndarray:
        if len(self._shards) == 1:
            return self._shards[0][column].take(indices, axis=0)
        like = self._shards[0][column]
        result = np.empty((len(indices), *like.shape[1:]), like.dtype)
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shard_of):
            here = shard_of == shard
            result[here] = self._shards[shard][column].take(indices[here] - self._starts[shard], axis=0)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.dataset.path), self.name)


def _reopen(path: str, name: str) -> Split:
    return open_dataset(path).split(name)


def column(context: str) -> str:
    return f"context.{context}"


def _map_shard(path: Path) -> dict[str, np.ndarray]:
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path), "r")).get_batch(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataMismatch(f"{path} cannot be read as an Arrow file ({error}); prepare the data set again") from error
    views = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if isinstance(column, pa.FixedSizeListArray):
            views[name] = column.values.to_numpy(zero_copy_only=True).reshape(-1, column.type.list_size)
        else:
            views[name] = column.to_numpy(zero_copy_only=True)
    return views
