"""The importance-weighted bound. Y. Burda, R. Grosse, R. Salakhutdinov, 2016. arXiv:1509.00519."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def iwae(log_weights: Float[Tensor, " B samples"]) -> Float[Tensor, " B"]:
    """log (1/K) Σ_k w_k with w = p(x, z) / q(z | x) (eq. 8), nats an example.

    In expectation it does not fall as K grows and never exceeds log p(x) (theorem 1).
    """
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])
