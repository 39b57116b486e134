"""Stage `encode@<run>`: a run's codes become data sets, one a level, like any other.

    python -m pipelines.encode RUN

The work is done a part at a time; a killed stage goes on with the parts that are missing.

Outs: `data/codes/<run>/<level>/`; a finer level's examples carry the coarser codes as context.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dgm_core import runs
from dgm_core.capabilities import HasCodes
from dgm_core.contract import Batch, DataSpec
from dgm_core.data.shards import SPLITS, Dataset, open_dataset, write_dataset
from pipelines import state
from pipelines.command import Usage, run_main
from pipelines.connect import connected
from pipelines.params import Cluster, Params, load_params
from pipelines.parts import keep_parts
from pipelines.place import Place
from pipelines.worker import device

PART = 2048  # examples a worker encodes at a time
BATCH = 256


class Part(NamedTuple):
    """A share of a split."""

    split: str
    start: int
    stop: int


@lru_cache(maxsize=1)
def _model(run: Path, weights: str) -> HasCodes:
    """A worker's process does many parts; `weights` is the checksum of what is loaded."""
    model = runs.load(run, device())
    assert isinstance(model, HasCodes)
    return model


def encode(part: Part, *, place: Place, run: str, data: str, weights: str) -> dict[str, np.ndarray]:
    """On a worker: every level's codes of a part, and its labels as `y` where there are any."""
    with place.opened(run) as folder, place.opened(data) as shards:
        model, split = _model(folder, weights), open_dataset(shards).split(part.split)
        found: dict[str, list[np.ndarray]] = {}
        for start in range(part.start, part.stop, BATCH):
            batch = split.rows(np.arange(start, min(start + BATCH, part.stop)))
            with torch.no_grad():
                codes = model.codes(batch.x.to(device()), None if batch.y is None else batch.y.to(device()))
            named = codes if batch.y is None else {**codes, "y": batch.y}
            for name, values in named.items():
                found.setdefault(name, []).append(values.cpu().numpy())
    return {name: np.concatenate(values) for name, values in found.items()}


def parts_of(dataset: Dataset) -> list[Part]:
    sizes = {split: len(dataset.split(split)) for split in SPLITS}
    return [Part(s, i, min(i + PART, n)) for s, n in sizes.items() for i in range(0, n, PART)]


def _batches(folder: Path, parts: Sequence[Part], split: str, level: str, spec: DataSpec) -> Iterator[Batch]:
    for i, part in enumerate(parts):
        if part.split == split:
            with np.load(folder / f"{i}.npz") as stored:
                y = torch.from_numpy(stored["y"]) if "y" in stored else None
                context = {name: torch.from_numpy(stored[name]) for name in spec.context}
                yield Batch(torch.from_numpy(stored[level]), y, context)


def encode_all(run: Path, data: Path, out: Path, cluster: Cluster, place: Place, folder: Path) -> None:
    """Write every level's data set into `out`; `folder` keeps the parts that are done.

    Raises:
        Usage: the run has no codes.
    """
    model, dataset = runs.load(run), open_dataset(data)
    if not isinstance(model, HasCodes):
        raise Usage(f"{run.name} has no codes: encode takes runs of vq_vae, vq_vae2 and the like")
    parts, weights = parts_of(dataset), state.file_checksum(run / "weights.safetensors")
    with connected(cluster):
        work = partial(encode, place=place, run=place.send(run), data=place.send(data), weights=weights)
        keep_parts(work, parts, cluster, folder, what="encoding", gpus=cluster.gpus_per_worker)
    _write(folder, out, run.name, dataset, parts, model.code_specs())


def _write(
    folder: Path, target: Path, run: str, dataset: Dataset, parts: Sequence[Part], specs: Mapping[str, DataSpec]
) -> None:
    kept = {k: dataset.info[k] for k in ("class_names",) if k in dataset.info}
    with runs.replaced_folder(target) as out:
        for level, spec in specs.items():
            splits = {split: _batches(folder, parts, split, level, spec) for split in SPLITS}
            info = {"name": f"{run}/{level}", "source": "codes", "codes": run, "level": level}
            write_dataset(out / level, spec, splits, {**info, **kept})


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.encode", description="Turn a run's codes into data.")
    parser.add_argument("run", metavar="RUN")
    given = parser.parse_args(argv)
    params = load_params()
    if given.run not in params.encode:
        raise Usage(f"encode: {given.run!r} is not there; known: {', '.join(params.encode)}")
    _encode(given.run, params)
    return 0


def _encode(name: str, params: Params) -> None:
    run, data = Path("models", name), Path("data", params.run(name).data)
    place, weights = Place.of(params.cluster), state.file_checksum(run / "weights.safetensors")
    key = state.fingerprint(run=weights, data=state.folder_checksum(data), part=PART)
    with state.in_progress(params.cluster, f"encode-{name}", key) as folder:
        encode_all(run, data, Path("data", "codes", name), params.cluster, place, folder)


if __name__ == "__main__":
    from pipelines.encode import main as stage  # by its own name, so that workers can import what they are sent

    run_main(stage)
