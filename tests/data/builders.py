"""Small files of every format, and shorthands."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from PIL import Image

from dgm_core.contract import Batch, DataSpec
from dgm_core.data.prepare import prepare
from dgm_core.data.shards import Dataset, write_dataset
from dgm_core.data.sources import parse

RATE = 8000


def prepared(out: Path, seed: int = 0, **config: Any) -> Dataset:
    return prepare(parse(config), out, name="test", seed=seed)


def everything(dataset: Dataset) -> Batch:
    """All three splits, train first."""
    batches = [dataset.split(s).stored(np.arange(len(dataset.split(s)))) for s in ("train", "val", "test")]
    y = torch.cat([b.y for b in batches if b.y is not None]) if batches[0].y is not None else None
    context = {k: torch.cat([b.context[k] for b in batches]) for k in batches[0].context}
    return Batch(torch.cat([b.x for b in batches]), y, context)


def rows_of(x: Any) -> list[bytes]:
    """Examples as a sorted list, to be compared as multisets."""
    return sorted(np.ascontiguousarray(row).tobytes() for row in np.asarray(x))


def greys(n: int, side: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side), np.uint8)


def numbered(path: Path, train: int = 50, shard_bytes: int = 10**9) -> Dataset:
    """Codes whose value is the example's number, labels its parity, and a context."""
    spec = DataSpec("codes", (2, 2), 1000, classes=2, context={"top": DataSpec("codes", (1, 1), 7)})

    def batch(n: int) -> Batch:
        number = torch.arange(n)
        x = number[:, None, None].expand(n, 2, 2)
        return Batch(x, number % 2, {"top": (number % 7)[:, None, None]})

    splits = {"train": [batch(train).rows(slice(0, 20)), batch(train).rows(slice(20, None))], "val": [batch(10)]}
    return write_dataset(path, spec, {**splits, "test": [batch(10)]}, {"name": "numbered"}, shard_bytes=shard_bytes)


def idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def png(array: np.ndarray, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, "PNG", **options)
    return sink.getvalue()


def folder_of_images(root: Path, classes: int = 2, each: int = 10, side: int = 6) -> dict[str, np.ndarray]:
    stored = {}
    for k in range(classes):
        name = f"class{k}"
        (root / name).mkdir(parents=True)
        stored[name] = greys(each, side, seed=k)
        for i, image in enumerate(stored[name]):
            (root / name / f"{i}.png").write_bytes(png(image))
    return stored


def wave(frames: int, seed: int = 0) -> np.ndarray:
    """Values that 16-bit PCM stores exactly."""
    return np.random.default_rng(seed).integers(-(2**15), 2**15, frames).astype(np.float32) / 2**15


def wav(array: np.ndarray, rate: int = RATE) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, array, rate, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def hub_parquet(path: Path, kind: str, data: list[bytes], labels: list[int], names: list[str]) -> None:
    feature = {"_type": kind.capitalize()}
    info = {"info": {"features": {kind: feature, "label": {"names": names, "_type": "ClassLabel"}}}}
    media = pa.array([{"bytes": d, "path": f"{i}.bin"} for i, d in enumerate(data)])
    table = pa.table({kind: media, "label": pa.array(labels, pa.int64())})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path, row_group_size=7)
