"""Diagonal Gaussians: densities, the KL divergence of a posterior, and observations of real-valued data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm_core.distributions.observation import Observation
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

LOG_TAU = math.log(2 * math.pi)


def log_normal(
    x: Float[Tensor, " *shape"], mean: Float[Tensor, " *shape"] | float, log_variance: Float[Tensor, " *shape"] | float
) -> Float[Tensor, " *shape"]:
    """log N(x; mean, exp(log_variance)), elementwise, in nats."""
    log_variance = torch.as_tensor(log_variance, dtype=x.dtype, device=x.device)
    return -0.5 * (LOG_TAU + log_variance + (x - mean).square() * torch.exp(-log_variance))


def kl_to_standard_normal(
    mean: Float[Tensor, " *shape"], log_variance: Float[Tensor, " *shape"]
) -> Float[Tensor, " *shape"]:
    """KL(N(mean, exp(log_variance)) ‖ N(0, 1)), elementwise, in nats (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class Gaussian(Observation):
    """N(μ, σ²) with a learned variance: the network's, a coordinate and an example, or one that all of them share.

    The network's log-variance is bounded below by `floor`, smoothly: a density has no greatest likelihood where σ may
    reach 0.
    """

    def __init__(self, variance: Literal["network", "shared"] = "network", floor: float = -10.0) -> None:
        super().__init__()
        self.params = 2 if variance == "network" else 1
        self.floor = floor
        self.log_variance = nn.Parameter(torch.zeros(())) if variance == "shared" else None

    def log_prob(self, x: Float[Tensor, " *shape"], theta: Float[Tensor, " *shape params"]) -> Float[Tensor, " *shape"]:
        mean, log_variance = self._moments(theta)
        return log_normal(x.to(mean.dtype), mean, log_variance)

    def mean(self, theta: Float[Tensor, " *shape params"]) -> Float[Tensor, " *shape"]:
        return promote(theta[..., 0])

    def sample(self, theta: Float[Tensor, " *shape params"]) -> Float[Tensor, " *shape"]:
        mean, log_variance = self._moments(theta)
        return (mean + (0.5 * log_variance).exp() * torch.randn_like(mean)).float()

    def _moments(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        mean = promote(theta[..., 0])
        if self.log_variance is not None:
            return mean, self.log_variance
        return mean, self.floor + F.softplus(promote(theta[..., 1]) - self.floor)
