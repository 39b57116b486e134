"""Progressive growing of GANs for improved quality, stability, and variation. T. Karras, T. Aila, S. Laine,
J. Lehtinen, 2018. arXiv:1710.10196.

The game of WGAN-GP between networks that start at 4 × 4 pixels and double their resolution as training goes on, each
new grid faded in by a weight α that rises linearly from 0 to 1 (section 2). The critic minimises

    E f(x̃) − E f(x) + λ E (‖∇ f(x̂)‖₂ / γ − 1)² + ε E f(x)²,   x̂ = u x + (1 − u) x̃, u ~ U[0, 1),

λ = 10, γ = 1, ε = 0.001 the weight of the drift (appendix A.1), the generator −E f(x̃), one step of each in turn. The
generator normalises every pixel's features, the critic sees the standard deviation over its batch (sections 3 and 4.2),
all weights have an equalised learning rate (4.1). Adam with a learning rate of 10⁻³ and β = (0, 0.99); batches of 16,
of 14 at 256 pixels; 800,000 images for each fade and each resolution alone; samples by an average of the generator with
decay 0.999. Networks are table 2's up to the image's size: 512 channels, at 64, 128 and 256 pixels 256, 128 and 64.

Departures: images are of 8 to 256 pixels, sides may differ. 20 million images in all, as in the authors' code for LSUN
at 256 pixels; for CIFAR-10 that has half the images a phase, 128 channels and γ = 750. Adam's moments of layers that go
on training are kept where theirs start anew at every resolution, and the learning rate does not ramp up there. The
generator's first layer has a bias for each unit, not for each channel. The average follows closely in the first rounds.
Integers are dequantised before they are halved.
Expected: the paper has no number on data that is at hand; none measured yet: `make results ROW=pro_gan_mnist`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import DataSpec, Loss
from dgm_core.models.adversarial.growing import GrowingConfig, GrowingGAN, recipe_of
from dgm_core.nn.dcgan import SLOPE
from dgm_core.nn.equalised import EqualisedConv2d, EqualisedLinear, PixelNorm
from dgm_core.nn.growing import GrowingCritic, Size, Stage, ToPixels, plan, sides_of
from dgm_core.objectives.gan import (
    gradient_norm,
    gradient_penalty,
    interpolate,
    wasserstein_critic,
    wasserstein_generator,
)
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

PHASE, TOTAL = 800_000, 20_000_000  # images


class Generator(nn.Module):
    """A linear layer onto the coarsest grid, then blocks that double it: (B, latents) -> (B, C, h, w)."""

    def __init__(self, latents: int, channels: int, widths: Sequence[int], first: int, grid: Size) -> None:
        super().__init__()
        width = widths[0]
        # A quarter of He's gain, as in the authors' code.
        project = EqualisedLinear(latents, width * grid[0] * grid[1], gain=2**0.5 / 4)
        stem = nn.Sequential(PixelNorm(), project, nn.Unflatten(1, (width, *grid)), *_tail(), *_layer(width, width))
        doubling = (
            nn.Sequential(nn.Upsample(scale_factor=2.0), *_layer(coarse, fine), *_layer(fine, fine))
            for coarse, fine in pairwise(widths)
        )
        self.blocks = nn.ModuleList([stem, *doubling])
        self.to_pixels = ToPixels(channels, widths, first)

    def forward(self, z: Float[Tensor, " B latents"], stage: Stage) -> Float[Tensor, " B C h w"]:
        return self.to_pixels.grow(z, stage, lambda k, h: self.blocks[k](h))


def _layer(channels: int, out: int) -> list[nn.Module]:
    return [EqualisedConv2d(channels, out, 3), *_tail()]


def _tail() -> list[nn.Module]:
    return [nn.LeakyReLU(SLOPE), PixelNorm()]


def halving(channels: int, out: int) -> nn.Sequential:
    """Two 3 × 3 convolutions, then means of 2 × 2."""
    first, second = EqualisedConv2d(channels, channels, 3), EqualisedConv2d(channels, out, 3)
    return nn.Sequential(first, nn.LeakyReLU(SLOPE), second, nn.LeakyReLU(SLOPE), nn.AvgPool2d(2))


class ProGAN(GrowingGAN):
    """WGAN-GP between networks that grow, with pixel norm, equalised rates and the batch's deviation; images only."""

    class Config(GrowingConfig):
        gradient_penalty: float = Field(default=10.0, ge=0, description="λ")
        target: float = Field(default=1.0, gt=0, description="γ: the norm that the critic's gradient is held to")
        drift: float = Field(default=1e-3, ge=0, description="ε: weight of the critic's squared score of data")

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]
    opponent = "critic"

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        fades, sizes, steps = plan([14 if side > 128 else 16 for side in sides_of(data)], PHASE, TOTAL)
        adam = Optimizer(lr=1e-3, betas=(0.0, 0.99))
        return cls.Config(growth=fades), recipe_of("critic", adam, 0.999, sizes, steps)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        fades, _, _ = plan([16] * len(sides_of(data)), 800, 8000)
        adam = Optimizer(lr=1e-2, betas=(0.0, 0.99), schedule="linear")
        config = cls.Config(latents=8, features=16, growth=fades, gradient_penalty=1.0)
        return config, recipe_of("critic", adam, 0.95, ((0.0, 32),), 200)

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        shape = (data.shape[0], self.widths, self.growth.first, self.growth.sizes[0])
        self.generator = Generator(config.latents, *shape)
        self.critic = GrowingCritic(*shape, halving)

    def opponent_loss(self, real: Float[Tensor, " B C h w"], fake: Float[Tensor, " B C h w"], stage: Stage) -> Loss:
        # Apart, since the critic tells a batch by its spread; the penalty's points are a batch of their own too.
        on_real, on_fake = self.critic(real, stage), self.critic(fake, stage)
        epsilon = torch.rand(real.shape[0], device=real.device, dtype=real.dtype)
        between = interpolate(real, fake, epsilon)
        norm = gradient_norm(lambda x: self.critic(x, stage), between)
        distance = -wasserstein_critic(on_real, on_fake)
        penalty, drift = gradient_penalty(norm / self.config.target), promote(on_real).square().mean()
        value = self.config.gradient_penalty * penalty + self.config.drift * drift - distance
        metrics = {"wasserstein": distance, "gradient_penalty": penalty, "gradient_norm": norm.mean(), "drift": drift}
        return Loss(value, {name: metric.detach() for name, metric in metrics.items()})

    def generator_loss(self, fake: Float[Tensor, " B C h w"], stage: Stage) -> Loss:
        return Loss(wasserstein_generator(self.critic(fake, stage)))
