"""How far a code is from factorial, and what predictability minimisation makes of it.

A code y ∈ [0, 1]ⁿ is factorial where its units are independent. Terms of the game are J. Schmidhuber, 1992. Learning
factorial codes by predictability minimization. Neural Computation 4(6), 863-879, here as means over examples; measures
are of units read as bits, on or off at ½, in nats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.nn.norm import batch_moments
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def conditioned_variance(y: Float[Tensor, " B n"], predicted: Float[Tensor, " B n"]) -> Float[Tensor, ""]:
    """V_C = ½ E Σᵢ (Pᵢ − yᵢ)² (eq. 5): what predictors minimise (eq. 1) and units maximise."""
    return 0.5 * (promote(predicted) - promote(y)).square().sum(1).mean()


def variance(y: Float[Tensor, " B n"]) -> Float[Tensor, ""]:
    """V = ½ E Σᵢ (ȳᵢ − yᵢ)² (section 4.2), ȳ over all ranks: greatest where every unit is on in half of the cases."""
    return 0.5 * batch_moments(y)[1].sum()


def predictability(y: Float[Tensor, " B n"], predicted: Float[Tensor, " B n"]) -> Float[Tensor, ""]:
    """H = ½ E Σᵢ (Pᵢ − ȳᵢ)² (eq. 2), ȳ over all ranks: zero where nothing better than a constant is predicted.

    Where predictors are conditional expectations, V_C = V − H.
    """
    return 0.5 * (promote(predicted) - batch_moments(y)[0]).square().sum(1).mean()


def entropy(bits: Bool[Tensor, " N n"]) -> Float[Tensor, " n"]:
    """Of each unit alone."""
    on = bits.double().mean(0)
    return -(torch.xlogy(on, on) + torch.xlogy(1 - on, 1 - on))


def pairwise_information(bits: Bool[Tensor, " N n"]) -> Float[Tensor, " n n"]:
    """I(bᵢ; bⱼ) of the examples' own distribution; the diagonal is the entropy."""
    b = bits.double()
    on = b.mean(0)
    both = b.T @ b / b.shape[0]
    total = torch.zeros_like(both)
    for joint, first, second in (
        (both, on, on),
        (on[:, None] - both, on, 1 - on),
        (on[None] - both, 1 - on, on),
        (1 - on[:, None] - on[None] + both, 1 - on, 1 - on),
    ):
        joint = joint.clamp_min(0)  # a difference of equal shares, rounded
        total = total + torch.xlogy(joint, joint) - torch.xlogy(joint, first[:, None] * second[None])
    return total


def total_correlation(bits: Bool[Tensor, " N n"]) -> Float[Tensor, ""]:
    """Σᵢ H(bᵢ) − H(b): the distance of the whole code from the product of its marginals.

    By counting the codes that occur, which needs many more examples than there are.
    """
    counts = torch.unique(bits, dim=0, return_counts=True)[1].double()
    share = counts / counts.sum()
    return entropy(bits).sum() + torch.xlogy(share, share).sum()


def predictors_information(bits: Bool[Tensor, " N n"], predicted: Float[Tensor, " N n"]) -> Float[Tensor, " n"]:
    """H(bᵢ) + E log Pᵢ(bᵢ), Pᵢ read as the probability that unit i is on: at most I(bᵢ; what Pᵢ sees).

    Negative where a predictor is worse than a constant.
    """
    p = predicted.double().clamp(1e-6, 1 - 1e-6)
    return entropy(bits) + torch.where(bits, p, 1 - p).log().mean(0)
