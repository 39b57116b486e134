"""Stage `encode@<run>`: a run's codes become data sets, one a level, like any other.

    python -m pipelines.encode RUN

Outs: `data/codes/<run>/<level>/`; a finer level's examples carry the coarser codes as context.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from dgm_core import runs
from dgm_core.contract import Batch, HasCodes
from dgm_core.data.batches import one_pass
from dgm_core.data.shards import SPLITS, open_dataset, write_dataset
from pipelines.cluster import call, connected, device
from pipelines.params import Usage, load_params, run_main


def encode(run: str, data: str, out: str) -> None:
    """On a worker: write every level's data set into `out`, which appears when all of them are whole."""
    model = runs.load(run, device())
    if not isinstance(model, HasCodes):
        raise Usage(f"{Path(run).name} has no codes: encode takes runs of vq_vae, vq_vae2 and the like")
    dataset = open_dataset(data)
    specs = model.code_specs()
    with runs.replaced_folder(Path(out)) as folder:
        for level, spec in specs.items():
            splits = {name: _level(model, one_pass(dataset.split(name), 256), level, spec.context) for name in SPLITS}
            info = {"name": f"{Path(run).name}/{level}", "source": "codes", "codes": Path(run).name, "level": level}
            kept = {k: dataset.info[k] for k in ("class_names",) if k in dataset.info}
            write_dataset(folder / level, spec, splits, {**info, **kept})


def _level(model: HasCodes, batches: Iterable[Batch], level: str, context: Iterable[str]) -> Iterator[Batch]:
    for batch in batches:
        with torch.no_grad():
            codes = model.codes(batch.x.to(model.device), None if batch.y is None else batch.y.to(model.device))  # type: ignore[attr-defined]
        yield Batch(codes[level].cpu(), batch.y, {name: codes[name].cpu() for name in context})


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.encode", description="Turn a run's codes into data.")
    parser.add_argument("run", metavar="RUN")
    given = parser.parse_args(argv)
    params = load_params()
    if given.run not in params.encode:
        raise Usage(f"encode: {given.run!r} is not there; known: {', '.join(params.encode)}")
    data, out = Path("data", params.run(given.run).data), Path("data", "codes", given.run)
    job = partial(encode, str(Path("models", given.run).resolve()), str(data.resolve()), str(out.resolve()))
    with connected(params.cluster):
        call(job, cluster=params.cluster)
    return 0


if __name__ == "__main__":
    from pipelines.encode import main as stage  # by its own name, so that workers can import what they are sent

    run_main(stage)
