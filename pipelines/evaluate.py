"""Stage `evaluate@<run>`: score a run, or a two-stage model, by what it can do; numbers, figures, warnings.

    python -m pipelines.evaluate RUN

Outs: `metrics/<run>.json` (flat numbers for `dvc metrics`), `evaluations/<run>/evaluation.json` (every number with its
context and floor) and `evaluations/<run>/figures/`. With several seeds, numbers are means, with `_sd` beside them.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dgm_core import runs
from dgm_core.contract import HasCodes
from dgm_core.data.batches import one_pass
from dgm_core.data.display import display_of
from dgm_core.data.shards import open_dataset
from dgm_core.evaluation.evaluate import evaluate
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.record import EvaluationConfig
from pipelines.cluster import call, connected, device
from pipelines.params import Params, Usage, load_params, run_main
from pipelines.serving import log_model
from pipelines.tracking import Tracker


def score(model: str, data: str, judge: str, out: str, options: EvaluationConfig, seed: int) -> dict[str, float]:
    """On a worker: evaluate one finished run into `out`; its flat numbers."""
    dataset = open_dataset(data)
    split = {name: partial(one_pass, dataset.split(name), 256) for name in ("train", "val", "test")}
    own_judge = Judge.load(Path(judge)) if dataset.spec.kind != "codes" else None
    with runs.replaced_folder(Path(out)) as folder:
        found = evaluate(
            runs.load(model, device()),
            spec=dataset.spec, info=dataset.info, judge=own_judge,
            train=split["train"], val=split["val"], test=split["test"],
            options=options, out=folder, seed=seed, ema=has_average(Path(model)),
            display=display_of(dataset.info),
        )  # fmt: skip
        _figures_apart(folder)
    return found.flat()


def has_average(run: Path) -> bool:
    """Whether the run's weights are an average over training."""
    recipe = runs.read_json(run / "recipe.json") if (run / "recipe.json").exists() else {}
    return any(o["ema"] is not None for o in recipe.get("optimizers", {}).values())


def _figures_apart(folder: Path) -> None:
    """DVC shows a folder of pictures as plots, so they get one of their own."""
    (folder / "figures").mkdir()
    about = runs.read_json(folder / "evaluation.json")
    for figure in about["figures"]:
        os.replace(folder / figure["file"], folder / "figures" / figure["file"])
        figure["file"] = f"figures/{figure['file']}"
    runs.write_json(folder / "evaluation.json", about)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.evaluate", description="Score a run of params.yaml.")
    parser.add_argument("run", metavar="RUN")
    given = parser.parse_args(argv)
    params = load_params()
    two_stage = given.run in params.two_stage
    if two_stage:
        _assemble(given.run, params)
        entry, seeds, judge = params.two_stage[given.run], [0], params.two_stage[given.run].data
    else:
        entry = params.run(given.run)
        seeds, judge = list(range(entry.seed, entry.seed + entry.seeds)), entry.judge
    tracker = Tracker(params.tracking, given.run, Path(params.cluster.storage).resolve())
    with tracker.running(tracker.remembered(), stage="evaluate"):
        with connected(params.cluster):
            results = []
            for i, seed in enumerate(seeds):
                model = Path("models", given.run, *([] if i == 0 else ["seeds", str(seed)]))
                out = Path("evaluations", given.run) if i == 0 else Path("evaluations", given.run + f".seed{seed}")
                job = partial(
                    score, str(model.resolve()), str(Path("data", entry.data).resolve()),
                    str(Path("judges", judge).resolve()), str(out.resolve()), params.evaluate, entry.seed,
                )  # fmt: skip
                results.append(call(job, cluster=params.cluster))
                if i > 0:
                    shutil.rmtree(out)
        metrics = over_seeds(results)
        Path("metrics").mkdir(exist_ok=True)
        runs.write_json(Path("metrics", f"{given.run}.json"), metrics)
        tracker.log_results(metrics, Path("evaluations", given.run))
        if two_stage and params.tracking.log_model:
            log_model(tracker, Path("models", given.run))
    return 0


def over_seeds(results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """One seed's numbers as they are; of several, the mean, with the sample standard deviation as `<name>_sd`."""
    if len(results) == 1:
        return dict(results[0])
    merged: dict[str, Any] = {"seeds": len(results)}
    for name in results[0]:
        values = [r[name] for r in results if math.isfinite(r[name])]
        if values:
            merged[name] = statistics.fmean(values)
        if len(values) > 1:
            merged[f"{name}_sd"] = statistics.stdev(values)
    return merged


def _assemble(name: str, params: Params) -> None:
    """Write `models/<name>/`: the code model, its priors, and how they go together."""
    two = params.two_stage[name]
    codes = runs.load(Path("models", two.codes))
    if not isinstance(codes, HasCodes):
        raise Usage(f"two_stage.{name}.codes: {two.codes} has no codes")
    levels = list(codes.code_specs())
    if sorted(two.priors) != sorted(levels):
        raise Usage(
            f"two_stage.{name}.priors has {sorted(two.priors)}; {two.codes} has levels {levels}: one prior each"
        )
    with runs.replaced_folder(Path("models", name)) as folder:  # whole in itself: it can be moved, logged and served
        _copy_run(two.codes, folder / "codes")
        for level in levels:
            _copy_run(two.priors[level], folder / "priors" / level)
        priors = {level: f"priors/{level}" for level in levels}
        runs.write_json(folder / "config.json", {"model": runs.TWO_STAGE, "codes": "codes", "priors": priors})


def _copy_run(name: str, target: Path) -> None:
    shutil.copytree(Path("models", name), target, ignore=shutil.ignore_patterns("seeds"))


if __name__ == "__main__":
    from pipelines.evaluate import main as stage  # by its own name, so that workers can import what they are sent

    run_main(stage)
