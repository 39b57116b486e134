"""Logistic observations integrated over each level's bin: ordered levels, with an honest mass at both ends.

Kingma et al. 2016 (arXiv:1606.04934), eq. 13; Salimans et al. 2017 (arXiv:1701.05517), eq. 2. On levels spread over
[−1, 1], a bin reaches half a level's width to either side, and the outermost two reach to infinity:

    p(x) = σ((x + w/2 − μ) / s) − σ((x − w/2 − μ) / s),   w = 2 / (levels − 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dgm_core.distributions.observation import Observation, stored_dtype
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class DiscretisedLogistic(Observation):
    """θ = (μ / (1 + s), log s), for levels spread over [−1, 1]; log s is bounded below by `floor`, smoothly.

    Coordinates that are nearly always at one of the ends drive s up. Were the first parameter μ itself, its gradient
    would then vanish like 1/s, and the two ends stay equally likely; measured in 1 + s it does not.
    """

    params = 2

    def __init__(self, levels: int, floor: float = -7.0) -> None:
        super().__init__()
        self.levels = levels
        self.floor = floor

    def log_prob(self, x: Int[Tensor, " *shape"], theta: Float[Tensor, " *shape 2"]) -> Float[Tensor, " *shape"]:
        """Exact and without cancellation: σ(a) − σ(b) = σ(a) σ(−b) (1 − e^{b − a})."""
        mean, log_scale = self._moments(theta)
        k = x.to(mean.dtype)
        precision = torch.exp(-log_scale)
        upper = (self._edge(k + 1) - mean) * precision
        lower = (self._edge(k) - mean) * precision
        width = 2 / (self.levels - 1) * precision
        first, last = k == 0, k == self.levels - 1
        inside = torch.where(first | last, 0.0, (-torch.expm1(-width)).log())
        return inside + torch.where(last, 0.0, F.logsigmoid(upper)) + torch.where(first, 0.0, F.logsigmoid(-lower))

    def mean(self, theta: Float[Tensor, " *shape 2"]) -> Float[Tensor, " *shape"]:
        """E[x] = Σ_{k ≥ 1} P(x ≥ k), in data units, summed a level at a time."""
        mean, log_scale = self._moments(theta)
        precision = torch.exp(-log_scale)
        total = torch.zeros_like(mean)
        for k in range(1, self.levels):
            total += torch.sigmoid((mean - self._edge(k)) * precision)
        return total

    def sample(self, theta: Float[Tensor, " *shape 2"]) -> Int[Tensor, " *shape"]:
        """The level whose bin a logistic draw falls into."""
        mean, log_scale = self._moments(theta)
        real = mean + log_scale.exp() * torch.logit(torch.rand_like(mean))
        k = ((real + 1) * (self.levels - 1) / 2).round().clamp(0, self.levels - 1)
        return k.to(stored_dtype(self.levels))

    def _edge(self, k: Tensor | float) -> Tensor | float:
        """The lower edge of level k's bin."""
        return (2 * k - 1) / (self.levels - 1) - 1

    def _moments(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.floor + F.softplus(promote(theta[..., 1]) - self.floor)
        return promote(theta[..., 0]) * (1 + log_scale.exp()), log_scale
