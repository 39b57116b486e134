"""Convolutional generators and discriminators without pooling or hidden linear layers.

A. Radford, L. Metz, S. Chintala, 2016. arXiv:1511.06434: 5 × 5 kernels of stride 2, batch normalisation everywhere but
at the generator's output and the discriminator's input, ReLU in the one and LeakyReLU (0.2) in the other. The authors'
64 pixels are a 4 × 4 grid doubled four times, from 1024 channels down. Here an image of any size is: a side is halved,
and rounded up, until the shorter one is at most 4; the generator goes the same way back.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.gan_blocks import Norm
from dgm_core.nn.norm import BatchNorm
from dgm_core.nn.virtual_batch_norm import VirtualBatchNorm

if TYPE_CHECKING:
    from jaxtyping import Float

SLOPE = 0.2  # of the leaky rectifier


def grids(height: int, width: int) -> list[tuple[int, int]]:
    """From the image's own size to the smallest grid."""
    sizes = [(height, width)]
    while min(sizes[-1]) > 4:
        h, w = sizes[-1]
        sizes.append((-(-h // 2), -(-w // 2)))
    return sizes


def widths(features: int, count: int) -> list[int]:
    """Channels from the finest of `count` grids to the coarsest: doubled every time, up to eight times the first."""
    return [features * min(2**k, 8) for k in range(count)]


def _padding(small: tuple[int, int], big: tuple[int, int]) -> tuple[int, int]:
    """A side of n becomes 2 n − 1, or with padding 2 n: whichever was halved to n."""
    return big[0] - (2 * small[0] - 1), big[1] - (2 * small[1] - 1)


class DCGANGenerator(nn.Module):
    """A linear layer onto the smallest grid, then transposed convolutions: (B, latents) -> (B, C, H, W).

    Args:
        features: channels in front of the image, the paper's 128.
    """

    def __init__(
        self, latents: int, shape: tuple[int, ...], features: int, *, norm: Norm = BatchNorm, bounded: bool = True
    ) -> None:
        super().__init__()
        sizes = grids(*shape[1:])[::-1]
        channels = [*widths(features, len(sizes) - 1)[::-1], shape[0]]
        self.grid = (channels[0], *sizes[0])
        # No biases: in front of a norm they are pointless, and the authors have none in front of the image either.
        self.project = nn.Linear(latents, math.prod(self.grid), bias=False)
        self.norms = nn.ModuleList(norm(c) for c in channels[:-1])
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(c, out, 5, stride=2, padding=2, output_padding=_padding(small, big), bias=False)
            for (c, out), (small, big) in zip(pairwise(channels), pairwise(sizes), strict=True)
        )
        self.bounded = bounded
        start_normal(self)

    def forward(self, z: Float[Tensor, " B latents"]) -> Float[Tensor, " B C H W"]:
        h = self.project(z).unflatten(1, self.grid)
        for norm, up in zip(self.norms, self.up, strict=True):
            h = up(F.relu(norm(h)))
        return h.tanh() if self.bounded else h


class DCGANFeatures(nn.Sequential):
    """A discriminator but for its last layer: (B, C, H, W) -> (B, `size`)."""

    def __init__(self, shape: tuple[int, ...], features: int) -> None:
        sizes = grids(*shape[1:])
        channels = widths(features, len(sizes) - 1)
        layers: list[nn.Module] = [nn.Conv2d(shape[0], features, 5, stride=2, padding=2), nn.LeakyReLU(SLOPE)]
        for c, out in pairwise(channels):
            layers += [nn.Conv2d(c, out, 5, stride=2, padding=2, bias=False), BatchNorm(out), nn.LeakyReLU(SLOPE)]
        super().__init__(*layers, nn.Flatten())
        self.size = channels[-1] * math.prod(sizes[-1])
        start_normal(self)


def dcgan_discriminator(shape: tuple[int, ...], features: int) -> nn.Sequential:
    """(B, C, H, W) -> (B,) scores."""
    body = DCGANFeatures(shape, features)
    score = nn.Linear(body.size, 1)
    start_normal(score)
    return nn.Sequential(body, score, nn.Flatten(0))


def start_normal(module: nn.Module, sd: float = 0.02) -> None:
    """Weights N(0, 0.02²) and gains of norms N(1, 0.02²), biases at zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(part.weight, 0.0, sd)
        elif isinstance(part, BatchNorm | VirtualBatchNorm) and part.weight is not None:
            nn.init.normal_(part.weight, 1.0, sd)
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)
