"""Reconstructions: what a decoder makes of an example's codes, or of its posterior's mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.capabilities import HasCodes, HasDecoder, HasPosterior
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.evaluation.codes import encode
from dgm_core.evaluation.examples import chunks, nearest_stored, unit
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.latents import posterior_means
from dgm_core.evaluation.record import Metric
from dgm_core.shapes import mean_event

if TYPE_CHECKING:
    from jaxtyping import Float

    from dgm_core.evaluation.work import Work

LISTENS = 0.05  # a rise below it is none that could be seen


def step(work: Work) -> None:
    """Leaves `reconstructed`."""
    if can_reconstruct(work.model):
        work.reconstructed, how = reconstruct(work.model, work.test, work.options.batch_size)
        work.add(reconstruction_metrics(work.reconstructed, how, work.test, work.spec, work.judge))
        _exchange(work, work.reconstructed)


def _exchange(work: Work, own: Tensor) -> None:
    """A decoder that works alone reconstructs as well from another example's latent."""
    other = reconstruct_exchanged(work.model, work.test, work.options.batch_size)
    before, after = (_squared_error(x, work.test, work.spec).mean().item() for x in (own, other))
    rise = after / max(before, 1e-30) - 1
    about = "rise of the reconstruction error when examples exchange their latents, over that error"
    work.add({"exchanged_latent_rise": Metric.of(rise, n=len(own), exchanged_mse=after, unit=about)})
    if rise < LISTENS:
        work.warn(
            f"The decoder hardly listens to its latent: decoded from another example's, the reconstruction error "
            f"changes by {100 * rise:.1f} % only."
        )


def can_reconstruct(model: GenerativeModel) -> bool:
    """By codes, or by a posterior and a decoder."""
    return isinstance(model, HasCodes) or (isinstance(model, HasPosterior) and isinstance(model, HasDecoder))


def reconstruct(model: GenerativeModel, examples: Batch, batch_size: int) -> tuple[Float[Tensor, " B *shape"], str]:
    """Means in data units, and what they were decoded from: "codes", or the posterior's "mean" or "draw"."""
    parts, how = [], "codes"
    for part in chunks(examples, batch_size, model.device):
        if isinstance(model, HasCodes):
            decoded = model.decode_codes(model.codes(part.x, part.y), part.y, part.context)
        else:
            assert isinstance(model, HasPosterior)
            assert isinstance(model, HasDecoder)
            z, how = posterior_means(model, part, batch_size)
            decoded = model.decode(z.to(part.x.device), part.y, part.context)
        parts.append(decoded.cpu())
    return torch.cat(parts), how


def reconstruct_exchanged(model: GenerativeModel, examples: Batch, batch_size: int) -> Float[Tensor, " B *shape"]:
    """Each example's mean decoded from the codes or latent of another, its own label and context kept."""
    n = len(examples.x)
    round_robin = torch.randperm(n)
    source = torch.empty_like(round_robin)
    source[round_robin] = round_robin.roll(1)  # nobody keeps its own
    if isinstance(model, HasCodes):
        found = encode(model, examples, batch_size)
    else:
        assert isinstance(model, HasPosterior)
        found = {"z": posterior_means(model, examples, batch_size)[0]}
    parts, start = [], 0
    for part in chunks(examples, batch_size, model.device):
        rows = source[start : start + len(part.x)]
        start += len(part.x)
        given = {name: latent[rows].to(model.device) for name, latent in found.items()}
        if isinstance(model, HasCodes):
            decoded = model.decode_codes(given, part.y, part.context)
        else:
            assert isinstance(model, HasDecoder)
            decoded = model.decode(given["z"], part.y, part.context)
        parts.append(decoded.cpu())
    return torch.cat(parts)


def _squared_error(x: Tensor, examples: Batch, spec: DataSpec) -> Float[Tensor, " B"]:
    return mean_event((unit(x, spec) - unit(examples.x, spec)).square()).double()


def reconstruction_metrics(
    reconstructed: Float[Tensor, " B *shape"], how: str, examples: Batch, spec: DataSpec, judge: Judge | None
) -> dict[str, Metric]:
    """Mean squared error a coordinate, and whether the judge still recognises the example."""
    n = len(reconstructed)
    error = _squared_error(reconstructed, examples, spec)
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
