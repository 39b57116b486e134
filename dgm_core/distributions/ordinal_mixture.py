"""A mixture of logistics over ordered levels, one number at a time: for audio of up to 65,536 levels.

Salimans et al. 2017 (arXiv:1701.05517), eqs. 1–2, as used by Parallel WaveNet (arXiv:1711.10433). On levels spread over
[−1, 1], a level's bin reaches w / 2 = 1 / (levels − 1) to either side, and the outermost two reach to infinity:

    P(x ≤ k) = Σ_i π_i σ((e_k − μ_i) / s_i),   e_k the upper edge of level k's bin,   P(x ≤ levels − 1) = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FAN = 16  # parts that a draw's search splits an interval of levels into
FLOOR = -7.0  # of log s at 256 levels, where a bin is then 8.6 s wide


@dataclass(frozen=True)
class OrdinalMixture:
    """θ = (logit, μ, log s) of each component; log s is bounded below, smoothly, by the same share of a bin."""

    levels: int
    components: int

    @property
    def params(self) -> int:
        """Numbers that the network gives."""
        return 3 * self.components

    def first(self) -> Float[Tensor, " params"]:
        """θ to start from: components alike, side by side over [−1, 1]."""
        one = torch.ones(self.components)
        means = (2 * torch.arange(self.components) + 1) / self.components - 1
        return torch.stack([0 * one, means, -math.log(self.components) * one], 1).flatten()

    def log_prob(self, x: Int[Tensor, " *shape"], theta: Float[Tensor, " *shape params"]) -> Float[Tensor, " *shape"]:
        """Exact and without cancellation: σ(a) − σ(b) = σ(a) σ(−b) (1 − e^{b − a})."""
        logits, mean, log_scale = self._split(theta)
        k = x[..., None].to(mean.dtype)
        precision = torch.exp(-log_scale)
        lower, upper = (self._edge(k) - mean) * precision, (self._edge(k + 1) - mean) * precision
        first, last = k == 0, k == self.levels - 1
        inside = (-torch.expm1(-2 / (self.levels - 1) * precision)).clamp_min(torch.finfo(mean.dtype).tiny)
        mass = torch.where(first | last, 0.0, inside.log())
        mass = mass + torch.where(last, 0.0, F.logsigmoid(upper)) + torch.where(first, 0.0, F.logsigmoid(-lower))
        return (logits.log_softmax(-1) + mass).logsumexp(-1)

    def draw(
        self, theta: Float[Tensor, " n params"], uniform: Float[Tensor, " n"], temperature: float = 1.0
    ) -> Int[Tensor, " n"]:
        """The least level k with P(x ≤ k) > u, found by splitting the levels into `FAN` parts again and again.

        `temperature` divides the logits of the shares and multiplies the scales.
        """
        logits, mean, log_scale = (t[:, None] for t in self._split(theta))
        share, precision = (logits / temperature).softmax(-1), torch.exp(-log_scale) / temperature
        parts = torch.arange(1, FAN, device=theta.device)
        level = torch.zeros_like(uniform, dtype=torch.int64)
        step = 1
        while step * FAN < self.levels:
            step *= FAN
        while step:
            starts = level[:, None] + step * parts  # of all parts but the first: beyond those whose P(x < start) ≤ u
            edges = self._edge(starts[..., None].to(mean.dtype))
            below = (share * torch.sigmoid((edges - mean) * precision)).sum(-1)
            level = level + step * ((below <= uniform[:, None]) & (starts < self.levels)).sum(1)
            step //= FAN
        return level

    def _edge(self, k: Tensor) -> Tensor:
        """The lower edge of level k's bin."""
        return (2 * k - 1) / (self.levels - 1) - 1

    def _split(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, means and log-scales, each (*shape, components)."""
        logits, mean, raw = promote(theta).unflatten(-1, (self.components, 3)).unbind(-1)
        floor = FLOOR - math.log((self.levels - 1) / 255)
        return logits, mean, floor + F.softplus(raw - floor)
