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
    rows = distributed.all_reduce(kl.new_full((), kl.shape[0]))
    return (distributed.all_reduce(kl.sum(0)) / rows).clamp_min(nats).sum()


def kl_weight(progress: float, warmup: float) -> float:
    """0 → 1 linearly over the first `warmup` share of training (Bowman et al. 2016, Sønderby et al. 2016)."""
    return 1.0 if warmup == 0 else min(1.0, progress / warmup)


def inverse_temperature(step: int, rounds: int) -> float:
    """β_t = min(1, 0.01 + t / T), by which the energy −log p(x, z) is annealed; 1 throughout where T is 0.

    Rezende & Mohamed 2015 (arXiv:1505.05770), eq. 20, whose T is 10,000.
    """
    return min(1.0, 0.01 + step / rounds) if rounds else 1.0
