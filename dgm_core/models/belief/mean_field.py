"""The mean-field bound of a sigmoid belief net and its E-step.
L. Saul, T. Jaakkola, M. Jordan, Mean Field Theory for Sigmoid Belief Networks, 1996. arXiv:cs/9603102.

q(h) = Π μ_i^{h_i} (1 − μ_i)^{1 − h_i} over all hidden units, one set of μ an example. In the bound
log p(x) ≥ E_q log p(x, h) + H(q) the term E ln(1 + e^z) has no closed form; for any ξ it is at most

    φ(ξ) = ξ E z + ln E[e^{−ξz} + e^{(1 − ξ)z}],   where   E e^{tz} = e^{tb} Π_j (1 − μ_j + μ_j e^{t W_j}).

So one ξ a unit that has parents makes a bound in closed form. With μ = σ(m) a factor of the product is
exp(softplus(m + t W) − softplus(m)), which neither overflows nor cancels.

The E-step ascends the bound one unit's μ at a time and then every ξ. As a function of one μ the bound is its entropy,
a linear term, and −ln of linear functions, which are convex: the paper's fixed-point equation μ ← σ(slope of all but
the entropy) maximises a lower bound that touches at the present μ, so no update lowers the bound. φ is convex: a Newton
step is taken where it lowers φ, else a step of 1 / sup φ'', with φ'' ≤ V + V² / 4 and V = Σ_j W_j² / 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_core.nn.belief import SigmoidBeliefNet, log_bernoulli
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

_STEEP = 80.0  # e^80 is within fp32's range; a slope as steep as that switches a unit on or off for good


class Field(NamedTuple):
    """The bound's variational parameters, example by example."""

    logits: list[Tensor]  # m of h¹, …, h^L: (B, n)
    tilts: list[Tensor]  # ξ of x, h¹, …, h^{L−1}: (B, n)

    def means(self, x: Float[Tensor, " B v"]) -> list[Tensor]:
        """x, μ¹, …, μ^L."""
        return [x, *(torch.sigmoid(m) for m in self.logits)]

    def log_prob(self, hidden: list[Tensor]) -> Float[Tensor, " B count"]:
        """log q(h) of (B, count, n) states."""
        return torch.stack([log_bernoulli(h, m[:, None]) for h, m in zip(hidden, self.logits, strict=True)]).sum(0)


def start(net: SigmoidBeliefNet, x: Float[Tensor, " B v"]) -> Field:
    """The generative net's own means, passed from the top down."""
    logits = [promote(net.prior).expand(len(x), -1)]
    for level in range(len(net.layers) - 1, 0, -1):
        logits.insert(0, net.inputs(level, torch.sigmoid(logits[0])))
    tilts = [torch.sigmoid(net.inputs(level, torch.sigmoid(m))) for level, m in enumerate(logits)]
    return Field([m.clone() for m in logits], tilts)


def bound(net: SigmoidBeliefNet, x: Float[Tensor, " B v"], field: Field) -> Float[Tensor, " B"]:
    """The lower bound of log p(x), differentiable in the net's parameters."""
    means = field.means(x)
    total = log_bernoulli(means[-1], promote(net.prior))
    for level, (m, tilt) in enumerate(zip(field.logits, field.tilts, strict=True)):
        weight, bias = net.affine(level)
        inputs = means[level + 1] @ weight.T + bias
        total = total + (means[level] * inputs - _phi(weight, bias, m, tilt, inputs)).sum(1)
        total = total + (F.softplus(m) - m * means[level + 1]).sum(1)  # H(q)
    return total


@torch.no_grad()
def e_step(net: SigmoidBeliefNet, x: Float[Tensor, " B v"], sweeps: int, tolerance: float) -> Field:
    """Sweep until no mean of an example moves by more than `tolerance`, `sweeps` times at most.

    An example stops by itself, so that its field does not depend on which others are beside it.
    """
    field = start(net, x)
    active = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
    for _ in range(sweeps):
        swept = _choose(active, sweep(net, x, field), field)
        moves = [(a - b).abs() for a, b in zip(swept.means(x)[1:], field.means(x)[1:], strict=True)]
        active = active & (torch.cat(moves, 1).amax(1, keepdim=True) > tolerance)
        field = swept
        if x.device.type != "meta" and not active.any():
            break
    return field


@torch.no_grad()
def sweep(net: SigmoidBeliefNet, x: Float[Tensor, " B v"], field: Field) -> Field:
    """One pass of coordinate ascent: layer by layer from below, each unit's μ in turn, then the ξ beneath the layer."""
    logits, tilts = [m.clone() for m in field.logits], list(field.tilts)
    for level, m in enumerate(logits):
        weight, bias = net.affine(level)
        child = x if level == 0 else torch.sigmoid(logits[level - 1])
        top = level == len(logits) - 1
        own = promote(net.prior).expand_as(m) if top else net.inputs(level + 1, torch.sigmoid(logits[level + 1]))
        _update_means(weight, bias, child, tilts[level], m, own)
        tilts[level] = _update_tilts(weight, bias, m, tilts[level])
    return Field(logits, tilts)


def _choose(rows: Tensor, yes: Field, no: Field) -> Field:
    """`yes` where `rows` holds."""

    def pick(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return [torch.where(rows, s, t) for s, t in zip(a, b, strict=True)]

    return Field(pick(yes.logits, no.logits), pick(yes.tilts, no.tilts))


def _update_means(weight: Tensor, bias: Tensor, child: Tensor, tilt: Tensor, logits: Tensor, own: Tensor) -> None:
    """One unit after the other, in place: m_j ← own input + Σ_i W_ij (μ_i − ξ_i) − Σ_i ∂ ln E[…]_i / ∂μ_j."""
    drive = own + (child - tilt) @ weight
    low, high = _log_moments(weight, bias, logits, tilt)  # ln E e^{−ξz}, ln E e^{(1 − ξ)z}
    for j in range(logits.shape[1]):
        a, w, m = -tilt * weight[:, j], weight[:, j], logits[:, j, None]
        share = torch.sigmoid(high - low)
        slope = (1 - share) * _slope(m, a) + share * _slope(m, a + w)
        new = drive[:, j, None] - slope.sum(1, keepdim=True)
        low = low + _log_factor(new, a) - _log_factor(m, a)
        high = high + _log_factor(new, a + w) - _log_factor(m, a + w)
        logits[:, j] = new[:, 0]


def _update_tilts(weight: Tensor, bias: Tensor, logits: Tensor, tilt: Tensor) -> Tensor:
    """A step down φ for every ξ of a layer."""
    m, w = logits[:, None], weight
    a = -tilt[..., None] * w
    p0, p1 = torch.sigmoid(m + a), torch.sigmoid(m + a + w)  # means under q tilted by e^{−ξz} and by e^{(1 − ξ)z}
    mean0, mean1 = bias + (p0 * w).sum(-1), bias + (p1 * w).sum(-1)
    variance0, variance1 = (p0 * (1 - p0) * w.square()).sum(-1), (p1 * (1 - p1) * w.square()).sum(-1)
    inputs = torch.sigmoid(logits) @ w.T + bias
    low, high = _log_moments(weight, bias, logits, tilt)
    share = torch.sigmoid(high - low)
    slope = inputs - (1 - share) * mean0 - share * mean1
    curvature = (1 - share) * variance0 + share * variance1 + share * (1 - share) * (mean1 - mean0).square()
    v = w.square().sum(1) / 4
    tiny = torch.finfo(tilt.dtype).tiny
    newton = (tilt - slope / curvature.clamp_min(tiny)).clamp(0, 1)
    careful = (tilt - slope / (v + v.square() / 4).clamp_min(tiny)).clamp(0, 1)
    better = _phi(weight, bias, logits, newton, inputs) <= _phi(weight, bias, logits, tilt, inputs)
    return torch.where(better, newton, careful)


def _phi(weight: Tensor, bias: Tensor, logits: Tensor, tilt: Tensor, inputs: Tensor) -> Float[Tensor, " B v"]:
    """The bound of E ln(1 + e^z)."""
    return tilt * inputs + torch.logaddexp(*_log_moments(weight, bias, logits, tilt))


def _log_moments(weight: Tensor, bias: Tensor, logits: Tensor, tilt: Tensor) -> tuple[Tensor, Tensor]:
    """ln E e^{−ξz} and ln E e^{(1 − ξ)z}, (B, v) each."""
    a = -tilt[..., None] * weight
    m = logits[:, None]
    return -tilt * bias + _log_factor(m, a).sum(-1), (1 - tilt) * bias + _log_factor(m, a + weight).sum(-1)


def _log_factor(m: Tensor, a: Tensor) -> Tensor:
    """ln(1 − μ + μ e^a)."""
    return F.softplus(m + a) - F.softplus(m)


def _slope(m: Tensor, a: Tensor) -> Tensor:
    """∂ ln(1 − μ + μ e^a) / ∂μ = (e^a − 1) / (1 − μ + μ e^a)."""
    fall = -_log_factor(m, a)
    return torch.exp((a + fall).clamp_max(_STEEP)) - torch.exp(fall.clamp_max(_STEEP))
