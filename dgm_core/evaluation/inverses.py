"""Whether a model's inverse inverts in practice: in floating point, on real examples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dgm_core.capabilities import HasInverse
from dgm_core.contract import Batch, GenerativeModel
from dgm_core.evaluation.examples import chunks
from dgm_core.evaluation.record import Metric

if TYPE_CHECKING:
    from dgm_core.evaluation.work import Work

LARGE = 1e-2  # of the examples' standard deviation: a difference that can be seen


def step(work: Work) -> None:
    metrics, warnings = inverse_metrics(work.model, work.test, work.options.batch_size)
    work.add(metrics)
    work.warn(*warnings)


def inverse_metrics(model: GenerativeModel, examples: Batch, batch_size: int) -> tuple[dict[str, Metric], list[str]]:
    """`inverse_error`, the greatest |f⁻¹(f(x)) − x| over coordinates and examples, in data units; and a warning."""
    if not isinstance(model, HasInverse):
        return {}, []
    found = [model.inverse_error(b.x, b.y).double().cpu() for b in chunks(examples, batch_size, model.device)]
    errors = torch.cat(found).nan_to_num(nan=math.inf)
    worst, n = errors.max().item(), len(errors)
    scale = examples.x.double().std().item()
    metrics = {"inverse_error": Metric.of(worst, n=n, of="the worst example", standard_deviation_of_data=scale)}
    if worst <= LARGE * scale:
        return metrics, []
    many = int((errors > LARGE * scale).sum())
    return metrics, [
        f"The model is not invertible in practice: f⁻¹(f(x)) is off by up to {worst:.3g} data units, where the data's "
        f"standard deviation is {scale:.3g}, and by more than a hundredth of that on {many} of {n} examples. Its "
        "likelihoods and samples then belong to different densities: bound the scales, clip gradients, or train with a "
        "lower learning rate."
    ]
