"""Dequantisation: noise u ∈ [0, 1)ᴰ that is added to integers x, and its log-density given them.

log P(x) = log E_q [p(x + u) / q(u | x)] ≥ E_q [log p(x + u) − log q(u | x)]. Uniform noise: B. Uria et al., 2013.
arXiv:1306.0186; L. Theis et al., 2016. arXiv:1511.01844. Learnt noise: J. Ho et al., 2019. arXiv:1902.00275, section
3.1, eqs. 9–13.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.bijections.base import Bijection, no_log_det
from dgm_core.precision import promote
from dgm_core.shapes import sum_event

if TYPE_CHECKING:
    from jaxtyping import Float


class Dequantizer(nn.Module, ABC):
    """Draws u given x."""

    @abstractmethod
    def forward(self, x: Float[Tensor, " B *shape"]) -> tuple[Float[Tensor, " B *shape"], Float[Tensor, " B"]]:
        """x + u and log q(u | x)."""


class UniformDequantizer(Dequantizer):
    """u ~ U[0, 1)ᴰ, whatever x is."""

    def forward(self, x: Float[Tensor, " B *shape"]) -> tuple[Float[Tensor, " B *shape"], Float[Tensor, " B"]]:
        return x + torch.rand_like(x), no_log_det(x)


class VariationalDequantizer(Dequantizer):
    """u = σ(f(logit v; x)), v ~ U(0, 1)ᴰ: where the flow f is the identity, u is uniform.

    Args:
        flow: f, a bijection of the shape of x that is conditioned on what `see` makes of x.
        see: x / (levels − 1) − ½ -> the flow's context.
    """

    def __init__(self, flow: Bijection, see: nn.Module, levels: int) -> None:
        super().__init__()
        self.flow, self.see, self.levels = flow, see, levels

    def forward(self, x: Float[Tensor, " B *shape"]) -> tuple[Float[Tensor, " B *shape"], Float[Tensor, " B"]]:
        x = promote(x)
        smallest = torch.finfo(x.dtype).eps  # keeps both ends of the logit finite
        start = torch.logit(torch.rand_like(x), eps=smallest)
        end, log_det = self.flow(start, self.context(x))
        # log q(u | x) = log p(v) − log |du/dv|, and v has density one.
        return x + end.sigmoid(), log_slope(start) - log_det - log_slope(end)

    def context(self, x: Float[Tensor, " B *shape"]) -> Tensor:
        """What f is conditioned on."""
        return self.see(x / (self.levels - 1) - 0.5)


def log_slope(y: Float[Tensor, " B *shape"]) -> Float[Tensor, " B"]:
    """log |det ∂σ(y)/∂y|."""
    return -sum_event(F.softplus(y) + F.softplus(-y))
