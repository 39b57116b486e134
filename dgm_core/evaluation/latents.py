"""What latents hold: KL a dimension, active units, mutual information."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgm_core.capabilities import HasPosterior
from dgm_core.contract import Batch, GenerativeModel
from dgm_core.evaluation.examples import chunks
from dgm_core.evaluation.record import EvaluationConfig, Metric

if TYPE_CHECKING:
    from jaxtyping import Float

    from dgm_core.evaluation.work import Work

ACTIVE = 0.01  # Burda et al. 2016, appendix C


def step(work: Work) -> None:
    """Leaves `kl`."""
    if isinstance(work.model, HasPosterior):
        metrics, details, warnings = latent_metrics(work.model, work.test, work.options)
        work.add(metrics)
        work.result.details |= details
        work.warn(*warnings)
        work.kl = torch.tensor(details["kl_by_dimension"])


def kl_by_dimension(model: HasPosterior, examples: Batch, batch_size: int) -> Float[Tensor, " latents"]:
    """Mean KL(q(z_j | x) ‖ p(z_j)) over examples, nats."""
    parts = [model.kl(b.x, b.y, b.context).to("cpu", torch.float64) for b in _chunks(model, examples, batch_size)]
    return torch.cat(parts).mean(0)


def posterior_means(model: HasPosterior, examples: Batch, batch_size: int) -> tuple[Float[Tensor, " B latents"], str]:
    """E_q[z | x], and "mean"; where the posterior has no closed mean (a flow), one draw, and "draw"."""
    parts, how = [], "mean"
    for part in _chunks(model, examples, batch_size):
        q = model.posterior(part.x, part.y, part.context)
        try:
            z = q.mean
        except NotImplementedError:
            z, how = q.sample(), "draw"
        parts.append(z.cpu())
    return torch.cat(parts), how


def active_units(means: Float[Tensor, " B latents"], threshold: float = ACTIVE) -> Float[Tensor, " latents"]:
    """Whether Var_x(E_q[z_j | x]) exceeds the threshold (Burda et al. 2016, appendix C)."""
    return means.double().var(0) > threshold


def mutual_information(model: HasPosterior, examples: Batch, chunk: int = 64) -> float:
    """I(x; z) under q over the n examples, nats: E log q(z | x) − E log (1/n) Σ_j q(z | x_j), one z an example.

    It cannot exceed ln n (Hoffman & Johnson 2016). Where the posterior's density cannot be had at another example's
    z, `NotImplementedError` goes to the caller.
    """
    device = model.device if isinstance(model, GenerativeModel) else "cpu"
    batch = examples.to(device)
    q = model.posterior(batch.x, batch.y, batch.context)
    z = q.sample()
    n = z.shape[0]
    total = 0.0
    for start in range(0, n, chunk):
        rows = torch.arange(start, min(start + chunk, n), device=z.device)
        table = q.log_prob(z[rows].unsqueeze(1)).double()  # [i, j] = log q(z_i | x_j)
        own = table[torch.arange(len(rows), device=z.device), rows]
        total += (own - torch.logsumexp(table, 1) + math.log(n)).sum().item()
    return total / n


def latent_metrics(
    model: HasPosterior, examples: Batch, options: EvaluationConfig
) -> tuple[dict[str, Metric], dict[str, Any], list[str]]:
    """Metrics, the lists behind them, and warnings in words."""
    n = examples.x.shape[0]
    kl = kl_by_dimension(model, examples, options.batch_size)
    means, how = posterior_means(model, examples, options.batch_size)
    active = active_units(means)
    metrics = {
        "kl_nats": Metric.of(kl.sum().item(), n=n, latents=len(kl)),
        "active_units": Metric.of(float(active.sum()), n=n, latents=len(kl), threshold=ACTIVE, of=how),
    }
    count = min(n, options.mutual_information_examples)
    some = examples.rows(torch.linspace(0, n - 1, count).round().long())
    warnings: list[str] = []
    try:
        information = mutual_information(model, some)
        metrics["mutual_information_nats"] = Metric.of(information, n=count, most=math.log(count))
    except NotImplementedError:
        warnings.append("Mutual information is not measured: the posterior's density is known at its own draws only.")
    if not active.any():
        warnings.append(
            "The posterior has collapsed: no latent dimension depends on the data, so the decoder works alone. Warm "
            "the KL up (kl_warmup), keep some of it free (free_bits), or make the decoder weaker."
        )
    elif active.double().mean() < 0.1:
        warnings.append(
            f"Only {int(active.sum())} of {len(kl)} latent dimensions depend on the data; the others add nothing."
        )
    details = {"kl_by_dimension": kl.tolist(), "active": active.tolist()}
    return metrics, details, warnings


def _chunks(model: object, examples: Batch, size: int) -> Any:
    return chunks(examples, size, model.device if isinstance(model, GenerativeModel) else "cpu")
