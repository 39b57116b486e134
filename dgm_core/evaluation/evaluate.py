"""One model's evaluation: everything its capabilities allow, with context, floors, figures and warnings in words.

What is measured and drawn are the steps below, each `step(work)` in the module of its subject. A new measurement is a
module with a step, and its line here.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dgm_core.contract import DataSpec, GenerativeModel
from dgm_core.evaluation import (
    chains,
    codes,
    comparison,
    completions,
    conditionals,
    critics,
    disentanglement,
    energies,
    interpolations,
    inverses,
    latent_maps,
    latents,
    likelihood,
    neighbours,
    pictures,
    reconstructions,
    sampling,
    sounds,
    styles,
)
from dgm_core.evaluation.drawing import Display
from dgm_core.evaluation.examples import Batches, quiet, take
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.record import Evaluation, EvaluationConfig
from dgm_core.evaluation.sampling import Drawn
from dgm_core.evaluation.work import Progress, Work

TRAINING_EXAMPLES = 20_000  # held, for floors and nearest neighbours

# In this order: what a step leaves in `work` those after it may use.
MEASURES = {
    "likelihood": likelihood.step,
    "samples": sampling.step,
    "quality": comparison.step,
    "codes": codes.step,
    "latents": latents.step,
    "disentanglement": disentanglement.step,
    "reconstructions": reconstructions.step,
    "energy": energies.step,
    "inverse": inverses.step,
    "neighbours": neighbours.step,
    "critic": critics.step,
}
FIGURES = {
    "pictures": pictures.step,
    "interpolations": interpolations.step,
    "styles": styles.step,
    "completions": completions.step,
    "bits": conditionals.step,
    "latent map": latent_maps.step,
    "chains": chains.step,
    "sounds": sounds.step,
}


def evaluate(
    model: GenerativeModel,
    *,
    spec: DataSpec,
    info: Mapping[str, Any],
    judge: Judge | None,
    train: Batches,
    val: Batches,
    test: Batches,
    options: EvaluationConfig,
    out: Path,
    seed: int,
    ema: bool = False,
    display: Display | None = None,
    drawn: Drawn | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a trained model and write `evaluation.json` and its figures to `out`.

    Args:
        info: the data set's `name`, `variant`, `transforms`, `original`, `density` (`entropy`, `modes`, `sd`).
        judge: of this very data set; without one nothing is measured on features.
        train, val, test: each call gives a fresh pass over the split.
        ema: whether `model` holds averaged parameters; said in every metric's context.
        display: stored data (or means in its units) to uint8 pictures (B, C, H, W), or to waveforms (B, T).
        drawn: `options.samples` samples that were drawn elsewhere; without them they are drawn here.
        progress: told (done, total, what) as the work goes on.

    The same arguments give the same numbers and bytes (but for `seconds_per_sample`); neither the model nor the random
    stream is moved. `evaluation.json` is written last: where it stands, all figures do.
    """
    if judge is not None:
        judge.check(spec)
    variant = info.get("variant", "plain")
    context = {"data": info.get("name", ""), "variant": variant, "split": options.split, "seed": seed, "ema": ema}
    scored = val if options.split == "val" else test
    with quiet(model, seed):
        work = Work(
            model, spec, info, judge, options, seed,
            train=take(train(), TRAINING_EXAMPLES), test=take(scored(), options.examples),
            context=context, result=Evaluation(environment=_environment(model)),
            display=display, given=drawn, progress=progress,
        )  # fmt: skip
        _run(work)
    work.result.write(out, work.files)
    return work.result


def _run(work: Work) -> None:
    """Each step in a random stream of its own: one option, or step, does not move another's numbers."""
    steps = {**MEASURES, **FIGURES} if work.options.figures else MEASURES
    for i, (name, step) in enumerate(steps.items()):
        if work.progress is not None:
            work.progress(i, len(steps), name)
        torch.manual_seed(work.seed)
        step(work)
    if work.progress is not None:
        work.progress(len(steps), len(steps), "done")
    for name, metric in work.result.metrics.items():
        if metric.value is None:
            work.warn(f"{name} is NaN or infinite, so it is left out of the metrics.")


def _environment(model: GenerativeModel) -> dict[str, str]:
    device = model.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "none"
    return {"device": f"{device.type} ({kind})", "dtype": dtype, "torch": torch.__version__}
