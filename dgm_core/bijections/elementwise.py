"""Maps of each coordinate alone: the way from data units to the real line, and normalisation between layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.bijections.base import Bijection, Context, no_log_det
from dgm_core.precision import promote
from dgm_core.shapes import sum_event

if TYPE_CHECKING:
    from jaxtyping import Float


class ScaledLogit(Bijection):
    """z = logit(α + (1 − 2α) x / levels) for x in [0, levels]: dequantised integers onto the real line."""

    def __init__(self, levels: int, alpha: float) -> None:
        super().__init__()
        self.levels, self.alpha = levels, alpha

    def forward(
        self, x: Float[Tensor, " B *event"], context: Context = None
    ) -> tuple[Float[Tensor, " B *event"], Float[Tensor, " B"]]:
        p = self.alpha + (1 - 2 * self.alpha) * promote(x) / self.levels
        z = p.log() - (-p).log1p()
        return z, sum_event(self._log_slope(z))

    def inverse(
        self, z: Float[Tensor, " B *event"], context: Context = None
    ) -> tuple[Float[Tensor, " B *event"], Float[Tensor, " B"]]:
        z = promote(z)
        x = (z.sigmoid() - self.alpha) * (self.levels / (1 - 2 * self.alpha))
        return x, -sum_event(self._log_slope(z))

    def _log_slope(self, z: Tensor) -> Tensor:
        return F.softplus(z) + F.softplus(-z) + math.log((1 - 2 * self.alpha) / self.levels)


class Rescale(Bijection):
    """z = x · scale + shift, alike for every coordinate."""

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__()
        self.shift, self.scale = shift, scale

    def forward(
        self, x: Float[Tensor, " B *event"], context: Context = None
    ) -> tuple[Float[Tensor, " B *event"], Float[Tensor, " B"]]:
        return promote(x) * self.scale + self.shift, self._log_det(x)

    def inverse(
        self, z: Float[Tensor, " B *event"], context: Context = None
    ) -> tuple[Float[Tensor, " B *event"], Float[Tensor, " B"]]:
        return (promote(z) - self.shift) / self.scale, -self._log_det(z)

    def _log_det(self, x: Tensor) -> Float[Tensor, " B"]:
        return no_log_det(x) + math.prod(x.shape[1:]) * math.log(abs(self.scale))


class Standardize(Bijection):
    """z = (x − shift) / scale, a constant of the data for each entry of axis 1; the identity until it is set."""

    shift: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    @torch.no_grad()
    def set(self, mean: Float[Tensor, " C"], variance: Float[Tensor, " C"]) -> None:
        """Centre on the data; a coordinate that never varies keeps its scale."""
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(variance > 0, variance, 1).sqrt())

    def forward(
        self, x: Float[Tensor, " B C *grid"], context: Context = None
    ) -> tuple[Float[Tensor, " B C *grid"], Float[Tensor, " B"]]:
        z = (promote(x) - _lift(self.shift, x)) / _lift(self.scale, x)
        return z, -_total(self.scale.log(), x)

    def inverse(
        self, z: Float[Tensor, " B C *grid"], context: Context = None
    ) -> tuple[Float[Tensor, " B C *grid"], Float[Tensor, " B"]]:
        x = promote(z) * _lift(self.scale, z) + _lift(self.shift, z)
        return x, _total(self.scale.log(), z)


class DiagonalAffine(Bijection):
    """z = x ⊙ exp(s) + t, learnt for each entry of axis 1; the identity at first.

    L. Dinh et al., 2015. arXiv:1410.8516, section 3.3, where t is absent.
    """

    def __init__(self, channels: int, *, shift: bool = True) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels)) if shift else None

    def forward(
        self, x: Float[Tensor, " B C *grid"], context: Context = None
    ) -> tuple[Float[Tensor, " B C *grid"], Float[Tensor, " B"]]:
        z = promote(x) * _lift(self.log_scale.exp(), x)
        return z if self.shift is None else z + _lift(self.shift, x), _total(self.log_scale, x)

    def inverse(
        self, z: Float[Tensor, " B C *grid"], context: Context = None
    ) -> tuple[Float[Tensor, " B C *grid"], Float[Tensor, " B"]]:
        x = promote(z) if self.shift is None else promote(z) - _lift(self.shift, z)
        return x * _lift((-self.log_scale).exp(), z), -_total(self.log_scale, z)


class BatchNormalization(Bijection):
    """Batch normalisation as a layer of a flow, with its log-determinant −½ Σ log(σ² + ε).

    L. Dinh et al., 2017. arXiv:1605.08803, section 3.7 and appendix E.

    Args:
        moments: in training returns the batch's mean and variance of each channel, in evaluation running ones; has
            `running_mean` and `running_var`.
        lag: ρ of appendix E. Training normalises by ρ times the running moments plus 1 − ρ times the batch's, through
            which alone the gradient flows. 0 is ordinary batch normalisation.
    """

    def __init__(self, moments: nn.Module, *, lag: float = 0.0, eps: float = 1e-4) -> None:
        super().__init__()
        self.moments = moments
        self.lag, self.eps = lag, eps

    def forward(
        self, x: Float[Tensor, " B C *grid"], context: Context = None
    ) -> tuple[Float[Tensor, " B C *grid"], Float[Tensor, " B"]]:
        mean, var = self.moments(x)
        if self.training and self.lag:
            mean = torch.lerp(mean, self._running("running_mean"), self.lag)
            var = torch.lerp(var, self._running("running_var"), self.lag)
        z = (promote(x) - _lift(mean, x)) * _lift((var + self.eps).rsqrt(), x)
        return z, _total(-0.5 * (var + self.eps).log(), x)

    def inverse(
        self, z: Float[Tensor, " B C *grid"], context: Context = None
    ) -> tuple[Float[Tensor, " B C *grid"], Float[Tensor, " B"]]:
        """By the running moments: what a batch's own moments were cannot be known from its normalised values."""
        mean, var = self._running("running_mean"), self._running("running_var")
        x = promote(z) * _lift((var + self.eps).sqrt(), z) + _lift(mean, z)
        return x, _total(0.5 * (var + self.eps).log(), z)

    def _running(self, name: str) -> Tensor:
        # A copy: the running moments move in place before a graph that used them is done with.
        return getattr(self.moments, name).clone()


def _lift(channels: Float[Tensor, " C"], like: Float[Tensor, " B C *grid"]) -> Tensor:
    return channels.reshape(-1, *(1,) * (like.ndim - 2))


def _total(log_slope: Float[Tensor, " C"], like: Float[Tensor, " B C *grid"]) -> Float[Tensor, " B"]:
    places = math.prod(like.shape[2:])
    return (log_slope.sum() * places).expand(like.shape[0])
