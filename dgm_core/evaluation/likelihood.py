"""Likelihoods, by what a model can do: exact, bounded, importance-weighted, annealed; always of the stored data.

    nll_nats        −log p(x), exact: of `HasLikelihood` with `exact`, or F(x) + log Z by enumeration
    elbo_nats       a lower bound of log p(x), averaged over `elbo_draws` single samples; higher is better
    nll_isK_nats    −log (1/K) Σ_k w_k with K importance samples (Burda et al. 2016): at or above −log p(x) on average
    nll_ais_nats    F(x) + log Z, log Z by annealed importance sampling: tends to flatter the model
    nll_reverse_ais_nats    the same by reverse annealing: tends to slight it, so that the truth lies between
                    both from a variational bound of F, and so from above, where their context says `bound`
    bits_per_dim    of the original integers, from nll_nats or else from elbo_nats

Errors are standard errors of the mean over examples; the AIS ones have the interval of Ẑ (three standard errors) in
their context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgm_core.capabilities import HasEnergy, HasLikelihood
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.data.display import bits_per_dim, log_det
from dgm_core.evaluation import ais
from dgm_core.evaluation.codes import marginal_metric
from dgm_core.evaluation.examples import chunks
from dgm_core.evaluation.record import EvaluationConfig, Metric

if TYPE_CHECKING:
    from jaxtyping import Float

    from dgm_core.evaluation.work import Work


def step(work: Work) -> None:
    work.add(likelihood(work.model, work.test, work.spec, work.info, work.options))
    if work.spec.kind == "codes":
        work.add({"marginal_bits_per_dim": marginal_metric(work.train.x, work.test.x, work.spec)})


def likelihood(
    model: GenerativeModel, examples: Batch, spec: DataSpec, info: Mapping[str, Any], options: EvaluationConfig
) -> dict[str, Metric]:
    """All that the model's capabilities allow, of `examples`."""
    if isinstance(model, HasEnergy) and model.exact_log_z() is None:
        return _annealed(model, examples, spec, info, options)
    if isinstance(model, HasLikelihood):
        return _direct(model, examples, spec, info, options)
    if isinstance(model, HasEnergy):
        return _exact(-_free_energy(model, examples, options.batch_size) - _log_z(model), examples, spec, info)
    return {}


def countable(spec: DataSpec, info: Mapping[str, Any]) -> bool:
    """Whether bits per dimension mean something: the stored data are integers, or were made of integers."""
    return spec.levels is not None or info.get("original", {}).get("levels") is not None


def log_probs(model: HasLikelihood, examples: Batch, batch_size: int, *, samples: int = 1) -> Float[Tensor, " B"]:
    """log p of every example, float64, on the CPU."""
    device = model.device if isinstance(model, GenerativeModel) else "cpu"
    return _by_chunk(examples, batch_size, device, lambda b: model.log_prob(b.x, b.y, b.context, samples=samples))


def importance_weighted(
    model: HasLikelihood, examples: Batch, batch_size: int, *, samples: int, chunk: int
) -> Float[Tensor, " B"]:
    """log (1/K) Σ_k w_k, in chunks of importance samples: memory does not grow with K."""
    parts = []
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        parts.append(log_probs(model, examples, batch_size, samples=count) + math.log(count))
    return torch.logsumexp(torch.stack(parts), 0) - math.log(samples)


def mean_and_error(values: Float[Tensor, " n"]) -> tuple[float, float]:
    """The mean and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def _direct(
    model: GenerativeModel, examples: Batch, spec: DataSpec, info: Mapping[str, Any], options: EvaluationConfig
) -> dict[str, Metric]:
    assert isinstance(model, HasLikelihood)
    size = options.batch_size
    if model.exact:
        return _exact(log_probs(model, examples, size), examples, spec, info)
    n, draws, K = examples.x.shape[0], options.elbo_draws, options.importance_samples
    bound = torch.stack([log_probs(model, examples, size) for _ in range(draws)]).mean(0)
    mean, error = mean_and_error(bound)
    metrics = {"elbo_nats": Metric.of(mean, error=error, n=n, draws=draws)}
    if countable(spec, info):
        mean, error = mean_and_error(bits_per_dim(bound, examples.x, info))
        metrics["bits_per_dim"] = Metric.of(mean, error=error, n=n, draws=draws, bound="elbo")
    if K:
        some = examples.rows(torch.linspace(0, n - 1, min(n, options.importance_examples)).round().long())
        weighted = importance_weighted(model, some, size, samples=K, chunk=options.importance_chunk)
        mean, error = mean_and_error(-weighted)
        metrics[f"nll_is{K}_nats"] = Metric.of(mean, error=error, n=some.x.shape[0], importance_samples=K)
    return metrics


def _exact(log_prob: Tensor, examples: Batch, spec: DataSpec, info: Mapping[str, Any]) -> dict[str, Metric]:
    n = len(log_prob)
    mean, error = mean_and_error(-log_prob)
    entropy = info.get("density", {}).get("entropy")
    floor = None if entropy is None else entropy + log_det(examples.x, info).mean().item()
    metrics = {"nll_nats": Metric.of(mean, floor, error, n=n)}
    if countable(spec, info):
        mean, error = mean_and_error(bits_per_dim(log_prob, examples.x, info))
        metrics["bits_per_dim"] = Metric.of(mean, error=error, n=n)
    return metrics


def _annealed(
    model: HasEnergy, examples: Batch, spec: DataSpec, info: Mapping[str, Any], options: EvaluationConfig
) -> dict[str, Metric]:
    betas = ais.temperatures(options.ais_temperatures, options.ais_schedule)
    forward = ais.ais(model, chains=options.ais_chains, betas=betas)
    states = ais.model_states(model, forward, burn_in=options.ais_burn_in)
    reverse = ais.reverse_ais(model, states, betas=betas)
    energy, error = mean_and_error(_free_energy(model, examples, options.batch_size))
    extra: dict[str, Any] = {"bound": "variational"} if model.bounded else {}
    metrics = {}
    for name, found in (("nll_ais_nats", forward), ("nll_reverse_ais_nats", reverse)):
        interval = [energy + end if math.isfinite(end) else None for end in (found.low, found.high)]
        metrics[name] = Metric.of(
            energy + found.log_z,
            error=error,
            n=examples.x.shape[0],
            interval=interval,
            log_z=found.log_z if math.isfinite(found.log_z) else None,
            chains=options.ais_chains,
            temperatures=options.ais_temperatures,
            schedule=options.ais_schedule,
            effective_chains=found.effective if math.isfinite(found.effective) else None,
            **extra,
        )
    return metrics


def _free_energy(model: HasEnergy, examples: Batch, batch_size: int) -> Float[Tensor, " B"]:
    device = model.device if isinstance(model, GenerativeModel) else "cpu"
    return _by_chunk(examples, batch_size, device, lambda b: model.free_energy(b.x))


def _log_z(model: HasEnergy) -> float:
    log_z = model.exact_log_z()
    assert log_z is not None
    return log_z.item()


def _by_chunk(
    examples: Batch, size: int, device: torch.device | str, f: Callable[[Batch], Tensor]
) -> Float[Tensor, " B"]:
    return torch.cat([f(part).to("cpu", torch.float64) for part in chunks(examples, size, device)])
