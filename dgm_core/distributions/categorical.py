"""Categorical observations: a logit a level, which knows nothing of their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.distributions.observation import Observation, stored_dtype
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Categorical(Observation):
    """p(x = k) = softmax(θ)_k."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.params = levels

    def log_prob(self, x: Int[Tensor, " *shape"], theta: Float[Tensor, " *shape levels"]) -> Float[Tensor, " *shape"]:
        logits = promote(theta)
        chosen = x.long().expand(logits.shape[:-1]).unsqueeze(-1)
        return logits.gather(-1, chosen).squeeze(-1) - logits.logsumexp(-1)

    def mean(self, theta: Float[Tensor, " *shape levels"]) -> Float[Tensor, " *shape"]:
        shares = promote(theta).softmax(-1)
        return shares @ torch.arange(self.params, device=theta.device, dtype=shares.dtype)

    def sample(self, theta: Float[Tensor, " *shape levels"]) -> Int[Tensor, " *shape"]:
        logits = promote(theta)
        gumbel = -torch.empty_like(logits).exponential_().log()
        return (logits + gumbel).argmax(-1).to(stored_dtype(self.params))
