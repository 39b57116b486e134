"""Networks of VAE/GAN: an encoder and a discriminator of strided convolutions, a decoder of their transposes.

A. B. L. Larsen et al., 2016. arXiv:1512.09300: 5 × 5 kernels, batch normalisation behind every convolution and dense
layer but the first and the last of each network, ReLU. Sides of any size are halved with rounding up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dgm_core.nn.encoders import halved
from dgm_core.nn.norm import BatchNorm

if TYPE_CHECKING:
    from jaxtyping import Float

Shape = tuple[int, ...]  # (C, H, W)


def encoder(shape: Shape, channels: Sequence[int], hidden: int, outputs: int) -> nn.Sequential:
    """(B, C, H, W) -> (B, outputs): a strided convolution for each of `channels`, and a dense hidden layer."""
    flat = channels[-1] * math.prod(_grid(shape, len(channels)))
    return nn.Sequential(
        *_strided((shape[0], *channels)), nn.Flatten(), *_normed(flat, hidden), nn.Linear(hidden, outputs)
    )


def decoder(latents: int, shape: Shape, channels: Sequence[int], *, bounded: bool) -> nn.Sequential:
    """(B, latents) -> (B, C, H, W): a dense layer onto the smallest grid, as wide as the first transposed convolution
    makes it, transposed convolutions, and one of stride 1 in front of the image."""
    sizes = [_grid(shape, k) for k in reversed(range(len(channels) + 1))]
    start = (channels[0], *sizes[0])
    layers: list[nn.Module] = [*_normed(latents, math.prod(start)), nn.Unflatten(1, start)]
    for (c, out), (small, big) in zip(pairwise((channels[0], *channels)), pairwise(sizes), strict=True):
        odd = (big[0] - (2 * small[0] - 1), big[1] - (2 * small[1] - 1))  # what halving with rounding up had taken
        up = nn.ConvTranspose2d(c, out, 5, stride=2, padding=2, output_padding=odd, bias=False)
        layers += [up, BatchNorm(out), nn.ReLU()]
    layers.append(nn.Conv2d(channels[-1], shape[0], 5, padding=2))
    return nn.Sequential(*layers, nn.Tanh()) if bounded else nn.Sequential(*layers)


class Discriminator(nn.Module):
    """(B, C, H, W) -> (B,) scores, σ of which is D, and the features that images are compared in."""

    def __init__(self, shape: Shape, channels: Sequence[int], hidden: int, layer: int) -> None:
        super().__init__()
        blocks = _strided(channels)
        at = 3 * (layer - 1) + 1  # three modules a block, of which the convolution comes first
        self.below = nn.Sequential(nn.Conv2d(shape[0], channels[0], 5, padding=2), nn.ReLU(), *blocks[:at])
        flat = channels[-1] * math.prod(_grid(shape, len(channels) - 1))
        self.above = nn.Sequential(*blocks[at:], nn.Flatten(), *_normed(flat, hidden), nn.Linear(hidden, 1))

    def features(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B c h w"]:
        return self.below(x)

    def forward(self, x: Float[Tensor, " B C H W"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B c h w"]]:
        f = self.features(x)
        return self.above(f).flatten(), f


def start_uniform(module: nn.Module) -> None:
    """Weights uniform within 1/√(3 n), n the inputs of a unit, biases at zero: the start of the authors' library."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            reach = (3 * math.prod(part.weight.shape[1:])) ** -0.5
            nn.init.uniform_(part.weight, -reach, reach)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _strided(channels: Sequence[int]) -> list[nn.Module]:
    """A strided convolution, norm and ReLU from each number of channels to the next."""
    layers: list[nn.Module] = []
    for c, out in pairwise(channels):
        layers += [nn.Conv2d(c, out, 5, stride=2, padding=2, bias=False), BatchNorm(out), nn.ReLU()]
    return layers


def _normed(features: int, out: int) -> list[nn.Module]:
    return [nn.Linear(features, out, bias=False), BatchNorm(out), nn.ReLU()]


def _grid(shape: Shape, times: int) -> tuple[int, int]:
    """Of an image halved so many times."""
    return halved(shape[1], times), halved(shape[2], times)
