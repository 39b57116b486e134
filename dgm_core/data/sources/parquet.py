"""Parquet files in the Hugging Face Hub's layout: a column of {bytes, path} pictures or recordings, and a label."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.data.sources import pictures, sounds
from dgm_core.data.sources.base import SPLIT_NAMES, Arrays, Map, Part, Plan, Source, chunks, label_problems
from dgm_core.data.sources.files import class_lines
from dgm_core.data.sources.pictures import Item, PictureOptions
from dgm_core.data.sources.sounds import SoundOptions

_ROWS = 512  # a part is a slice of a row group, for row groups can be large,
_READS = 8  # but not so small that reading the group for every slice costs more than decoding


class Place(NamedTuple):
    """Some rows of a row group."""

    file: str
    group: int
    start: int
    stop: int


@dataclass
class Columns:
    """What the schema says."""

    media: str
    what: Literal["image", "audio"]
    label: str | None
    names: list[str] = field(default_factory=list)


class Parquet(Source, PictureOptions, SoundOptions):
    source: Literal["parquet"] = "parquet"
    column: str | None = Field(None, description="pictures or recordings; None: the one there is")
    label: str | None = Field("label", description="class column; None: leave labels out")

    def plan(self, *, seed: int, map: Map = map, deep: bool = False) -> Plan:  # noqa: A002
        plan = Plan()
        folder = self.located(plan)
        if folder is None:
            return plan
        files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder]
        if not files:
            plan.problems.append(f"{folder} has no .parquet file; correct `path`, or choose another source")
            return plan
        try:
            columns = _columns(files, self)
            places = [place for file in files for place in _places(file)]
        except DataMismatch as problem:
            plan.problems.append(str(problem))
            return plan
        looks, labels = [], []
        for found, some in map(partial(_look, columns=columns, options=self, deep=deep), places):
            looks += found
            labels.append(some)
        plan.lines.append(
            f"{len(looks)} {'pictures' if columns.what == 'image' else 'recordings'} in {len(files)} files"
        )
        if columns.label:
            self._settle_labels(places, labels, columns, plan)
        if columns.what == "image":
            shape = pictures.settle(looks, self, plan)
            counts: list[int] = [1] * len(looks)
            rate = 0
        else:
            rate, counts = sounds.settle(looks, self, plan)
            shape = (self.length or 0,)
            plan.facts["sample_rate"] = rate
        if plan.problems or shape is None:
            return plan
        classes = len(plan.class_names)
        plan.spec = (
            DataSpec("image", shape, 256, classes) if len(shape) == 3 else DataSpec("audio", shape, None, classes)
        )
        before = 0
        for place, some in zip(places, labels, strict=True):
            here = counts[before : before + place.stop - place.start]
            y = [plan.class_names.index(v) if isinstance(v, str) else v for v in some] if classes else None
            groups = tuple(before + row for row, count in enumerate(here) for _ in range(count))
            payload = (place, columns, here, y, shape, rate)
            if groups:
                plan.parts.append(
                    Part(_split_of(place.file), len(groups), payload, groups if columns.what == "audio" else None)
                )
            before += len(here)
        return plan

    def decode(self, payload: Any) -> Arrays:
        place, columns, counts, labels, shape, rate = payload
        items, _ = _read(place, columns)
        keep = [row for row, count in enumerate(counts) if count]
        y = None if labels is None else np.repeat(np.asarray(labels, np.int64), counts)
        items, counts = [items[row] for row in keep], [counts[row] for row in keep]
        if columns.what == "image":
            return Arrays(pictures.decode(items, shape, self), y)
        return Arrays(sounds.decode(items, counts, rate, self), y)

    def _settle_labels(self, places: list[Place], labels: list[list[Any]], columns: Columns, plan: Plan) -> None:
        flat = [value for some in labels for value in some]
        if any(value is None for value in flat):
            where = next(p.file for p, some in zip(places, labels, strict=True) if None in some)
            plan.problems.append(f"{where}: a label is missing; fill it in, or give `label: null`")
            return
        if any(isinstance(value, str) for value in flat):
            plan.class_names = sorted({str(value) for value in flat})
            plan.lines += class_lines([plan.class_names.index(str(v)) for v in flat], plan.class_names)
            return
        plan.class_names = columns.names or [str(k) for k in range(max(flat) + 1)]
        for place, some in zip(places, labels, strict=True):
            where = f"{place.file}, row group {place.group} from row {place.start}"
            plan.problems += label_problems(where, np.asarray(some, np.int64), plan.class_names)
        plan.lines += class_lines(flat, plan.class_names)


def _columns(files: Sequence[Path], options: Parquet) -> Columns:
    schema = _opened(files[0]).schema_arrow
    for file in files[1:]:
        if _opened(file).schema_arrow.names != schema.names:
            raise DataMismatch(f"{file} has other columns than {files[0]}; give each data set its own folder")
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    media = [f.name for f in schema if _is_media(f.type)]
    if options.column:
        if options.column not in media:
            raise DataMismatch(
                f"{files[0]} has no media column {options.column!r}; it has {', '.join(media) or 'none'}"
            )
        media = [options.column]
    if len(media) != 1:
        told = ", ".join(media) or f"none among {', '.join(schema.names)}"
        raise DataMismatch(
            f"{files[0]}: one column of pictures or recordings is needed, there is {told}; give `column`"
        )
    kind = str(features.get(media[0], {}).get("_type", "")).lower() or ("audio" if "audio" in media[0] else "image")
    label = options.label if options.label in schema.names else None
    if options.label and label is None and options.label != Parquet.model_fields["label"].default:
        raise DataMismatch(f"{files[0]} has no column {options.label!r}; it has {', '.join(schema.names)}")
    names = features.get(label, {}).get("names", []) if label else []
    return Columns(media[0], "audio" if kind == "audio" else "image", label, [str(n) for n in names])


def _is_media(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _places(file: Path) -> list[Place]:
    metadata = _opened(file).metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return [
        Place(str(file), group, rows[0], rows[-1] + 1)
        for group, size in enumerate(sizes)
        for rows in chunks(range(size), max(_ROWS, -(-size // _READS)))
    ]


def _opened(file: Path | str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise DataMismatch(f"{file} cannot be read as Parquet ({error}); fetch it again") from error


def _read(place: Place, columns: Columns) -> tuple[list[Item], list[Any]]:
    names = [columns.media, *([columns.label] if columns.label else [])]
    try:
        table = (
            _opened(place.file).read_row_group(place.group, columns=names).slice(place.start, place.stop - place.start)
        )
    except (OSError, pa.ArrowException) as error:
        raise DataMismatch(f"{place.file}, row group {place.group}, is damaged ({error}); fetch it again") from error
    items = []
    for row, value in enumerate(table[columns.media].to_pylist()):
        given = value if isinstance(value, dict) else {"bytes": value, "path": None}
        path = given.get("path")
        name = f"{place.file}, row group {place.group}, row {place.start + row}" + (f" ({path})" if path else "")
        data = given["bytes"]
        if data is None and path:
            data = str(Path(place.file).parent / path)
        items.append(Item(name, b"" if data is None else data))
    return items, table[columns.label].to_pylist() if columns.label else []


def _look(place: Place, columns: Columns, options: Parquet, deep: bool) -> tuple[list[Any], list[Any]]:
    items, labels = _read(place, columns)
    if columns.what == "image":
        return [pictures.look(item, options, deep) for item in items], labels
    return [sounds.look(item, deep) for item in items], labels


def _split_of(file: str) -> str | None:
    for part in (Path(file).name, Path(file).parent.name):
        word = re.split(r"[^a-z0-9]", part.lower())[0]
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None
