"""Stage `prepare@<dataset>`: decode a source in parallel into Arrow shards with train, val and test splits.

    python -m pipelines.prepare DATASET
    python -m pipelines.prepare --check PATH     what a folder holds, and what is wrong with it

Outs: `data/<dataset>/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dgm_core.data.check import check
from dgm_core.data.prepare import prepare
from dgm_core.data.sources.base import Map
from pipelines.command import Usage, run_main
from pipelines.connect import connected
from pipelines.params import Params, load_params, parse_source
from pipelines.parts import map_parts


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.prepare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", metavar="DATASET", nargs="?")
    parser.add_argument("--check", metavar="PATH", type=Path, help="say what PATH holds and what is wrong with it")
    given = parser.parse_args(argv)
    if given.check is not None:
        report = check(given.check)
        sys.stdout.write(f"{report}\n")
        return 0 if report.ok else 1
    params = load_params()
    if given.dataset not in params.datasets:
        raise Usage(f"datasets: {given.dataset!r} is not there; known: {', '.join(params.datasets)}")
    source = parse_source(params.datasets[given.dataset])
    with connected(params.cluster):
        prepare(source, Path("data", given.dataset), name=given.dataset, map=_mapper(params))
    return 0


def _mapper(params: Params) -> Map:
    def spread(decode: Callable[[Any], Any], parts: Iterable[Any], /) -> Iterable[Any]:
        return map_parts(decode, list(parts), params.cluster, what="decoding", near=params.cluster.shared)

    return spread


if __name__ == "__main__":
    run_main(main)
