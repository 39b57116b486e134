"""Variational inference for Monte Carlo objectives. A. Mnih, D. J. Rezende, 2016. arXiv:1602.06725.

The bound L^K = E log (1/K) Σ_k w_k, w_k = p(x, h^k) / q(h^k | x), has the gradient

    E[Σ_k (L̂ − L̂_{−k}) ∂ log q(h^k | x) / ∂φ + Σ_k w̃_k ∂ log w_k],   w̃_k = w_k / Σ_j w_j,

where L̂ = log (1/K) Σ_k w_k and L̂_{−k} is the same with the geometric mean of the others in place of w_k: it does not
depend on h^k, so it leaves the gradient unbiased, and it needs no parameters.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def local_signals(log_weights: Float[Tensor, " B samples"]) -> Float[Tensor, " B samples"]:
    """L̂ − L̂_{−k}."""
    K = log_weights.shape[1]
    others = (log_weights.sum(1, keepdim=True) - log_weights) / (K - 1)
    replaced = torch.where(
        torch.eye(K, dtype=torch.bool, device=log_weights.device), others[:, :, None], log_weights[:, None]
    )
    return log_weights.logsumexp(1, keepdim=True) - replaced.logsumexp(2)


def vimco(log_p: Float[Tensor, " B samples"], log_q: Float[Tensor, " B samples"]) -> Float[Tensor, " B"]:
    """The surrogate that both nets ascend, of whole log p(x, h^k) and log q(h^k | x), K ≥ 2."""
    log_weights = log_p - log_q
    signals = local_signals(log_weights.detach())
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1]) + (signals * log_q).sum(1)
