"""Contrastive divergence and its persistent form: one scalar whose gradient is the update, and its negative samples.

The likelihood's gradient is −∂F(v⁺)/∂θ averaged over data plus ∂F(v⁻)/∂θ averaged over the model. Both algorithms
put samples in place of the model's average and hold them fixed, so that the update descends

    mean F(v⁺) − mean F(v⁻).

CD-k takes v⁻ from k transitions that start at the data (Hinton 2002); PCD steps chains that are never restarted by k
transitions at the present parameters (Tieleman 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def contrast(positive: Float[Tensor, " B"], negative: Float[Tensor, " M"]) -> Float[Tensor, ""]:
    """mean F(v⁺) − mean F(v⁻), from the free energies of data and of samples (energies, where h is given too).

    Of use only through its gradient: its value bounds no likelihood.
    """
    return positive.mean() - negative.mean()


@torch.no_grad()
def run_chain(transition: Callable[[Tensor], Tensor], state: Tensor, steps: int) -> Tensor:
    """`steps` transitions from `state`, outside autograd, so that what comes out is held fixed."""
    for _ in range(steps):
        state = transition(state)
    return state
