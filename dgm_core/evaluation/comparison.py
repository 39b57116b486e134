"""Samples beside held-out examples: on a judge's features, by the classes it sees in them, on a vector's coordinates.

Floors are those of training examples in the samples' place, as many as samples, so that both have the same bias.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgm_core.data.display import undo
from dgm_core.evaluation import quality
from dgm_core.evaluation.examples import nearest_stored, take, unit
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.record import EvaluationConfig, Metric

if TYPE_CHECKING:
    from dgm_core.evaluation.work import Work


def step(work: Work) -> None:
    if not work.enough:
        return
    reference = take(iter([work.train]), len(work.drawn.x)).x
    context = {"n": len(work.drawn.x), "n_real": len(work.test.x), "sampling": dict(work.options.sampling)}
    if work.judge is not None:
        feature = "judge" if work.judge.kind == "classes" else "standardised coordinates"
        context["features"] = f"{feature} ({work.judge.size})"
        _features(work, work.judge, reference, context)
        if work.judge.kind == "classes":
            _classes(work, work.judge, context)
    if work.spec.kind == "vector":
        _vectors(work, reference, context)


def _features(work: Work, judge: Judge, reference: Tensor, context: dict[str, Any]) -> None:
    fake, real, floor = (judge.features(x) for x in (work.drawn.x, work.test.x, reference))
    work.add(_distances(fake, real, floor, work.options, context))
    if work.means is not None:
        found = quality.frechet(judge.features(nearest_stored(work.means, work.spec)), real)
        plain = {**context, "of": "decoded means of prior draws"}
        work.add({"frechet_means": Metric.of(found, quality.frechet(floor, real), **plain)})


def _distances(
    fake: Tensor, real: Tensor, floor: Tensor, options: EvaluationConfig, context: dict[str, Any]
) -> dict[str, Metric]:
    metrics = {"frechet": Metric.of(quality.frechet(fake, real), quality.frechet(floor, real), **context)}
    value, error = quality.kid(fake, real, options.chunk)
    metrics["kid"] = Metric.of(value, quality.kid(floor, real, options.chunk)[0], error, **context)
    k = options.neighbours
    if min(len(real), len(floor)) > k:
        ours, best = (quality.prdc(real, points, k, options.chunk) for points in (fake, floor))
        metrics |= {name: Metric.of(value, best[name], neighbours=k, **context) for name, value in ours.items()}
    return metrics


def _classes(work: Work, judge: Judge, context: dict[str, Any]) -> None:
    spec, drawn = work.spec, work.drawn
    found, n = judge.classify(drawn.x), len(drawn.x)
    shares = torch.tensor(spec.class_shares or (1 / spec.classes,) * spec.classes)
    alike = quality.class_balance(judge.classify(work.test.x), shares)
    work.add({"class_balance_tv": Metric.of(quality.class_balance(found, shares), alike, **context)})
    if work.by_labels and drawn.y is not None:
        agree = (found == drawn.y).double()
        error = (agree.std() / math.sqrt(n)).item()
        work.add({"class_agreement": Metric.of(agree.mean().item(), judge.accuracy, error, **context)})
    counts = torch.bincount(found, minlength=spec.classes)
    missing = [str(c) for c in range(spec.classes) if counts[c] == 0 and shares[c] * n >= 10]
    if missing:
        work.warn(f"No sample was recognised as class {', '.join(missing)}: modes are missing.")


def _vectors(work: Work, reference: Tensor, context: dict[str, Any]) -> None:
    real = unit(work.test.x, work.spec).double()
    scale = real.std(0).clamp_min(1e-12)
    fake, real, floor = (unit(x, work.spec).double() / scale for x in (work.drawn.x, work.test.x, reference))
    chunk, width = work.options.chunk, quality.median_distance(real)
    kernel = quality.gaussian(width)
    value, error = quality.energy_distance(fake, real, chunk)
    plain = {**context, "features": "coordinates over their standard deviations"}
    work.add({"energy_distance": Metric.of(value, quality.energy_distance(floor, real, chunk)[0], error, **plain)})
    value, error = quality.mmd2(fake, real, kernel, chunk)
    lowest = quality.mmd2(floor, real, kernel, chunk)[0]
    work.add({"mmd2": Metric.of(value, lowest, error, kernel=f"gaussian, {width:.3g} wide", **plain)})
    if "modes" in work.info.get("density", {}):
        _modes(work, reference, context)


def _modes(work: Work, reference: Tensor, context: dict[str, Any]) -> None:
    known = work.info["density"]
    centres, sd = torch.tensor(known["modes"]).double(), float(known["sd"])
    found = quality.modes(undo(work.drawn.x, work.info), centres, sd)
    best = quality.modes(undo(reference, work.info), centres, sd)
    plain = {"n": context["n"], "sampling": context["sampling"], "modes": len(centres), "within_sd": 3.0}
    work.add({name: Metric.of(value, best[name], **plain) for name, value in found.items()})
    if found["modes_found"] < len(centres):
        lost = len(centres) - int(found["modes_found"])
        work.warn(f"{lost} of the {len(centres)} modes are not found by the samples.")
