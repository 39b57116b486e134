"""The networks inside coupling layers: residual convolutions with weight normalisation, and a perceptron for vectors.

L. Dinh, J. Sohl-Dickstein, S. Bengio, 2017. arXiv:1605.08803, section 3.6 and 4.1. T. Salimans, D. P. Kingma, 2016.
arXiv:1602.07868 (weight normalisation). Both start at zero, so that a coupling starts as the identity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.norm import BatchNorm

if TYPE_CHECKING:
    from jaxtyping import Float

EPS = 1e-4  # of every batch normalisation here


class WeightNormConv2d(nn.Module):
    """A convolution whose filters have norm `magnitude` (learnt), or one if that is None."""

    def __init__(self, channels: int, out: int, kernel: int, *, magnitude: float | None, bias: bool = True) -> None:
        super().__init__()
        bound = math.sqrt(2 / channels)
        self.direction = nn.Parameter(torch.empty(out, channels, kernel, kernel).uniform_(-bound, bound))
        self.magnitude = None if magnitude is None else nn.Parameter(torch.full((out,), magnitude))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B O H W"]:
        norm = self.direction.square().sum((1, 2, 3), keepdim=True).sqrt()
        weight = self.direction / norm
        if self.magnitude is not None:
            weight = weight * self.magnitude.reshape(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.bias, padding=self.direction.shape[-1] // 2)


class _ResidualBlock(nn.Module):
    def __init__(self, features: int, batch_norm: bool) -> None:
        super().__init__()
        self.norm_in, self.norm_hidden = _norm(features, batch_norm), _norm(features, batch_norm)
        self.hidden = WeightNormConv2d(features, features, 3, magnitude=None, bias=not batch_norm)
        self.out = WeightNormConv2d(features, features, 3, magnitude=3 / math.sqrt(6))

    def forward(self, h: Float[Tensor, " B F H W"]) -> Float[Tensor, " B F H W"]:
        hidden = self.hidden(F.relu(self.norm_in(h)))
        return h + self.out(F.relu(self.norm_hidden(hidden)))


class CouplingResNet(nn.Module):
    """Pre-activation residual blocks with a skip connection from each to the output: (B, C, H, W) -> (B, out, H, W).

    The input is normalised and enters as its positive and its negative part; a checkerboard `mask` (1, H, W) is shown
    to the network as one more channel.
    """

    mask: Tensor | None

    def __init__(
        self, channels: int, out: int, features: int, blocks: int, *, batch_norm: bool, mask: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.norm = _norm(channels, batch_norm)
        self.enter = WeightNormConv2d(2 * channels + (mask is not None), features, 3, magnitude=None)
        self.blocks = nn.ModuleList(_ResidualBlock(features, batch_norm) for _ in range(blocks))
        self.skips = nn.ModuleList(
            WeightNormConv2d(features, features, 1, magnitude=1 / math.sqrt(6)) for _ in range(blocks + 1)
        )
        self.norm_out = _norm(features, batch_norm)
        self.out = WeightNormConv2d(features, out, 1, magnitude=0.0)

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B O H W"]:
        x = self.norm(x)
        parts = [F.relu(x), F.relu(-x)]
        if self.mask is not None:
            parts.append(self.mask.to(x).expand(x.shape[0], 1, -1, -1))
        h = self.enter(torch.cat(parts, 1))
        total = self.skips[0](h)
        for block, skip in zip(self.blocks, self.skips[1:], strict=True):
            h = block(h)
            total = total + skip(h)
        return self.out(F.relu(self.norm_out(total)))


class CouplingMLP(nn.Sequential):
    """A perceptron with `hidden` hidden layers: (B, D) -> (B, out)."""

    def __init__(self, dims: int, out: int, features: int, hidden: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(hidden):
            layers += [nn.Linear(dims, features), nn.ReLU(inplace=True)]
            dims = features
        last = nn.Linear(dims, out)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return BatchNorm(channels, eps=EPS, scale=False) if batch_norm else nn.Identity()
