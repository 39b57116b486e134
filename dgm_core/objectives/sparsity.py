"""Sparse hidden units. G. Hinton, A Practical Guide to Training Restricted Boltzmann Machines, 2010, section 11.

With the target p and q_j, the running mean of unit j's probability of being on, the penalty is the cross entropy
−p log q_j − (1 − p) log(1 − q_j); its derivative with respect to the unit's total input is q_j − p, and reaches the
unit's bias and its incoming weights alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def sparsity(mean_input: Float[Tensor, " h"], activity: Float[Tensor, " h"], target: float) -> Float[Tensor, ""]:
    """Σ_j (q_j − p) ⟨a_j⟩, of the units' total inputs averaged over a batch: of use only through its gradient.

    Linear in the batch's examples, as q_j is given, so that pieces of a batch add up to the whole.
    """
    return ((activity - target).detach() * mean_input).sum()
