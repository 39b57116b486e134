"""Planar flows. D. Rezende, S. Mohamed, 2015. arXiv:1505.05770, eqs. 10–13 and appendix A.1.

    f(z) = z + û tanh(wᵀz + b),   log |det ∂f/∂z| = log |1 + wᵀû (1 − tanh²(wᵀz + b))|

is invertible where wᵀû ≥ −1, which û = u + (m(wᵀu) − wᵀu) w / ‖w‖² ensures. It is closed in the direction that a
sampler takes; in the other one s + wᵀû tanh s = wᵀz' + b is solved for s, a monotone equation for each example.

Departures: the paper's m(x) = −1 + log(1 + eˣ) is −0.31 at 0, so that û grows like 1 / ‖w‖ as w → 0. Here m(x) =
−1 + log(1 + (e − 1) eˣ), which is 0 at 0: the same maps under other parameters (u moved along w), without the pole,
and u = 0 is the identity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.bijections.base import Bijection, Context
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

SHIFT = math.log(math.e - 1)  # where log(1 + eˣ) is one
STEPS = 40  # of Newton's method, at most: few equations take ten, the slowest found 30 (float64, a slope of 1e-14)


def planar(
    z: Float[Tensor, " B D"], w: Float[Tensor, " *B K D"], u: Float[Tensor, " *B K D"], b: Float[Tensor, " *B K"]
) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
    """K maps, one after another: f_K(… f_1(z)), and log |det|.

    The parameters are the whole batch's, (K, D), (K, D) and (K,), or each example's: (B, K, D), (B, K, D) and (B, K).
    """
    z, w, b = promote(z), promote(w), promote(b)
    u_hat, slope = constrained(w, promote(u))
    bends = []
    for w_k, u_k, b_k in zip(w.unbind(-2), u_hat.unbind(-2), b.unbind(-1), strict=True):
        h = torch.tanh((z * w_k).sum(1) + b_k)
        z = torch.addcmul(z, h.unsqueeze(1), u_k)
        bends.append(h)
    return z, _log_det(torch.stack(bends, 1), slope)


def planar_inverse(
    z: Float[Tensor, " B D"], w: Float[Tensor, " *B K D"], u: Float[Tensor, " *B K D"], b: Float[Tensor, " *B K"]
) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
    """What `planar` made z of, and log |det| of the way back. It can be differentiated once."""
    z, w, b = promote(z), promote(w), promote(b)
    u_hat, slope = constrained(w, promote(u))
    bends = []
    for k in reversed(range(w.shape[-2])):
        h = torch.tanh(_root((z * w[..., k, :]).sum(1) + b[..., k], slope[..., k]))
        z = torch.addcmul(z, h.unsqueeze(1), u_hat[..., k, :], value=-1)
        bends.append(h)
    return z, -_log_det(torch.stack(bends[::-1], 1), slope)


def constrained(
    w: Float[Tensor, " *B D"], u: Float[Tensor, " *B D"]
) -> tuple[Float[Tensor, " *B D"], Float[Tensor, " *B"]]:
    """û, and 1 + wᵀû > 0: the map's slope along w where tanh is steepest."""
    tiny = torch.finfo(w.dtype).tiny
    along = (w * u).sum(-1)
    slope = F.softplus(along + SHIFT).clamp_min(tiny)
    excess = (slope - 1 - along) / w.square().sum(-1).clamp_min(tiny)
    return torch.addcmul(u, excess.unsqueeze(-1), w), slope


class Planar(Bijection):
    """`depth` planar maps; `forward` is `planar`. Where a sampler takes the closed direction, wrap it in `Invert`.

    Args:
        amortised: the parameters come with the context, (B, `size`): w, u and b of all maps, in this order. Otherwise
            they are the layer's own, at first slight bends across random lines: w ~ N(0, I), u ~ N(0, 0.01²) and
            b ~ N(0, `spread`²).
    """

    def __init__(self, dims: int, depth: int, *, amortised: bool = False, spread: float = 2.0) -> None:
        super().__init__()
        self.dims, self.depth, self.amortised = dims, depth, amortised
        self.size = depth * (2 * dims + 1)
        if not amortised:
            self.w = nn.Parameter(torch.randn(depth, dims))
            self.u = nn.Parameter(0.01 * torch.randn(depth, dims))
            self.b = nn.Parameter(spread * torch.randn(depth))

    def forward(
        self, x: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        return planar(x, *self._steered(context))

    def inverse(
        self, z: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        return planar_inverse(z, *self._steered(context))

    def _steered(self, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if not self.amortised:
            return self.w, self.u, self.b
        assert context is not None, "amortised: the parameters come with the context"
        vectors = self.depth * self.dims
        w, u, b = context.split([vectors, vectors, self.depth], 1)
        return w.unflatten(1, (self.depth, self.dims)), u.unflatten(1, (self.depth, self.dims)), b


def _log_det(h: Float[Tensor, " B K"], slope: Float[Tensor, " *B K"]) -> Float[Tensor, " B"]:
    # 1 + wᵀû (1 − h²) as a sum of positive terms: near the limit of invertibility nothing cancels.
    square = h.square()
    return (square + slope * (1 - square)).log().sum(1)


def _root(d: Float[Tensor, " B"], slope: Float[Tensor, " *B"]) -> Float[Tensor, " B"]:
    """The s with g(s) = s + (slope − 1) tanh s = d, with the implicit function's gradient."""
    with torch.no_grad():
        # g is odd. For s ≥ 0 it is concave where slope > 1 and convex below, so that Newton's method cannot overshoot
        # from a start with g(s) ≤ d in the one case and g(s) ≥ d in the other.
        goal = d.abs()
        shifted, steepest = goal - (slope - 1), goal / slope
        s = torch.where(slope > 1, torch.maximum(shifted, steepest), torch.minimum(shifted, steepest))
        for _ in range(STEPS):
            h, last = torch.tanh(s), s
            s = s - (s - h + slope * h - goal) / (h.square() + slope * (1 - h.square()))
            if s.device.type != "meta" and bool(((s - last).abs() <= 4 * torch.finfo(s.dtype).eps * s).all()):
                break
        s = torch.where(d < 0, -s, s)
        h = torch.tanh(s)
        rate = h.square() + slope * (1 - h.square())
    return s - (s - h + slope * h - d) / rate  # one more step, whose gradient is that of the solution
