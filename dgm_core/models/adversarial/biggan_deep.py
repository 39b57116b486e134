"""Large scale GAN training for high fidelity natural image synthesis: BigGAN-deep. A. Brock, J. Donahue, K. Simonyan,
2018. arXiv:1809.11096.

BigGAN's game, penalty, truncation and standing statistics (`biggan`) between the networks of the paper's appendix B:
two bottleneck blocks at each resolution, which convolve in a quarter of the channels, and whose shortcuts learn nothing
but the channels that a discriminator's block adds. Latents are not cut up: all 128 of them and the class's shared
embedding go to every block, and to the first layer too. 128 × 128 pixels are the paper's networks, of 128 channels at
the finest grid, with attention at 64 × 64. Adam with β = (0, 0.999), 2·10⁻⁴ for the discriminator and 5·10⁻⁵ for the
generator, from 256 × 256 on 2.5·10⁻⁵ for both; batches and the rest as there.

Departures: those of `biggan`. Images of up to 32 × 32, for which the paper has no deep network, have the widths of the
authors' PyTorch code and its recipe for BigGAN on CIFAR-10.
Expected: the paper has no number on data that is at hand; none measured yet. `python -m pipelines.train` trains it by
name.
"""

from __future__ import annotations

import math
from itertools import pairwise, repeat
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import DataSpec
from dgm_core.models.adversarial.spectral import LargeScaleConfig, LargeScaleGAN, options_of, recipe_of
from dgm_core.nn.biggan_blocks import (
    DeepDiscriminatorBlock,
    DeepGeneratorBlock,
    ImageGenerator,
    ProjectionDiscriminator,
    SelfAttention,
    attended,
    by_vector,
    descent,
    generator_widths,
    start_orthogonal,
)
from dgm_core.nn.dcgan import grids

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Stage(nn.ModuleList):
    """A block that keeps the grid and one that doubles it, told the same."""

    def forward(self, x: Float[Tensor, " B C h w"], c: Float[Tensor, " B c"]) -> Float[Tensor, " B O H W"]:
        for block in self:
            x = block(x, c)
        return x


class Generator(ImageGenerator):
    """Latents and class onto the coarsest grid, then a stage at each: (B, latents), (B,) labels -> (B, C, H, W)."""

    def __init__(self, config: BigGANDeep.Config, data: DataSpec) -> None:
        super().__init__()
        c, sizes = config, grids(*data.shape[1:])
        outs = [c.features * width for width in generator_widths(len(sizes) - 1)]
        told = c.embedding + c.latents
        self.grid = (outs[0], *sizes[-1])
        self.embedding = nn.Embedding(data.classes, c.embedding)
        self.enter = nn.Linear(told, math.prod(self.grid))
        norm = by_vector(told)
        self.stages = nn.ModuleList(
            Stage([DeepGeneratorBlock(a, a, norm), DeepGeneratorBlock(a, b, norm, size)])
            for (a, b), size in zip(pairwise(outs), sizes[-2::-1], strict=True)
        )
        self.finish(outs, attended(sizes, c.attention), data, start_orthogonal, pooled=True)

    def forward(self, z: Float[Tensor, " B latents"], y: Int[Tensor, " B"]) -> Float[Tensor, " B C H W"]:
        told = torch.cat([self.embedding(y).to(z.dtype), z], 1)
        return self.paint(told, self.stages, repeat(told, len(self.stages)))


def discriminator(config: BigGANDeep.Config, data: DataSpec) -> ProjectionDiscriminator:
    """A convolution, then at each grid a block that halves it where it is large and one that keeps it; projection."""
    outs, downs, at = descent(data.shape, config.features, config.attention)
    layers: list[nn.Module] = [nn.Conv2d(data.shape[0], outs[0], 3, padding=1)]
    for k, (a, b) in enumerate(pairwise(outs)):
        layers += [DeepDiscriminatorBlock(a, b, down=k < downs), DeepDiscriminatorBlock(b, b, down=False)]
        layers += [SelfAttention(b, pooled=True)] if k == at else []
    return ProjectionDiscriminator(layers, outs[-1], data.classes, start_orthogonal)


class BigGANDeep(LargeScaleGAN):
    """Deep bottleneck networks that are told class and latents at every block; images of given classes."""

    class Config(LargeScaleConfig):
        latents: int = Field(default=128, ge=1)
        features: int = Field(default=128, ge=1, description="channels at the finest grid, where the image is large")

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        rates = (2.5e-5, 2.5e-5) if max(data.shape[1:], default=0) >= 256 else (5e-5, 2e-4)
        return cls.Config(**options_of(data)), recipe_of(data, *rates)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=2e-3, betas=(0.0, 0.9), schedule="linear")
        players = {"discriminator": adam, "generator": adam.merged({"ema": 0.95})}
        config = cls.Config(latents=8, embedding=4, features=12, discriminator_steps=1)
        return config, Recipe(batch_size=32, steps=150, optimizers=players)

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.latents)
        self.generator, self.discriminator = Generator(config, data), discriminator(config, data)
