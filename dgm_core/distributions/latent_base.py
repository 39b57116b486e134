"""Base distributions of flows: what the latent is drawn from, as modules that may hold parameters of their own.

`temperature` multiplies the latent's deviation from its centre: below 1 samples are nearer to the mode.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


class Base(nn.Module, ABC):
    """p(z | context) on flat latents."""

    @abstractmethod
    def log_prob(self, z: Float[Tensor, " B D"], context: Tensor | None = None) -> Float[Tensor, " B"]:
        """Nats."""

    @abstractmethod
    def sample(
        self, like: Float[Tensor, " B D"], context: Tensor | None = None, temperature: float = 1.0
    ) -> Float[Tensor, " B D"]:
        """Draws of the shape, type and device of `like`, whose values are not looked at."""


class StandardNormal(Base):
    """N(0, I)."""

    def log_prob(self, z: Float[Tensor, " B D"], context: Tensor | None = None) -> Float[Tensor, " B"]:
        return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))

    def sample(
        self, like: Float[Tensor, " B D"], context: Tensor | None = None, temperature: float = 1.0
    ) -> Float[Tensor, " B D"]:
        return temperature * torch.randn_like(like)


class StandardLogistic(Base):
    """Independent logistics, log p(z) = −Σ log(1 + e^z) + log(1 + e^−z) (Dinh et al. 2015, section 3.4)."""

    def log_prob(self, z: Float[Tensor, " B D"], context: Tensor | None = None) -> Float[Tensor, " B"]:
        return -(F.softplus(z) + F.softplus(-z)).sum(1)

    def sample(
        self, like: Float[Tensor, " B D"], context: Tensor | None = None, temperature: float = 1.0
    ) -> Float[Tensor, " B D"]:
        u = torch.rand_like(like).clamp_(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps)
        return temperature * torch.logit(u)
