"""A slow Gaussian sequence for a prior, and how near to it independent Gaussians can come.

A. Razavi, A. van den Oord, B. Poole, O. Vinyals, 2019. arXiv:1901.03416, section 2.1. In each of d dimensions

    z_1 ~ N(0, 1),   z_t = α z_{t−1} + √(1 − α²) ε_t,   ε_t ~ N(0, 1),      t = 2 … n,

so that every z_t has unit variance. A posterior of independent N(μ_t, σ_t²) has, with μ_0 = σ_0 = 0 and λ_1 = 1, λ_t =
1 − α² for t > 1,

    KL = Σ_t ½ ((σ_t² + α² σ_{t−1}² + (μ_t − α μ_{t−1})²) / λ_t − 1 + ln λ_t − ln σ_t²).

No posterior of that family comes nearer than μ = 0 and 1/σ_t² on the diagonal of the prior's precision: 1 / (1 − α²) at
both ends, (1 + α²) / (1 − α²) between. That is the committed rate,

    δ = ½ ((n − 2) ln(1 + α²) − ln(1 − α²))   a dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float


class AR1(nn.Module):
    """One `alphas` a dimension; tensors have the sequence before the dimensions."""

    alpha: Tensor
    log_noise: Tensor

    def __init__(self, alphas: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(alphas), persistent=False)
        noise = [math.log1p(-(a**2)) for a in alphas]  # in double precision: near α = 1 single has no digits left
        self.register_buffer("log_noise", torch.tensor(noise), persistent=False)

    def moments(self, z: Float[Tensor, " *B n d"]) -> tuple[Float[Tensor, " *B n d"], Float[Tensor, " n d"]]:
        """Mean and log-variance of each z_t given those before it."""
        return self.alpha * previous(z), self.log_lambda(z.shape[-2])

    def log_lambda(self, n: int) -> Float[Tensor, " n d"]:
        return F.pad(self.log_noise.expand(n - 1, -1), (0, 0, 1, 0))

    def kl(self, mean: Float[Tensor, " B n d"], log_variance: Float[Tensor, " B n d"]) -> Float[Tensor, " B n d"]:
        """KL of independent Gaussians from the prior, nats: the term of each t and dimension, none below zero."""
        log_lambda = self.log_lambda(mean.shape[-2])
        variance = log_variance.exp()
        spread = variance + self.alpha**2 * previous(variance) + (mean - self.alpha * previous(mean)).square()
        return 0.5 * (spread * (-log_lambda).exp() - 1 + log_lambda - log_variance)

    def nearest(self, n: int) -> Float[Tensor, " n d"]:
        """The log-variance of the nearest independent Gaussians, whose means are zero."""
        if n == 1:
            return torch.zeros_like(self.log_noise)[None]
        inside = (self.log_noise - (self.alpha**2).log1p()).expand(n - 2, -1)
        ends = self.log_noise[None]
        return torch.cat([ends, inside, ends])


def previous(z: Float[Tensor, " *B n d"]) -> Float[Tensor, " *B n d"]:
    """z_{t−1} in place of z_t; zero before the first."""
    return F.pad(z, (0, 0, 1, 0))[..., :-1, :]


def committed_rate(alpha: float, n: int) -> float:
    """δ of one dimension of a sequence of n, nats."""
    return 0.0 if n < 2 else 0.5 * ((n - 2) * math.log1p(alpha**2) - math.log1p(-(alpha**2)))


def alpha_for(rate: float, n: int) -> float:
    """The α ≥ 0 whose committed rate is `rate` nats; n ≥ 2."""
    # With u = −ln(1 − α²) the rate rises from 0 at u = 0 to at least `rate` at u = 2 · rate.
    u = _root(lambda u: 0.5 * ((n - 2) * math.log1p(-math.expm1(-u)) + u) - rate, 0.0, 2 * rate)
    return math.sqrt(-math.expm1(-u))


def variance_for(rate: float) -> float:
    """The σ² ≤ 1 at which KL(N(0, σ²) ‖ N(0, 1)) is `rate` nats: no N(μ, σ²) is nearer, whatever its mean."""
    # With v = −ln σ² it is ½ (e^−v − 1 + v), at least (v − 1) / 2, and rises with v.
    return math.exp(-_root(lambda v: 0.5 * (math.expm1(-v) + v) - rate, 0.0, 2 * rate + 1))


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Of a rising function, by bisection to the last bit."""
    while low < (middle := 0.5 * (low + high)) < high:
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return high
