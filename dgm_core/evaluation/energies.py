"""A model against the density that its data was drawn from, by draws of the model's own.

    reverse_kl_nats          E_q [log q(x) + U(x)] + log Z = KL(q ‖ p): the gap of the bound −log Z that reverse KL is
                             trained to close; zero at best
    log_z_is_nats            log (1/n) Σ exp(−U(x_i)) / q(x_i): importance sampling with the model as proposal; its
                             floor is the truth, which it may miss on either side
    effective_sample_size    (Σ w)² / (n Σ w²), the share of the draws that the estimate is worth

with U of `densities`, which may be unnormalised. A part of the density that the model misses altogether shows in
`log_z_is_nats`, which then lacks it, while the effective sample size can still look good: read them together.

Errors are standard errors; that of log Z is Ẑ's over Ẑ, itself measured on the weights that were seen.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dgm_core.capabilities import HasReparametrizedSample
from dgm_core.contract import DataSpec
from dgm_core.data import densities
from dgm_core.evaluation.record import Metric

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from dgm_core.evaluation.work import Work

AT_ONCE = 10_000  # draws: memory does not grow with their number


def step(work: Work) -> None:
    work.add(energy_metrics(work.model, work.spec, work.options.energy_draws))


def energy_metrics(model: object, spec: DataSpec, draws: int) -> dict[str, Metric]:
    """Of a model with `HasReparametrizedSample`, on data whose density is known; of others nothing.

    A density that is zero somewhere has no finite reverse KL to a model that is not, and none is reported.
    """
    if not isinstance(model, HasReparametrizedSample) or not spec.density:
        return {}
    target = densities.named(**spec.density)
    weights = log_weights(model, target, draws)
    log_z, effective = importance_sampled(weights)
    context = {"n": draws, "density": spec.density["name"], "of": "the model's own draws"}
    metrics = {
        "log_z_is_nats": Metric.of(log_z, target.log_z(), math.sqrt(max(1 / effective - 1, 0) / draws), **context),
        "effective_sample_size": Metric.of(effective, 1.0, unit="share of the draws", **context),
    }
    if target.everywhere:
        gap, error = target.log_z() - weights.mean().item(), (weights.std() / math.sqrt(draws)).item()
        metrics["reverse_kl_nats"] = Metric.of(gap, 0.0, error, log_z=target.log_z(), **context)
    return metrics


@torch.no_grad()
def log_weights(model: HasReparametrizedSample, target: densities.Density, draws: int) -> Float[Tensor, " draws"]:
    """−U(x) − log q(x) of the model's draws, float64, on the CPU."""
    parts = []
    for start in range(0, draws, AT_ONCE):
        x, log_q = model.rsample_with_log_prob(min(AT_ONCE, draws - start))
        parts.append((-target.energy(x.double()) - log_q.double()).cpu())
    return torch.cat(parts)


def importance_sampled(log_weights: Float[Tensor, " draws"]) -> tuple[float, float]:
    """log of the mean weight, and the effective sample size over the number of draws."""
    n, total = len(log_weights), log_weights.logsumexp(0)
    effective = (2 * total - (2 * log_weights).logsumexp(0)).exp() / n
    return (total - math.log(n)).item(), effective.item()
