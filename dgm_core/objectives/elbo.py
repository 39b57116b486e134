"""The evidence lower bound and what is done to its KL term in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dgm_core import distributed

if TYPE_CHECKING:
    from jaxtyping import Float


def elbo(log_likelihood: Float[Tensor, " B"], kl: Float[Tensor, " B latents"]) -> Float[Tensor, " B"]:
    """E_q[log p(x | z)] − KL(q(z | x) ‖ p(z)), nats an example."""
    return log_likelihood - kl.sum(1)


def free_bits(kl: Float[Tensor, " B latents"], nats: float) -> Float[Tensor, ""]:
    """Σ_j max(λ, mean over the global batch of KL_j): no reward for saving below λ nats a latent dimension.

    Kingma et al. 2016 (arXiv:1606.04934), eq. 15, a group being one dimension. The mean spans all ranks, because the
    maximum does not commute with it.
    """
    return _global_mean(kl).clamp_min(nats).sum()


def capacity_gap(kl: Float[Tensor, " B latents"], nats: float) -> Float[Tensor, ""]:
    """|mean over the global batch of KL − C|, the latents together: no reward for less than C nats, nor for more.

    Burgess et al. 2018 (arXiv:1804.03599), eq. 8. The mean spans all ranks, as that of `free_bits`.
    """
    return (_global_mean(kl).sum() - nats).abs()


def _global_mean(kl: Float[Tensor, " B latents"]) -> Float[Tensor, " latents"]:
    rows = distributed.all_reduce(kl.new_full((), kl.shape[0]))
    return distributed.all_reduce(kl.sum(0)) / rows


def kl_weight(progress: float, warmup: float) -> float:
    """0 → 1 linearly over the first `warmup` share of training (Bowman et al. 2016, Sønderby et al. 2016)."""
    return 1.0 if warmup == 0 else min(1.0, progress / warmup)


def inverse_temperature(t: float, end: float) -> float:
    """β_t = min(1, 0.01 + t / T), by which an energy such as −log p(x, z) is annealed; 1 throughout where T is 0.

    Rezende & Mohamed 2015 (arXiv:1505.05770), eq. 20, whose T is 10,000 updates; here t and T are both in rounds, or
    both shares of training.
    """
    return min(1.0, 0.01 + t / end) if end else 1.0
