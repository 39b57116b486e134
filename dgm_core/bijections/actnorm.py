"""Activation normalisation: an affine map of each channel whose start is taken from the data.

D. P. Kingma, P. Dhariwal, 2018. arXiv:1807.03039, section 3.1. Nothing here looks at a batch by itself: inside
`starting`, one pass of a first batch through the network sets every such layer, from front to back, so that what it
puts out has mean zero and variance one. A buffer remembers that it was done.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.bijections.base import Bijection, Context
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

EPS = 1e-6  # a channel whose standard deviation is below this counts as constant
FACTOR = 3.0  # scales are exp(3 l) of the parameter l: they learn three times as fast (the authors' code)

Moments = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # (B, C, …) -> mean and variance of each channel, count


class StartsFromData(nn.Module, ABC):
    """A layer that the first batch sets."""

    @abstractmethod
    def start(self, x: Tensor, moments: Moments) -> None:
        """Set parameters by what is about to come in, if this was not done before."""


class ActNorm(Bijection, StartsFromData):
    """z = (x + b) exp(3 l), with b and l learnt for each channel; the identity until it is started."""

    started: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def start(self, x: Tensor, moments: Moments) -> None:
        if not self.started:
            mean, variance, _ = moments(x)
            self.whiten(mean, variance)

    @torch.no_grad()
    def whiten(self, mean: Float[Tensor, " C"], variance: Float[Tensor, " C"]) -> None:
        """Turn channels with these moments into channels of mean zero and variance one; one that never varies keeps
        its scale."""
        self.shift.copy_(-mean)
        self.log_scale.copy_(torch.where(variance > EPS**2, variance, 1).log() / (-2 * FACTOR))
        self.started.fill_(True)

    def log_slope(self) -> Float[Tensor, " C"]:
        return FACTOR * self.log_scale

    def forward(
        self, x: Float[Tensor, " B C *grid"], context: Context = None
    ) -> tuple[Float[Tensor, " B C *grid"], Float[Tensor, " B"]]:
        log_slope = self.log_slope()
        scale = log_slope.exp()
        z = torch.addcmul(_lift(self.shift * scale, x), promote(x), _lift(scale, x))
        return z, _total(log_slope, x)

    def inverse(
        self, z: Float[Tensor, " B C *grid"], context: Context = None
    ) -> tuple[Float[Tensor, " B C *grid"], Float[Tensor, " B"]]:
        log_slope = self.log_slope()
        return promote(z) / _lift(log_slope.exp(), z) - _lift(self.shift, z), -_total(log_slope, z)


class ActNormConv2d(StartsFromData):
    """A convolution and the activation normalisation of its output, folded into one set of filters."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(out, channels, kernel, kernel))
        self.norm = ActNorm(out)

    def start(self, x: Tensor, moments: Moments) -> None:
        self.norm.start(F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2), moments)

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B O H W"]:
        scale = self.norm.log_slope().exp()
        weight = self.weight * scale.reshape(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.norm.shift * scale, padding=weight.shape[-1] // 2)


@contextlib.contextmanager
def starting(module: nn.Module, moments: Moments) -> Iterator[None]:
    """Within, each layer that was not started sets itself by what first reaches it, before it acts.

    `moments` is to span the batches of all ranks.
    """

    def first_start(part: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(part, StartsFromData)
        part.start(inputs[0], moments)

    parts = [part for part in module.modules() if isinstance(part, StartsFromData)]
    hooks = [part.register_forward_pre_hook(first_start) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _lift(channels: Float[Tensor, " C"], like: Float[Tensor, " B C *grid"]) -> Tensor:
    return channels.reshape(-1, *(1,) * (like.ndim - 2))


def _total(log_slope: Float[Tensor, " C"], like: Float[Tensor, " B C *grid"]) -> Float[Tensor, " B"]:
    return (log_slope.sum() * math.prod(like.shape[2:])).expand(like.shape[0])
