"""Neural variational inference and learning: the score function, centred and scaled. A. Mnih, K. Gregor, 2014.
arXiv:1402.0030, Algorithm 1.

    l ← (l − C_ψ(x) − c) / max(1, √v),   Δφ = l ∂ log q / ∂φ,   Δψ = l ∂ C_ψ / ∂ψ,

where c and v follow the mean and the variance of l − C_ψ(x) from batch to batch. Nothing here depends on h but l, so
the gradient stays unbiased, up to the positive factor 1 / max(1, √v).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dgm_core.objectives.score_function import score_function

if TYPE_CHECKING:
    from jaxtyping import Float


def nvil(
    log_p: Float[Tensor, " *B layers_and_one"],
    log_q: Float[Tensor, " *B layers"],
    residuals: Float[Tensor, " *B signals"],
    baselines: Float[Tensor, " *B signals"],
    centre: Float[Tensor, " signals"],
    variance: Float[Tensor, " signals"],
) -> Float[Tensor, " *B"]:
    """The surrogate that generative net, recognition net and baselines ascend; `residuals` is l − C_ψ."""
    reward = ((residuals - centre) / variance.sqrt().clamp_min(1)).detach()
    return score_function(log_p, log_q, reward) + (reward * baselines).sum(-1)
