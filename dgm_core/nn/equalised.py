"""Layers with an equalised learning rate, and the normalisation of a pixel's features.

T. Karras, T. Aila, S. Laine, J. Lehtinen, 2018. arXiv:1710.10196, sections 4.1 and 4.2. Weights start from N(0, 1) and
are multiplied by He's constant c = gain / √(fan in) at every use, not once at the start: Adam's steps, whose length
does not depend on a gradient's scale, are then the same share of every layer's weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


class EqualisedLinear(nn.Module):
    """W x c + b with c = gain / √features.

    Args:
        rate: multiplier of the learning rate. Parameters are kept divided by it and multiplied at use: the same
            function at the start, of which a step of Adam moves but that share.
    """

    def __init__(self, features: int, out: int, *, gain: float = 2**0.5, rate: float = 1.0) -> None:
        super().__init__()
        self.scale, self.rate = gain * rate / features**0.5, rate
        self.weight = nn.Parameter(torch.randn(out, features) / rate)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Float[Tensor, " B features"]) -> Float[Tensor, " B out"]:
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class EqualisedConv2d(nn.Module):
    """A convolution that keeps the size, its weights multiplied by c = gain / √(channels · kernel²)."""

    def __init__(self, channels: int, out: int, kernel: int, *, gain: float = 2**0.5, bias: bool = True) -> None:
        super().__init__()
        self.scale, self.padding = gain / (channels * kernel**2) ** 0.5, kernel // 2
        self.weight = nn.Parameter(torch.randn(out, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B O H W"]:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class PixelNorm(nn.Module):
    """b = a / √(mean over channels of a² + ε) at every pixel, or of a vector: its mean square becomes one."""

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, " B C *grid"]) -> Float[Tensor, " B C *grid"]:
        a = promote(x)
        return (a * (a.square().mean(1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)
