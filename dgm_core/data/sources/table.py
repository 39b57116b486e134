"""Comma-separated values: one example a line, numbers in columns; a file, or a folder with train.csv, test.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from pydantic import Field

from dgm_core.contract import OBSERVED, DataMismatch, DataSpec
from dgm_core.data.sources.base import SPLIT_NAMES, Arrays, Map, Part, Plan, Source
from dgm_core.data.sources.files import class_lines


class Csv(Source):
    source: Literal["csv"] = "csv"
    label: str | None = Field(None, description="column of class labels, numbers or words")
    drop: tuple[str, ...] = Field((), description="columns to leave out")
    missing: Literal["refuse", "allow"] = Field("refuse", description="allow: context `observed` says what is there")
    levels: int | None = Field(None, ge=2, description="of integers 0 … levels − 1; None: real numbers")
    delimiter: str = Field(",", min_length=1, max_length=1)
    header: bool = Field(True, description="the first line names the columns; else they are f0, f1 …")

    def plan(self, *, seed: int, map: Map = map, deep: bool = False) -> Plan:  # noqa: A002
        plan = Plan()
        path = self.located(plan)
        if path is None:
            return plan
        files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
        splits = {SPLIT_NAMES.get(f.stem.lower()): f for f in files}
        if not files or (len(files) > 1 and (None in splits or len(splits) < len(files))):
            found = ", ".join(f.name for f in files) or "none"
            plan.problems.append(
                f"{path}: files are named train.csv, val.csv, test.csv; found {found}: rename, or give one"
            )
            return plan
        tables: dict[str | None, pa.Table] = {}
        for split, file in splits.items():
            try:
                tables[split] = self._read(file)
                self._check(file, tables[split], next(iter(tables.values())).column_names, plan)
            except DataMismatch as problem:
                plan.problems.append(str(problem))
        if plan.problems:
            return plan
        first = tables.get("train", next(iter(tables.values())))
        columns = [c for c in first.column_names if c != self.label and c not in self.drop]
        if self.label:
            self._settle_labels(splits, tables, first, plan)
        for split, file in splits.items():
            missing = sum(tables[split][c].null_count for c in columns)
            plan.parts.append(Part(split, len(tables[split]), (str(file), columns, plan.class_names)))
            plan.lines.append(
                f"{file.name}: {len(tables[split])} lines, {len(columns)} columns, {missing} values missing"
            )
        mask = {OBSERVED: DataSpec("vector", (len(columns),), 2)} if self.missing == "allow" else {}
        plan.spec = DataSpec("vector", (len(columns),), self.levels, len(plan.class_names), context=mask)
        plan.facts["columns"] = columns
        return plan

    def decode(self, payload: Any) -> Arrays:
        file, columns, class_names = payload
        table = self._read(Path(file))
        x = np.stack([_numbers(table[name]) for name in columns], axis=1)
        observed = ~np.isnan(x)
        x = np.where(observed, x, 0)
        y = None
        if self.label:
            number = {name: k for k, name in enumerate(class_names)}
            y = np.asarray([number[str(value)] for value in table[self.label].to_pylist()], np.int64)
        context = {OBSERVED: observed.astype(np.uint8)} if self.missing == "allow" else {}
        dtype = np.float32 if self.levels is None else np.uint8 if self.levels <= 256 else np.int64
        return Arrays(x.astype(dtype), y, context)

    def _read(self, file: Path) -> pa.Table:
        try:
            return pacsv.read_csv(
                file,
                read_options=pacsv.ReadOptions(autogenerate_column_names=not self.header),
                parse_options=pacsv.ParseOptions(delimiter=self.delimiter),
                convert_options=pacsv.ConvertOptions(strings_can_be_null=True),
            )
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataMismatch(
                f"{file} cannot be read ({error}); mend that line, or `delimiter`, or `header`"
            ) from error

    def _check(self, file: Path, table: pa.Table, names: list[str], plan: Plan) -> None:
        known = f"it has {', '.join(table.column_names)}"
        if table.column_names != names:
            raise DataMismatch(f"{file} has other columns than the file before it: {known}; give all files the same")
        for name in (*self.drop, *([self.label] if self.label else [])):
            if name not in names:
                raise DataMismatch(f"{file} has no column {name!r}; {known}")
        columns = [c for c in names if c != self.label and c not in self.drop]
        if not len(table) or not columns:
            raise DataMismatch(
                f"{file} has {len(table)} lines and {len(columns)} columns of numbers; there is nothing to learn"
            )
        for name in columns:
            problem = self._column_problem(table[name])
            if problem:
                row, what = problem
                plan.problems.append(f"{file} line {row + 1 + self.header}, column {name!r}: {what}")

    def _column_problem(self, column: pa.ChunkedArray) -> tuple[int, str] | None:
        missing = _first(column.is_null())
        if pa.types.is_null(column.type):
            return 0, "the whole column is empty; leave it out with `drop`"
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            texts = pc.cast(column, pa.string()).to_pylist()
            row = next((r for r, text in enumerate(texts) if text is not None and not _is_number(text)), 0)
            return (
                row,
                f"{texts[row]!r} is no number; correct it, give the column as `label`, or leave it out with `drop`",
            )
        if missing is not None and (self.missing == "refuse" or self.levels is not None):
            mend = "fill it in, or give `missing: allow`" if self.levels is None else "fill it in"
            return missing, f"a value is missing (NaN); {mend} ({column.null_count} in this column)"
        values = np.nan_to_num(_numbers(column), nan=0.0, posinf=np.inf, neginf=-np.inf)
        infinite = np.flatnonzero(np.abs(values) > np.finfo(np.float32).max)
        if len(infinite):
            return int(infinite[0]), "the value is infinite, or too large for float32; correct it"
        if self.levels is not None:
            bad = np.flatnonzero((values != np.floor(values)) | (values < 0) | (values >= self.levels))
            if len(bad):
                return int(bad[0]), f"{values[bad[0]]:g} is not among 0 … {self.levels - 1}; correct it, or `levels`"
        return None

    def _settle_labels(
        self, splits: dict[str | None, Path], tables: dict[str | None, pa.Table], first: pa.Table, plan: Plan
    ) -> None:
        known = sorted({v for v in first[self.label].to_pylist() if v is not None}, key=lambda v: (str(type(v)), v))
        plan.class_names = [str(value) for value in known]
        for split, file in splits.items():
            values = tables[split][self.label].to_pylist()
            for row, value in enumerate(values):
                if str(value) not in plan.class_names:
                    what = "the label is missing" if value is None else f"label {value!r} is out of the training file's"
                    plan.problems.append(
                        f"{file} line {row + 1 + self.header}, column {self.label!r}: {what}; correct it"
                    )
                    return
            plan.lines += class_lines([plan.class_names.index(str(v)) for v in values], plan.class_names)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Float64, NaN where nothing is."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def _first(flags: pa.ChunkedArray) -> int | None:
    row = pc.index(flags, True).as_py()
    return None if row < 0 else row


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
