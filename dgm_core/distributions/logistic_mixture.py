"""Mixtures of discretised logistics over whole pixels, with coupled channels.

T. Salimans, A. Karpathy, X. Chen, D. P. Kingma, 2017. arXiv:1701.05517, section 2.1 and 2.2. Levels lie spread over
[−1, 1], w = 2 / (levels − 1) apart; a component's mass at a level is that of a logistic between half a distance below
and half a distance above, the outermost two reaching to infinity (eq. 2):

    p(x | π, μ, s) = Σ_k π_k Π_c [σ((x_c + w/2 − μ_kc) / s_kc) − σ((x_c − w/2 − μ_kc) / s_kc)],
    μ_kc(x) = m_kc + Σ_{c' < c} tanh(a_kcc') x_c'                           (eq. 3; the tanh as in the authors' code).

A component is one for all channels of a pixel, so that channels depend on each other through it as well.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Components(NamedTuple):
    """θ in parts."""

    log_share: Float[Tensor, " B K *grid"]
    mean: Float[Tensor, " B C K *grid"]
    log_scale: Float[Tensor, " B C K *grid"]
    coupling: Float[Tensor, " B C*(C-1)/2 K *grid"]  # of channel 1 to 0, of 2 to 0, of 2 to 1 …


class LogisticMixture:
    """θ (B, params, *grid), for a pixel of ordered integers in {0, …, levels − 1}^channels.

    Its numbers are, for each component, a logit, then a mean and a log-scale of each channel, then a coupling of each
    channel to each one before it. Log-scales are bounded below by `floor`. Computes in float32 at least.
    """

    def __init__(self, levels: int, channels: int, components: int, floor: float = -7.0) -> None:
        self.levels, self.channels, self.components, self.floor = levels, channels, components, floor
        self.pairs = channels * (channels - 1) // 2
        self.params = components * (1 + 2 * channels + self.pairs)

    def log_prob(
        self, x: Int[Tensor, " B C *grid"], theta: Float[Tensor, " B params *grid"]
    ) -> Float[Tensor, " B *grid"]:
        """Nats of whole pixels."""
        parts = self._split(theta)
        joint = parts.log_share
        for c in range(self.channels):
            joint = joint + self._channel(parts, x, c, x[:, c, None])
        return joint.logsumexp(1)

    def log_masses(
        self, theta: Float[Tensor, " n params"], x: Int[Tensor, " n C"], c: int
    ) -> Float[Tensor, " n levels"]:
        """Log-probabilities of all levels of channel c given the earlier channels of `x`.

        The earlier channels say which component the pixel is likely of: π_k is weighted by Π_{c' < c} p_k(x_c').
        """
        parts = self._split(theta)
        joint = parts.log_share
        for earlier in range(c):
            joint = joint + self._channel(parts, x, earlier, x[:, earlier, None])
        every = torch.arange(self.levels, device=x.device)
        spread = Components(*(part[..., None] for part in parts))
        masses = self._channel(spread, x[..., None], c, every)
        return (joint.log_softmax(1)[..., None] + masses).logsumexp(1)

    def _channel(self, parts: Components, x: Tensor, c: int, value: Tensor) -> Float[Tensor, " B K *grid"]:
        """Each component's log-mass at `value` of channel c, given the earlier channels of `x`."""
        mean = parts.mean[:, c]
        for earlier in range(c):
            coupling = parts.coupling[:, c * (c - 1) // 2 + earlier].tanh()
            mean = mean + coupling * self._position(x[:, earlier, None].to(mean.dtype))
        return self._log_mass(value, mean, parts.log_scale[:, c].clamp_min(self.floor))

    def _log_mass(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        """Without cancellation: σ(b) − σ(a) = σ(b) σ(−a) (1 − e^{a − b})."""
        k = x.to(mean.dtype)
        precision = (-log_scale).exp()
        upper = (self._position(k + 0.5) - mean) * precision
        lower = (self._position(k - 0.5) - mean) * precision
        first, last = x == 0, x == self.levels - 1
        inside = torch.where(first | last, 0.0, _log_one_minus_exp(math.log(2 / (self.levels - 1)) - log_scale))
        return inside + torch.where(last, 0.0, F.logsigmoid(upper)) + torch.where(first, 0.0, F.logsigmoid(-lower))

    def _position(self, k: Tensor) -> Tensor:
        return k * (2 / (self.levels - 1)) - 1

    def _split(self, theta: Float[Tensor, " B params *grid"]) -> Components:
        K, C = self.components, self.channels
        share, mean, log_scale, coupling = promote(theta).split((K, K * C, K * C, K * self.pairs), 1)
        by_channel = (t.unflatten(1, (n, K)) for t, n in ((mean, C), (log_scale, C), (coupling, self.pairs)))
        return Components(share.log_softmax(1), *by_channel)


def _log_one_minus_exp(log_width: Tensor) -> Tensor:
    """log(1 − exp(−w)) of log w. Of widths so small that 1 − exp(−w) may vanish it is log w − w / 2, up to w² / 24."""
    small = log_width < -10
    width = log_width.exp()
    return torch.where(small, log_width - width / 2, (-torch.expm1(-width.clamp_min(1e-8))).log())
