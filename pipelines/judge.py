"""Stage `judge@<dataset>`: fit the classifier whose features score samples of this data set.

    python -m pipelines.judge DATASET

Outs: `judges/<dataset>/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dgm_core.data.batches import one_pass
from dgm_core.data.shards import open_dataset
from dgm_core.evaluation.judge import fit_judge
from pipelines.command import Usage, run_main
from pipelines.connect import connected
from pipelines.params import JudgeConfig, load_params
from pipelines.parts import call
from pipelines.place import Place
from pipelines.worker import device


def fit(place: Place, data: str, out: str, settings: JudgeConfig) -> str:
    """On a worker: train on the training split, measure on the test split, save; where it was put."""
    with place.opened(data) as folder, place.output(out) as made:
        dataset = open_dataset(folder)
        judge = fit_judge(
            dataset.spec,
            partial(one_pass, dataset.split("train"), 512),
            held_out=partial(one_pass, dataset.split("test"), 512),
            device=device(),
            **settings.model_dump(),
        )
        judge.save(made.folder)
    return made.ref


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.judge", description="Fit a data set's judge.")
    parser.add_argument("dataset", metavar="DATASET")
    given = parser.parse_args(argv)
    params = load_params()
    if given.dataset not in params.datasets:
        raise Usage(f"datasets: {given.dataset!r} is not there; known: {', '.join(params.datasets)}")
    place, out = Place.of(params.cluster), Path("judges", given.dataset).resolve()
    with connected(params.cluster):
        data = place.send(Path("data", given.dataset))
        place.bring(call(fit, place, data, str(out), params.judge, cluster=params.cluster), out)
    return 0


if __name__ == "__main__":
    from pipelines.judge import main as stage  # by its own name, so that workers can import what they are sent

    run_main(stage)
