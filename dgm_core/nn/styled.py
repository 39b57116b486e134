"""A generator whose input is a constant, steered by styles and noise at every layer.

T. Karras, S. Laine, T. Aila, 2019. arXiv:1812.04948, section 2 and figure 1. A mapping network takes latents to W; of a
w each layer makes a scale and a shift by which its features, normalised image by image, are drawn (AdaIN, eq. 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.nn.dcgan import SLOPE
from dgm_core.nn.equalised import EqualisedConv2d, EqualisedLinear, PixelNorm
from dgm_core.nn.growing import Size, Stage, ToPixels, double
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def mapping(latents: int, depth: int, rate: float) -> nn.Sequential:
    """z on the sphere, then `depth` layers with their learning rate multiplied by `rate`: (B, latents) -> the same."""
    layers: list[nn.Module] = [PixelNorm()]
    for _ in range(depth):
        layers += [EqualisedLinear(latents, latents, rate=rate), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


def blur(x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B C H W"]:
    """By the binomial filter (1, 2, 1) / 4 along both sides, zeros around.

    It is the mean of two neighbours, taken twice; two poolings have cheap derivatives of any order.
    """
    return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1, padding=1), 2, stride=1)


class Blur(nn.Module):
    """`blur` as a layer."""

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B C H W"]:
        return blur(x)


def adain(
    x: Float[Tensor, " B C H W"], scale: Float[Tensor, " B C"], shift: Float[Tensor, " B C"], eps: float = 1e-8
) -> Float[Tensor, " B C H W"]:
    """scale (x − μ(x)) / σ(x) + shift, of each image's channel by itself (eq. 1); σ² is its variance plus ε."""
    h = promote(x)
    h = h - h.mean((2, 3), keepdim=True)
    h = h * (h.square().mean((2, 3), keepdim=True) + eps).rsqrt()
    return (h * promote(scale)[:, :, None, None] + promote(shift)[:, :, None, None]).to(x.dtype)


class Styled(nn.Module):
    """What follows a convolution: noise, bias, LeakyReLU, AdaIN.

    Noise is one number a pixel, with a factor of its own for each channel, at first zero; scales start around one.
    """

    def __init__(self, channels: int, latents: int) -> None:
        super().__init__()
        self.noise, self.bias = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.style = EqualisedLinear(latents, 2 * channels, gain=1.0)

    def forward(
        self, x: Float[Tensor, " B C H W"], w: Float[Tensor, " B latents"], noise: float
    ) -> Float[Tensor, " B C H W"]:
        if noise:
            field = torch.randn(x.shape[0], 1, *x.shape[2:], device=x.device, dtype=promote(x).dtype)
            x = x + noise * self.noise[:, None, None] * field
        scale, shift = self.style(w).chunk(2, 1)
        return adain(F.leaky_relu(x + self.bias[:, None, None], SLOPE), 1 + scale, shift)


class StyledBlock(nn.Module):
    """Two styled layers of one grid; the first doubles the coarser grid's features, but on the coarsest has none."""

    def __init__(self, channels: int | None, out: int, latents: int) -> None:
        super().__init__()
        self.conv1 = None if channels is None else EqualisedConv2d(channels, out, 3, bias=False)
        self.conv2 = EqualisedConv2d(out, out, 3, bias=False)
        self.styled1, self.styled2 = Styled(out, latents), Styled(out, latents)

    def forward(
        self, h: Float[Tensor, " B C h w"], w: Float[Tensor, " B 2 latents"], noise: float
    ) -> Float[Tensor, " B O H W"]:
        if self.conv1 is not None:
            h = blur(self.conv1(double(h)))
        h = self.styled1(h, w[:, 0], noise)
        return self.styled2(self.conv2(h), w[:, 1], noise)


class Synthesis(nn.Module):
    """From a learnt constant on the coarsest grid to an image, a w for every layer.

    Args:
        widths: channels of each grid, the coarsest first.
        first: level that training starts at.
    """

    def __init__(self, latents: int, channels: int, widths: Sequence[int], first: int, grid: Size) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.ones(widths[0], *grid))
        growing = (StyledBlock(coarse, fine, latents) for coarse, fine in pairwise(widths))
        self.blocks = nn.ModuleList([StyledBlock(None, widths[0], latents), *growing])
        self.to_pixels = ToPixels(channels, widths, first)

    def forward(self, w: Float[Tensor, " B layers latents"], stage: Stage, noise: float) -> Float[Tensor, " B C h w"]:
        start = self.constant.expand(w.shape[0], *self.constant.shape)
        return self.to_pixels.grow(start, stage, lambda k, h: self.blocks[k](h, w[:, 2 * k : 2 * k + 2], noise))


def layers_at(stage: Stage) -> int:
    """How many styles an image takes."""
    return 2 * (stage.level + 1)


def crossed(
    a: Float[Tensor, " B latents"], b: Float[Tensor, " B latents"], cut: Int[Tensor, " B"] | int, layers: int
) -> Float[Tensor, " B layers latents"]:
    """Styles of a up to layer `cut`, of b from there on (style mixing, section 3.1)."""
    cut = torch.as_tensor(cut, device=a.device).expand(a.shape[0])
    coarse = torch.arange(layers, device=a.device) < cut[:, None]
    return torch.where(coarse[:, :, None], a[:, None], b[:, None])


class RunningMean(nn.Module):
    """The mean of w, over all ranks' batches and averaged over plays: added up in `forward`, moved by `settle`."""

    mean: Tensor
    noted: Tensor

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("noted", torch.zeros(width + 1), persistent=False)  # sum and count since the last play

    @torch.no_grad()
    def note(self, w: Float[Tensor, " B width"]) -> None:
        w = promote(w)
        self.noted += torch.cat([w.sum(0), w.new_full((1,), w.shape[0])]).to(self.noted)

    @torch.no_grad()
    def settle(self) -> None:
        """Move towards what was noted since the last time, if anything was."""
        distributed.sum_(self.noted)
        count = self.noted[-1]
        self.mean.lerp_(self.noted[:-1] / count.clamp_min(1), self.rate * (count > 0).to(self.mean))
        self.noted.zero_()
