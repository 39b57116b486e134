"""What the models with a flow for a posterior are measured against: autograd's Jacobian, a posterior that is known."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from dgm_core.capabilities import HasLikelihood
from dgm_core.contract import DataSpec
from dgm_core.distributions.flow_posterior import Draws, FlowPosterior
from dgm_core.models.latent.amortised import AmortisedModel

BINARY = DataSpec("image", (1, 2, 3), 2, classes=3)
VECTOR = DataSpec("vector", (3,), None)
# Exact algebra in float64 through a few maps of slopes below a hundred.
EXACT = {"rtol": 0, "atol": 1e-8}
SIGMAS = 5  # standard errors that an estimate may be off: once in two million


def build(kind: type[AmortisedModel], data: DataSpec, scale: float = 0.3, **config: Any) -> Any:
    """The tiny model in float64, its parameters moved so that no map is next to the identity."""
    torch.manual_seed(0)
    model = kind(kind.tiny(data)[0].merged(config), data).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model


def every_binary_image() -> Tensor:
    return torch.cartesian_prod(*[torch.arange(2)] * 6).reshape(-1, 1, 2, 3).to(torch.uint8)


def density_by_jacobian(q: FlowPosterior, draws: Draws, row: int, column: int) -> Tensor:
    """log q of one draw: log q₀(z₀) minus log |det| of autograd's Jacobian of z₀ ↦ z."""
    assert q.maps is not None
    assert q.context is not None
    maps, steering = q.maps, q.context[row : row + 1].detach()
    start = draws.start[row, column].detach()
    jacobian = torch.autograd.functional.jacobian(lambda z: maps(z[None], steering)[0][0], start)
    base = Normal(q.start_mean[row], (0.5 * q.log_variance[row]).exp())
    return base.log_prob(start).sum() - torch.linalg.slogdet(jacobian)[1]


@torch.no_grad()
def know_the_posterior(model: AmortisedModel, gain: float = 1.0) -> MultivariateNormal:
    """Make a linear model (two latents, VECTOR, one variance) infer exactly, and give the exact p(x).

    The decoder's columns are orthogonal, so that the posterior's covariance is diagonal: σ² / (σ² + ‖w‖²). The maps are
    taken to multiply z₀ by `gain`.
    """
    decoder, encoder = model.decoder[-1], model._head  # type: ignore[index]
    assert isinstance(decoder, nn.Linear)
    W = torch.tensor([[1.0, 0.5], [2.0, -0.25], [0.0, 1.5]], dtype=torch.float64)
    assert (W[:, 0] @ W[:, 1]).item() == 0
    b, noise = torch.tensor([0.3, -1.0, 0.2], dtype=torch.float64), 0.4
    decoder.weight.copy_(W)
    decoder.bias.copy_(b)
    model.observation.log_variance.fill_(math.log(noise))  # type: ignore[union-attr, operator]
    variance = noise / (noise + W.square().sum(0))
    weight = (variance / noise)[:, None] * W.t() / gain
    encoder.weight[:2], encoder.bias[:2] = weight, -weight @ b
    encoder.weight[2:4], encoder.bias[2:4] = 0.0, variance.log() - 2 * math.log(gain)
    return MultivariateNormal(b, W @ W.t() + noise * torch.eye(3, dtype=torch.float64))


@torch.no_grad()
def estimates(model: HasLikelihood, x: Tensor, counts: tuple[int, ...], repeats: int) -> list[tuple[float, float]]:
    """Of each K: the importance-weighted bound's mean over examples and its standard error over repeats."""
    found = []
    for K in counts:
        values = torch.stack([model.log_prob(x, samples=K).mean() for _ in range(repeats)])
        found.append((values.mean().item(), values.std().item() / math.sqrt(repeats)))
    return found


def rises_to(model: HasLikelihood, x: Tensor, truth: float) -> None:
    """The importance-weighted bound rises with K, from below the exact value up to it."""
    found = estimates(model, x, (1, 10, 100, 1000), 20)
    for (lower, low_error), (higher, high_error) in pairwise(found):
        assert lower < higher + SIGMAS * (low_error + high_error)
    assert found[0][0] < truth - 0.05  # there is a gap to close
    # What is left of it at K = 1000 is of second order: 0.02 nats.
    assert found[-1][0] == pytest.approx(truth, abs=0.02 + SIGMAS * found[-1][1])


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two samples have the same mean, within what they scatter by."""
    error = math.sqrt(a.var().item() / a.numel() + b.var().item() / b.numel())
    return abs(a.mean().item() - b.mean().item()) < SIGMAS * error
