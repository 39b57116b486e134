"""What latents hold: KL a dimension, active units, mutual information, reconstructions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgm_core.capabilities import HasCodes, HasDecoder, HasPosterior
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.evaluation.examples import chunks, nearest_stored, unit
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.record import EvaluationConfig, Metric
from dgm_core.shapes import mean_event

if TYPE_CHECKING:
    from jaxtyping import Float

ACTIVE = 0.01  # Burda et al. 2016, appendix C


def kl_by_dimension(model: HasPosterior, examples: Batch, batch_size: int) -> Float[Tensor, " latents"]:
    """Mean KL(q(z_j | x) ‖ p(z_j)) over examples, nats."""
    parts = [model.kl(b.x, b.y).to("cpu", torch.float64) for b in _chunks(model, examples, batch_size)]
    return torch.cat(parts).mean(0)


def posterior_means(model: HasPosterior, examples: Batch, batch_size: int) -> tuple[Float[Tensor, " B latents"], str]:
    """E_q[z | x], and "mean"; where the posterior has no closed mean (a flow), one draw, and "draw"."""
    parts, how = [], "mean"
    for part in _chunks(model, examples, batch_size):
        q = model.posterior(part.x, part.y)
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
    q = model.posterior(batch.x, batch.y)
    z = q.sample()
    n = z.shape[0]
    total = 0.0
    for start in range(0, n, chunk):
        rows = torch.arange(start, min(start + chunk, n), device=z.device)
        table = q.log_prob(z[rows].unsqueeze(1)).double()  # [i, j] = log q(z_i | x_j)
        own = table[torch.arange(len(rows), device=z.device), rows]
        total += (own - torch.logsumexp(table, 1) + math.log(n)).sum().item()
    return total / n


def can_reconstruct(model: GenerativeModel) -> bool:
    """By codes, or by a posterior and a decoder."""
    return isinstance(model, HasCodes) or (isinstance(model, HasPosterior) and isinstance(model, HasDecoder))


def reconstruct(model: GenerativeModel, examples: Batch, batch_size: int) -> tuple[Float[Tensor, " B *shape"], str]:
    """Means in data units, and what they were decoded from: "codes", or the posterior's "mean" or "draw"."""
    parts, how = [], "codes"
    for part in _chunks(model, examples, batch_size):
        if isinstance(model, HasCodes):
            decoded = model.decode_codes(model.codes(part.x, part.y), part.y, part.context)
        else:
            assert isinstance(model, HasPosterior)
            assert isinstance(model, HasDecoder)
            z, how = posterior_means(model, part, batch_size)
            decoded = model.decode(z.to(part.x.device), part.y, part.context)
        parts.append(decoded.cpu())
    return torch.cat(parts), how


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


def reconstruction_metrics(
    reconstructed: Float[Tensor, " B *shape"], how: str, examples: Batch, spec: DataSpec, judge: Judge | None
) -> dict[str, Metric]:
    """Mean squared error a coordinate, and whether the judge still recognises the example."""
    n = len(reconstructed)
    error = mean_event((unit(reconstructed, spec) - unit(examples.x, spec)).square()).double()
    scale = "[0, 1]" if spec.levels is not None else "data units"
    standard_error = (error.std() / math.sqrt(n)).item() if n > 1 else None
    metrics = {"reconstruction_mse": Metric.of(error.mean().item(), error=standard_error, n=n, units=scale, of=how)}
    if judge is not None and judge.kind == "classes":
        stored = nearest_stored(reconstructed, spec)
        labels = judge.classify(examples.x) if examples.y is None else examples.y
        agree = (judge.classify(stored) == labels).double()
        original = (judge.classify(examples.x) == labels).double().mean().item()
        against = "the judge on the original" if examples.y is None else "labels"
        metrics["reconstruction_agreement"] = Metric.of(
            agree.mean().item(), original, (agree.std() / math.sqrt(n)).item(), n=n, against=against
        )
    return metrics


def _chunks(model: object, examples: Batch, size: int) -> Any:
    return chunks(examples, size, model.device if isinstance(model, GenerativeModel) else "cpu")
