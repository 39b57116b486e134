"""Penalties that keep a layer's filters apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.precision import full_precision, promote

if TYPE_CHECKING:
    from jaxtyping import Float


def orthogonal_penalty(weights: Iterable[Float[Tensor, " O *others"]]) -> Float[Tensor, ""]:
    """Σ ‖WᵀW ⊙ (1 − I)‖²_F over the weights, a filter of each a column of its W.

    A. Brock, J. Donahue, K. Simonyan, 2018. arXiv:1809.11096, eq. 3 with β = 1: filters are to be orthogonal, of
    whatever length.
    """
    return torch.stack([_of_one(promote(weight.flatten(1))) for weight in weights]).sum()


def _of_one(filters: Float[Tensor, " O D"]) -> Float[Tensor, ""]:
    outputs, inputs = filters.shape
    with full_precision(filters.device):
        if outputs <= inputs:
            gram = filters @ filters.T
            return (gram - gram.diag().diag()).square().sum()
        # More filters than dimensions: Σᵢⱼ (wᵢ·wⱼ)² is also the sum of squares of the other, smaller Gram matrix. They
        # cannot all be orthogonal, so that what is left without the diagonal is not a small difference of large sums.
        gram = filters.T @ filters
        return gram.square().sum() - filters.square().sum(1).square().sum()
