"""The quick look in mid-training: a few numbers a model, by what it can do, under names that a recipe can monitor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dgm_core.capabilities import HasCodes, HasPosterior
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.evaluation import quality
from dgm_core.evaluation.codes import code_metrics, encode
from dgm_core.evaluation.examples import quiet, take, unit
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.latents import kl_by_dimension
from dgm_core.evaluation.likelihood import likelihood
from dgm_core.evaluation.reconstructions import can_reconstruct, reconstruct, reconstruction_metrics
from dgm_core.evaluation.record import EvaluationConfig, Metric
from dgm_core.evaluation.sampling import draw, goes_by_labels

QUICK = EvaluationConfig(
    elbo_draws=1, importance_samples=0, ais_chains=50, ais_temperatures=200, ais_burn_in=50, samples=500, examples=1000
)


def validate(
    model: GenerativeModel,
    batches: Iterable[Batch],
    spec: DataSpec,
    info: Mapping[str, Any],
    *,
    judge: Judge | None = None,
    options: EvaluationConfig = QUICK,
    seed: int = 0,
) -> dict[str, float]:
    """Numbers named `val/…`; leaves the random stream and the model as they were, and talks to no other rank.

    Likelihoods for models that have one (`val/nll_nats`, `val/elbo_nats`, `val/bits_per_dim`, `val/nll_ais_nats`),
    reconstructions for those that make them, codebook use, and `val/energy_distance` for vectors. Samples of the
    rest are drawn, and `val/frechet` measured, only where a judge is given: with some models that takes long. A number
    that is not finite comes out as NaN.
    """
    with quiet(model, seed):
        examples = take(batches, options.examples)
        metrics = likelihood(model, examples, spec, info, options)
        if can_reconstruct(model):
            reconstructed, how = reconstruct(model, examples, options.batch_size)
            metrics |= reconstruction_metrics(reconstructed, how, examples, spec, None)
        if isinstance(model, HasPosterior):
            kl = kl_by_dimension(model, examples, options.batch_size)
            metrics["kl_nats"] = Metric.of(kl.sum().item())
        if isinstance(model, HasCodes):
            metrics |= code_metrics(model, spec, encode(model, examples, options.batch_size))[0]
            metrics.pop("codes/reduction")
        if judge is not None or spec.kind == "vector":
            metrics |= _distances(model, examples, spec, judge, options, seed)
    return {f"val/{name}": float("nan") if m.value is None else m.value for name, m in metrics.items()}


def _distances(
    model: GenerativeModel,
    examples: Batch,
    spec: DataSpec,
    judge: Judge | None,
    options: EvaluationConfig,
    seed: int,
) -> dict[str, Metric]:
    by_labels = goes_by_labels(model, examples, options.sampling, seed)
    drawn = draw(model, options.samples, examples, options.sampling, options.batch_size, by_labels=by_labels)
    metrics: dict[str, Metric] = {}
    finite = bool(torch.isfinite(drawn.x.double()).all())
    if judge is not None:
        judge.check(spec)
        distance = quality.frechet(judge.features(drawn.x), judge.features(examples.x)) if finite else float("nan")
        metrics["frechet"] = Metric.of(distance)
    if spec.kind == "vector":
        real = unit(examples.x, spec).double()
        scale = real.std(0).clamp_min(1e-12)
        sampled = unit(drawn.x, spec).double()
        value = quality.energy_distance(sampled / scale, real / scale, options.chunk)[0] if finite else float("nan")
        metrics["energy_distance"] = Metric.of(value)
    return metrics
