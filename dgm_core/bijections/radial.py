"""Radial flows. D. Rezende, S. Mohamed, 2015. arXiv:1505.05770, eq. 14 and appendix A.2.

    f(z) = z + β̂ h (z − z₀),   h = 1 / (α + r),   r = ‖z − z₀‖,
    log |det ∂f/∂z| = (D − 1) log (1 + β̂ h) + log (1 + β̂ h − β̂ r h²)

is invertible where β̂ ≥ −α, which β̂ = −α + log(1 + e^β) ensures. Both directions are closed: the radius before is the
positive root of r² + (α + β̂ − R) r − α R = 0, where R is the radius after.

Departures: none; the paper leaves open how α stays positive, here α = log(1 + eᵃ).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.bijections.base import Bijection, Context
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


def radial(
    z: Float[Tensor, " B D"], z0: Float[Tensor, " *B K D"], a: Float[Tensor, " *B K"], b: Float[Tensor, " *B K"]
) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
    """K maps, one after another: f_K(… f_1(z)), and log |det|; a = b is the identity.

    The parameters are the whole batch's, (K, D), (K,) and (K,), or each example's: (B, K, D), (B, K) and (B, K).
    """
    z, z0 = promote(z), promote(z0)
    alpha, total = _positive(a), _positive(b)
    beta, radii = total - alpha, []
    for centre, alpha_k, beta_k in zip(z0.unbind(-2), alpha.unbind(-1), beta.unbind(-1), strict=True):
        offset = z - centre
        r = torch.linalg.vector_norm(offset, dim=1)
        z = torch.addcmul(z, (beta_k / (alpha_k + r)).unsqueeze(1), offset)
        radii.append(r)
    return z, _log_det(torch.stack(radii, 1), alpha, total, z.shape[1])


def radial_inverse(
    z: Float[Tensor, " B D"], z0: Float[Tensor, " *B K D"], a: Float[Tensor, " *B K"], b: Float[Tensor, " *B K"]
) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
    """What `radial` made z of, and log |det| of the way back."""
    z, z0 = promote(z), promote(z0)
    alpha, total = _positive(a), _positive(b)
    radii = []
    for k in reversed(range(z0.shape[-2])):
        centre, alpha_k, total_k = z0[..., k, :], alpha[..., k], total[..., k]
        offset = z - centre
        r = _radius_before(torch.linalg.vector_norm(offset, dim=1), alpha_k, total_k)
        z = torch.addcmul(centre, ((alpha_k + r) / (total_k + r)).unsqueeze(1), offset)
        radii.append(r)
    return z, -_log_det(torch.stack(radii[::-1], 1), alpha, total, z.shape[1])


class Radial(Bijection):
    """`depth` radial maps; `forward` is `radial`. Both directions are closed; `Invert` exchanges them.

    Args:
        amortised: the parameters come with the context, (B, `size`): z₀, a and b of all maps, in this order. Otherwise
            they are the layer's own, at first moderate pushes and pulls, z₀ ~ N(0, `spread`² I), a = 0 and b ~ N(0, 1):
            maps that start alike, next to the identity, come to share their work less well.
    """

    def __init__(self, dims: int, depth: int, *, amortised: bool = False, spread: float = 1.0) -> None:
        super().__init__()
        self.dims, self.depth, self.amortised = dims, depth, amortised
        self.size = depth * (dims + 2)
        if not amortised:
            self.z0 = nn.Parameter(spread * torch.randn(depth, dims))
            self.a = nn.Parameter(torch.zeros(depth))
            self.b = nn.Parameter(torch.randn(depth))

    def forward(
        self, x: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        return radial(x, *self._steered(context))

    def inverse(
        self, z: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        return radial_inverse(z, *self._steered(context))

    def _steered(self, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if not self.amortised:
            return self.z0, self.a, self.b
        assert context is not None, "amortised: the parameters come with the context"
        z0, a, b = context.split([self.depth * self.dims, self.depth, self.depth], 1)
        return z0.unflatten(1, (self.depth, self.dims)), a, b


def _positive(x: Tensor) -> Tensor:
    x = promote(x)
    return F.softplus(x).clamp_min(torch.finfo(x.dtype).tiny)


def _log_det(
    r: Float[Tensor, " B K"], alpha: Float[Tensor, " *B K"], total: Float[Tensor, " *B K"], dims: int
) -> Float[Tensor, " B"]:
    # With α + β̂ = total, both factors are quotients of sums of positive terms: near the limit nothing cancels.
    outer = (alpha + r).log()
    across = (total + r).log() - outer
    along = (r.square() + alpha * (2 * r + total)).log() - 2 * outer
    return ((dims - 1) * across + along).sum(1)


def _radius_before(
    after: Float[Tensor, " B"], alpha: Float[Tensor, " *B"], total: Float[Tensor, " *B"]
) -> Float[Tensor, " B"]:
    """The positive root of r² + (total − R) r − α R = 0, without cancellation."""
    gap = after - total
    doubled = gap.abs() + (gap.square() + 4 * alpha * after).sqrt()
    return torch.where(gap > 0, 0.5 * doubled, 2 * alpha * after / doubled)
