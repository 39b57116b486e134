"""Control variates for the score function.
J. Paisley, D. Blei, M. Jordan, Variational Bayesian Inference with Stochastic Search, 2012. arXiv:1206.6430.

The terms of E_q f that have a closed form are differentiated in closed form; of the others, g(h) ≈ f(h) has a known
mean, so that for any a

    ∂/∂φ E_q f = E_q[(f − a g) ∂ log q / ∂φ] + a ∂/∂φ E_q g,

and a = Cov(f, g) / Var(g) makes f − a g vary least. Here f_i is layer i's learning signal without its own log q, whose
part is the layer's entropy, and g_i is f_i's expansion to first order in h^i about its mean μ^i = σ(z^i):
g_i(h) = f_i(μ) + (h − μ)·b, so that ∂ E_q g_i / ∂φ = b · ∂μ^i / ∂φ with b held fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def coefficient(covariance: Float[Tensor, " *B 2 2"]) -> Float[Tensor, " *B"]:
    """a = Cov(f, g) / Var(g) of the pair (f, g); 0 where g does not vary."""
    covariances, variances = covariance[..., 0, 1], covariance[..., 1, 1]
    varies = variances > 0
    return torch.where(varies, covariances / torch.where(varies, variances, 1), 0)


def control_variate(
    log_p: Float[Tensor, " *B layers_and_one"],
    log_q: Float[Tensor, " *B layers"],
    f: Float[Tensor, " *B layers"],
    g: Float[Tensor, " *B layers"],
    mean_g: Float[Tensor, " *B layers"],
    entropies: Float[Tensor, " *B layers"],
    a: Float[Tensor, " layers"],
) -> Float[Tensor, " *B"]:
    """The surrogate that both nets ascend. `mean_g` and `entropies` are differentiable in φ through layer i's own z."""
    signal = (f - a * g).detach()
    return log_p.sum(-1) + (signal * log_q + a * mean_g + entropies).sum(-1)
