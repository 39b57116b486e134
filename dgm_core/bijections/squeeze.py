"""Space into channels, and the multi-scale arrangement.

L. Dinh et al., 2017. arXiv:1605.08803, sections 3.5, 3.6, eqs. 13–16. D. P. Kingma, P. Dhariwal, 2018.
arXiv:1807.03039 (the prior of what is split off is learnt).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgm_core.bijections.base import Bijection, Context, no_log_det
from dgm_core.precision import promote
from dgm_core.shapes import sum_event

if TYPE_CHECKING:
    from jaxtyping import Float


class Squeeze(Bijection):
    """(B, C, H, W) -> (B, 4C, H/2, W/2): each 2 × 2 square becomes four blocks of C channels, in the order upper left,
    upper right, lower left, lower right. Halving the channels thus splits rows, which no checkerboard does. The result
    lies in memory with its channels last, as convolutions like it."""

    def forward(
        self, x: Float[Tensor, " B C H W"], context: Context = None
    ) -> tuple[Float[Tensor, " B 4C H/2 W/2"], Float[Tensor, " B"]]:
        b, c, h, w = x.shape
        squares = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        return squares.reshape(b, h // 2, w // 2, 4 * c).permute(0, 3, 1, 2), no_log_det(x)

    def inverse(
        self, z: Float[Tensor, " B 4C H/2 W/2"], context: Context = None
    ) -> tuple[Float[Tensor, " B C H W"], Float[Tensor, " B"]]:
        b, c, h, w = z.shape
        squares = z.reshape(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
        return squares.reshape(b, c // 4, 2 * h, 2 * w), no_log_det(z)


class Flatten(Bijection):
    """(B, *shape) -> (B, D)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(
        self, x: Float[Tensor, " B *shape"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        return x.flatten(1), no_log_det(x)

    def inverse(
        self, z: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B *shape"], Float[Tensor, " B"]]:
        return z.reshape(z.shape[0], *self.shape), no_log_det(z)


class FactorOut(Bijection):
    """Half of a squeezed image is done, the other half goes on through `rest` (eqs. 14–16): (B, 4C, H, W) -> (B, D).

    The two pixels on the main diagonal of each 2 × 2 square go on. The latent lists coarse scales first.

    Args:
        rest: (B, 2C, H, W) -> (B, D/2).
        shape: (4C, H, W).
    """

    def __init__(self, rest: Bijection, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.rest, self.shape = rest, shape

    def forward(
        self, x: Float[Tensor, " B 4C H W"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        first, second, third, fourth = x.chunk(4, 1)
        coarse, log_det = self.rest(torch.cat([first, fourth], 1), context)
        return torch.cat([coarse, second.flatten(1), third.flatten(1)], 1), log_det

    def inverse(
        self, z: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B 4C H W"], Float[Tensor, " B"]]:
        quarter = math.prod(self.shape) // 4
        coarse, second, third = z.split([2 * quarter, quarter, quarter], 1)
        kept, log_det = self.rest.inverse(coarse, context)
        first, fourth = kept.chunk(2, 1)
        block = (z.shape[0], self.shape[0] // 4, *self.shape[1:])
        return torch.cat([first, second.reshape(block), third.reshape(block), fourth], 1), log_det


class SplitPrior(Bijection):
    """Half of the channels goes on through `rest`, the other half is done, and has a Gaussian prior given the first:
    z₂ = (x₂ − μ(x₁)) exp(−log σ(x₁)). (B, C, H, W) -> (B, D).

    So all that is split off is standard normal, whatever it depends on, and a temperature reaches it. The latent lists
    coarse scales first.

    Args:
        rest: (B, C/2, H, W) -> (B, D/2).
        prior: (B, C/2, H, W) -> (B, C, H, W), the means and then the log-scales.
        shape: (C, H, W).
    """

    def __init__(self, rest: Bijection, prior: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.rest, self.prior, self.shape = rest, prior, shape

    def forward(
        self, x: Float[Tensor, " B C H W"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        goes_on, done = x.chunk(2, 1)
        mean, log_scale = promote(self.prior(goes_on)).chunk(2, 1)
        coarse, log_det = self.rest(goes_on, context)
        z = (promote(done) - mean) * (-log_scale).exp()
        return torch.cat([coarse, z.flatten(1)], 1), log_det - sum_event(log_scale)

    def inverse(
        self, z: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B C H W"], Float[Tensor, " B"]]:
        coarse, fine = z.chunk(2, 1)
        goes_on, log_det = self.rest.inverse(coarse, context)
        mean, log_scale = promote(self.prior(goes_on)).chunk(2, 1)
        channels, height, width = self.shape
        done = promote(fine).reshape(-1, channels // 2, height, width) * log_scale.exp() + mean
        return torch.cat([goes_on, done], 1), log_det + sum_event(log_scale)
