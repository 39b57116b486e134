"""Stage `evaluate@<run>`: score a run, or a two-stage model, by what it can do; numbers, figures, warnings.

    python -m pipelines.evaluate RUN

Outs: `metrics/<run>.json` (flat numbers for `dvc metrics`), `evaluations/<run>/evaluation.json` (every number with its
context and floor), `evaluations/<run>/figures/` and `evaluations/<run>/sounds/` (recordings, if any, and their
list). With several seeds, numbers are means, with `_sd` beside them.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dgm_core import runs
from dgm_core.capabilities import HasCodes
from dgm_core.data.batches import one_pass
from dgm_core.data.display import display_of
from dgm_core.data.shards import open_dataset
from dgm_core.evaluation.evaluate import evaluate
from dgm_core.evaluation.examples import quiet, take
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.record import EvaluationConfig
from dgm_core.evaluation.sampling import Drawn, draw_part, goes_by_labels
from pipelines import state
from pipelines.command import Usage, run_main
from pipelines.connect import connected, refuse_early
from pipelines.params import Params, load_params
from pipelines.parts import call, keep_parts
from pipelines.place import Place
from pipelines.serving import log_model
from pipelines.snapshots import FILM
from pipelines.tracking import Tracker
from pipelines.worker import device

SHOWN = ("figures", "sounds")


class Refs(NamedTuple):
    """What a worker needs, as `Place` sends it."""

    place: Place
    model: str
    data: str
    judge: str
    weights: str


@lru_cache(maxsize=1)
def _loaded(folder: Path, weights: str) -> Any:
    """A worker's process does many parts; `weights` says what is loaded."""
    return runs.load(folder, device())


def sample(part: tuple[int, int], *, refs: Refs, options: EvaluationConfig, seed: int) -> dict[str, np.ndarray]:
    """On a worker: samples number start … stop − 1 as `x`, their labels as `y` where the model goes by them."""
    start, stop = part
    with refs.place.opened(refs.model) as folder, refs.place.opened(refs.data) as data:
        model, dataset = _loaded(folder, refs.weights), open_dataset(data)
        split = dataset.split("val" if options.split == "val" else "test")
        examples = take(one_pass(split, 256), options.examples)
        with quiet(model, seed):
            by_labels = goes_by_labels(model, examples, options.sampling, seed)
        with quiet(model, seed + 1_000_003 * (1 + start)):
            drawn = draw_part(model, start, stop, examples, options.sampling, by_labels=by_labels)
    labels = {} if drawn.y is None else {"y": drawn.y.numpy()}
    return {"x": drawn.x.numpy(), "seconds": np.asarray(drawn.seconds), **labels}


def _joined(folder: Path) -> Drawn:
    files = sorted(folder.glob("*.npz"), key=lambda f: int(f.stem))
    parts = [dict(np.load(file)) for file in files]
    y = torch.from_numpy(np.concatenate([p["y"] for p in parts])) if "y" in parts[0] else None
    x = torch.from_numpy(np.concatenate([p["x"] for p in parts]))
    return Drawn(x, y, float(sum(p["seconds"] for p in parts)))


def score(refs: Refs, samples: str, out: str, options: EvaluationConfig, seed: int) -> tuple[dict[str, float], str]:
    """On a worker: evaluate one finished run into `out`; its flat numbers, and where they were put."""
    place = refs.place
    with ExitStack() as held, place.output(out) as made:
        folder, drawn = (held.enter_context(place.opened(ref)) for ref in (refs.model, samples))
        dataset = open_dataset(held.enter_context(place.opened(refs.data)))
        split = {name: partial(one_pass, dataset.split(name), 256) for name in ("train", "val", "test")}
        judge = Judge.load(held.enter_context(place.opened(refs.judge))) if dataset.spec.kind != "codes" else None
        found = evaluate(
            _loaded(folder, refs.weights),
            spec=dataset.spec, info=dataset.info, judge=judge,
            train=split["train"], val=split["val"], test=split["test"],
            options=options, out=made.folder, seed=seed, ema=has_average(folder),
            display=display_of(dataset.info), drawn=_joined(drawn),
        )  # fmt: skip
        _add_film(folder, made.folder)
        _figures_apart(made.folder)
    return found.flat(), made.ref


def has_average(run: Path) -> bool:
    """Whether the run's weights are an average over training."""
    recipe = runs.read_json(run / "recipe.json") if (run / "recipe.json").exists() else {}
    return any(o["ema"] is not None for o in recipe.get("optimizers", {}).values())


def _add_film(run: Path, folder: Path) -> None:
    """What the training drew at its validations is shown with what the evaluation drew."""
    if (run / FILM).exists():
        shutil.copyfile(run / FILM, folder / FILM)
        about = runs.read_json(folder / "evaluation.json")
        about["figures"].append({"file": FILM, "caption": "Samples at each validation, always for the same noise"})
        runs.write_json(folder / "evaluation.json", about)


def _figures_apart(folder: Path) -> None:
    """DVC shows a folder of pictures as plots, so they get one of their own; recordings are no plots."""
    about = runs.read_json(folder / "evaluation.json")
    for kind in SHOWN:
        (folder / kind).mkdir()
        for shown in about[kind]:
            for key in shown.keys() & {"file", "picture"}:
                os.replace(folder / shown[key], folder / kind / shown[key])
                shown[key] = f"{kind}/{shown[key]}"
    runs.write_json(folder / "sounds" / "index.json", about["sounds"])  # never empty: DVC warns of empty folders
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
    data, weights = Path("data", entry.data), Path("models", given.run)
    key = state.fingerprint(
        run=[state.file_checksum(f) for f in sorted(weights.rglob("weights.safetensors"))],
        data=state.folder_checksum(data), judge=state.folder_checksum(Path("judges", judge)),
        evaluate=params.evaluate.model_dump(), code=state.code_hash(None, "evaluation"), seed=entry.seed,
    )  # fmt: skip
    refuse_early(params.cluster)
    place = Place.of(params.cluster)
    tracker = Tracker(params.tracking, given.run, params.cluster.local)
    with (
        state.in_progress(params.cluster, f"evaluate-{given.run}", key) as folder,
        tracker.running(tracker.remembered(), stage="evaluate"),
    ):
        with connected(params.cluster):
            numbers = [
                _one_seed(given.run, i, seed, data, judge, params, folder, place) for i, seed in enumerate(seeds)
            ]
        metrics = over_seeds(numbers)
        Path("metrics").mkdir(exist_ok=True)
        runs.write_json(Path("metrics", f"{given.run}.json"), metrics)
        with runs.replaced_folder(Path("evaluations", given.run)) as out:
            shutil.copytree(folder / "seed0" / "out", out, dirs_exist_ok=True)
            for kind in SHOWN:  # an object store knows no empty folders, DVC wants every out
                (out / kind).mkdir(exist_ok=True)
        tracker.log_results(metrics, Path("evaluations", given.run))
        if two_stage and params.tracking.log_model:
            log_model(tracker, Path("models", given.run))
    return 0


def _one_seed(
    name: str, number: int, seed: int, data: Path, judge: str, params: Params, folder: Path, place: Place
) -> dict[str, float]:
    """One seed's numbers; what an attempt before has finished of it (samples, the whole) is not done again."""
    own, options = folder / f"seed{number}", params.evaluate
    if (own / "numbers.json").exists():
        return runs.read_json(own / "numbers.json")
    model = Path("models", name, *(["seeds", str(seed)] if number else []))
    scored = open_dataset(data).spec.kind != "codes"
    sent = place.send(Path("judges", judge)) if scored else ""
    refs = Refs(place, place.send(model), place.send(data), sent, folder.name)
    n, size = options.samples, options.batch_size
    keep_parts(
        partial(sample, refs=refs, options=options, seed=seed),
        [(start, min(start + size, n)) for start in range(0, n, size)],
        params.cluster, own / "samples", what=f"{name}: samples", gpus=params.cluster.gpus_per_worker,
    )  # fmt: skip
    out = own / "out"
    numbers, ref = call(score, refs, place.send(own / "samples"), str(out), options, seed, cluster=params.cluster)
    place.bring(ref, out)
    runs.write_json(own / "numbers.json", numbers)
    return numbers


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
    shutil.copytree(Path("models", name), target, ignore=shutil.ignore_patterns("seeds", FILM))


if __name__ == "__main__":
    from pipelines.evaluate import main as stage  # by its own name, so that workers can import what they are sent

    run_main(stage)
