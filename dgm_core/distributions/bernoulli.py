"""Bernoulli observations, for data of two levels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dgm_core.distributions.observation import Observation
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Bernoulli(Observation):
    """p(x = 1) = σ(θ)."""

    params = 1

    def log_prob(self, x: Int[Tensor, " *shape"], theta: Float[Tensor, " *shape 1"]) -> Float[Tensor, " *shape"]:
        logits = promote(theta[..., 0])
        return x.to(logits) * logits - F.softplus(logits)

    def mean(self, theta: Float[Tensor, " *shape 1"]) -> Float[Tensor, " *shape"]:
        return torch.sigmoid(promote(theta[..., 0]))

    def sample(self, theta: Float[Tensor, " *shape 1"]) -> Int[Tensor, " *shape"]:
        mean = self.mean(theta)
        return (torch.rand_like(mean) < mean).to(torch.uint8)
