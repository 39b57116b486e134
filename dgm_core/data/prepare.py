"""From a source to a data set on disk: plan, decode in parallel, carve out splits, make the variant, write whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dgm_core.contract import OBSERVED, DataMismatch, DataSpec
from dgm_core.data import noise
from dgm_core.data.shards import SPLITS, Dataset, ShardWriter
from dgm_core.data.sources.base import Arrays, Map, Part, Plan, Source
from dgm_core.data.transforms import Moments, apply_all, follow, records, variant

Progress = Callable[[int, int], None]  # examples done, of how many


@dataclass(frozen=True)
class Task:
    """A part, and which examples of the source it holds (their numbers are their noise's)."""

    part: Part
    first: int


def prepare(
    config: Source,
    out: str | os.PathLike[str],
    *,
    name: str,
    seed: int = 0,
    map: Map = map,  # noqa: A002
    progress: Progress | None = None,
) -> Dataset:
    """Turn a source into shards at `out`, always with train, val and test.

    `map` spreads the decoding (it must keep the order); bad input raises `DataMismatch` and leaves nothing behind.
    """
    plan = config.plan(seed=seed, map=map)
    plan.refuse()
    if plan.spec is None or not plan.parts:
        raise DataMismatch(f"{name}: no example was found; correct `path`")
    spec = follow(plan.spec, config.transform)
    split_of = carve(plan, config, seed)
    grey = plan.spec.levels if any(t.name == "dynamic" for t in config.transform) else None
    _check_space(Path(out), spec, len(split_of))
    tasks, total = _tasks(plan.parts), len(split_of)
    passes = 2 if _needs_moments(plan.spec, config) else 1
    done = _counter(progress, passes * total)

    moments = None
    if passes == 2:
        names = [t.name for t in config.transform]
        before = config.transform[: names.index("standardize")] if "standardize" in names else ()
        steps = records(plan.spec, before, None)
        moments = _moments(_worked(config, tasks, steps, seed, map, done), tasks, split_of)
    steps = records(plan.spec, config.transform, moments)

    with ShardWriter(out, spec, grey_levels=grey, shard_bytes=config.shard_bytes) as writer:
        for task, arrays in zip(tasks, _worked(config, tasks, steps, seed, map, done), strict=True):
            here = split_of[task.first : task.first + task.part.examples]
            for number, split in enumerate(SPLITS):
                rows = np.flatnonzero(here == number)
                if len(rows):
                    context = {key: values[rows] for key, values in arrays.context.items()}
                    writer.add(split, arrays.x[rows], None if arrays.y is None else arrays.y[rows], context)
        info = {
            "name": name,
            "source": config.source,
            "config": config.model_dump(mode="json"),
            "seed": seed,
            "variant": variant(config.transform),
            "original": plan.spec.to_dict(),
            "transforms": steps,
            "class_names": plan.class_names,
            **({"range": [moments.low, moments.high]} if moments else {}),
            **plan.facts,
        }
        return writer.finish(info)


def carve(plan: Plan, config: Source, seed: int) -> np.ndarray:
    """(N,) int8: which split each example of the source goes to.

    Splits that the source has are kept; the others are drawn from its training examples (or from all), whole groups
    at a time.
    """
    given = {part.split for part in plan.parts}
    if given - {None} and "train" not in given:
        raise DataMismatch(f"the source has {', '.join(sorted(map(str, given)))} but no train split; add it, or rename")
    counts = [part.examples for part in plan.parts]
    starts = np.cumsum([0, *counts])
    result = np.repeat(np.asarray([SPLITS.index(p.split or "train") for p in plan.parts], np.int8), counts)
    groups = np.arange(len(result)) + 2**32
    for part, start in zip(plan.parts, starts, strict=False):
        if part.groups is not None:
            groups[start : start + part.examples] = part.groups
    pool = np.flatnonzero(result == 0)
    missing = [split for split in ("test", "val") if split not in given]
    wanted = {s: round(a * len(pool)) if (a := getattr(config, s)) < 1 else int(a) for s in missing}
    if sum(wanted.values()) >= len(pool) or 0 in wanted.values():
        told = " and ".join(f"{count} for {split}" for split, count in wanted.items())
        raise DataMismatch(
            f"{len(pool)} examples cannot spare {told} and leave some for train; give other `val`, `test`"
        )
    units, unit_of = np.unique(groups[pool], return_inverse=True)
    order = np.random.default_rng((noise.CARVE, seed)).permutation(len(units))
    sizes = np.cumsum(np.bincount(unit_of)[order])
    taken = 0
    for split, count in wanted.items():
        end = int(np.searchsorted(sizes, (sizes[taken - 1] if taken else 0) + count)) + 1
        result[pool[np.isin(unit_of, order[taken:end])]] = SPLITS.index(split)
        taken = end
    return result


def work(task: Task, config: Source, steps: Sequence[dict[str, Any]], seed: int) -> Arrays:
    """Decode a part and make the variant of it: pure, and the only thing that travels to workers."""
    arrays = config.decode(task.part.payload)
    if len(arrays.x) != task.part.examples:
        raise DataMismatch(
            f"a part has {len(arrays.x)} examples, {task.part.examples} were found at first; did it change?"
        )
    index = np.arange(task.first, task.first + len(arrays.x))
    x = apply_all(arrays.x, list(steps), index, (seed, 0))
    if OBSERVED in arrays.context and x.dtype == np.float32:
        x = np.where(arrays.context[OBSERVED].astype(bool), x, np.float32(0))
    return arrays._replace(x=x)


def _worked(
    config: Source,
    tasks: Sequence[Task],
    steps: Sequence[dict[str, Any]],
    seed: int,
    spread: Map,
    done: Callable[[int], None],
) -> Iterator[Arrays]:
    for arrays in spread(partial(work, config=config, steps=tuple(steps), seed=seed), tasks):
        yield arrays
        done(len(arrays.x))


def _tasks(parts: Sequence[Part]) -> list[Task]:
    starts = np.cumsum([0, *(part.examples for part in parts)])
    return [Task(part, int(start)) for part, start in zip(parts, starts, strict=False)]


def _needs_moments(spec: DataSpec, config: Source) -> bool:
    shown = spec.kind == "image" and spec.levels is None  # real-valued pictures: their range is needed to show them
    return shown or any(t.name == "standardize" for t in config.transform)


def _moments(decoded: Iterator[Arrays], tasks: Sequence[Task], split_of: np.ndarray) -> Moments:
    """Of the training examples; sums are taken about the first part's mean, so that nothing cancels."""
    shift = count = first = second = None
    low, high = np.inf, -np.inf
    for task, arrays in zip(tasks, decoded, strict=True):
        rows = split_of[task.first : task.first + task.part.examples] == 0
        if not rows.any():
            continue
        x = arrays.x[rows].astype(np.float64)
        seen = arrays.context[OBSERVED][rows].astype(bool) if OBSERVED in arrays.context else np.ones_like(x, bool)
        if shift is None:
            shift = x.sum(0) / np.maximum(seen.sum(0), 1)
            count, first, second = np.zeros_like(shift), np.zeros_like(shift), np.zeros_like(shift)
        centred = np.where(seen, x - shift, 0)
        count += seen.sum(0)
        first += centred.sum(0)
        second += (centred**2).sum(0)
        low, high = min(low, float(x.min())), max(high, float(x.max()))
    if shift is None or count is None or first is None or second is None:
        raise DataMismatch("no training example was found; correct the source")
    mean = first / np.maximum(count, 1)
    return Moments(shift + mean, second / np.maximum(count, 1) - mean**2, low, high)


def _check_space(out: Path, spec: DataSpec, examples: int) -> None:
    """Refuse what cannot fit before hours of decoding; a disk that fills up meanwhile is the writer's to tell."""
    needed = examples * sum(s.dims * s.dtype.itemsize for s in (spec, *spec.context.values()))
    nearest = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(nearest).free
    if needed > free:
        told = f"{out} needs {needed / 2**20:.0f} MiB, {nearest} has {free / 2**20:.0f} MiB free; nothing was written"
        raise OSError(errno.ENOSPC, f"{told}. Free some space, or give a folder on another disk.")


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(examples: int) -> None:
        nonlocal done
        done += examples
        if progress is not None:
            progress(done, total)

    return count
