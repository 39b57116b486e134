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

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import DataSpec
from dgm_core.models.adversarial.spectral import LargeScaleGAN, is_small, recipe_of
from dgm_core.nn.biggan_blocks import (
    DeepDiscriminatorBlock,
    DeepGeneratorBlock,
    ProjectionDiscriminator,
    SelfAttention,
    attended,
    by_vector,
    discriminator_widths,
    generator_widths,
    halvings,
    start_orthogonal,
)
from dgm_core.nn.dcgan import grids
from dgm_core.nn.norm import BatchNorm
from dgm_core.nn.spectral_norm import spectrally_normalise

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Generator(nn.Module):
    """Latents and class onto the coarsest grid, then at each a block that keeps it and one that doubles it:
    (B, latents), (B,) labels -> (B, C, H, W)."""

    def __init__(self, config: BigGANDeep.Config, data: DataSpec) -> None:
        super().__init__()
        c, sizes = config, grids(*data.shape[1:])
        outs = [c.features * width for width in generator_widths(len(sizes) - 1)]
        told = c.embedding + c.latents
        self.grid = (outs[0], *sizes[-1])
        self.embedding = nn.Embedding(data.classes, c.embedding)
        self.enter = nn.Linear(told, self.grid[0] * self.grid[1] * self.grid[2])
        norm = by_vector(told)
        self.stages = nn.ModuleList(
            nn.ModuleList([DeepGeneratorBlock(a, a, norm), DeepGeneratorBlock(a, b, norm, size)])
            for (a, b), size in zip(pairwise(outs), sizes[-2::-1], strict=True)
        )
        at = attended(sizes, c.attention)
        self.attended = None if at is None else len(sizes) - 1 - at  # the stage that sees the grid with attention
        self.attention = None if at is None else SelfAttention(outs[len(sizes) - 1 - at], pooled=True)
        self.norm, self.out = BatchNorm(outs[-1]), nn.Conv2d(outs[-1], data.shape[0], 3, padding=1)
        self.bounded = data.levels is not None
        start_orthogonal(self)
        spectrally_normalise(self, (nn.Conv2d, nn.Linear))

    def forward(self, z: Float[Tensor, " B latents"], y: Int[Tensor, " B"]) -> Float[Tensor, " B C H W"]:
        told = torch.cat([self.embedding(y).to(z.dtype), z], 1)
        h = self.enter(told).unflatten(1, self.grid)
        for k, stage in enumerate(self.stages):
            if self.attention is not None and k == self.attended:
                h = self.attention(h)
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                h = block(h, told)
        x = self.out(F.relu(self.norm(h)))
        return x.tanh() if self.bounded else x


def discriminator(config: BigGANDeep.Config, data: DataSpec) -> ProjectionDiscriminator:
    """A convolution, then at each grid a block that halves it where it is large and one that keeps it; projection."""
    sizes = grids(*data.shape[1:])
    doublings = len(sizes) - 1
    outs = [config.features * width for width in discriminator_widths(doublings)]
    downs, at = halvings(doublings), attended(sizes, config.attention)
    layers: list[nn.Module] = [nn.Conv2d(data.shape[0], outs[0], 3, padding=1)]
    for k, (a, b) in enumerate(pairwise(outs)):
        layers += [DeepDiscriminatorBlock(a, b, down=k < downs), DeepDiscriminatorBlock(b, b, down=False)]
        layers += [SelfAttention(b, pooled=True)] if at is not None and k + 1 == min(at, downs) else []
    network = ProjectionDiscriminator(nn.Sequential(*layers), outs[-1], data.classes)
    start_orthogonal(network)
    spectrally_normalise(network)
    return network


class BigGANDeep(LargeScaleGAN):
    """Deep bottleneck networks that are told class and latents at every block; images of given classes."""

    class Config(Strict):
        latents: int = Field(default=128, ge=1)
        embedding: int = Field(default=128, ge=1, description="size of the class's shared embedding")
        features: int = Field(default=128, ge=1, description="channels at the finest grid, where the image is large")
        attention: int = Field(default=64, ge=0, description="side of the grid that has it, at most; 0 leaves it out")
        orthogonal: float = Field(default=1e-4, ge=0, description="β of the generator's penalty; 0 leaves it out")
        discriminator_steps: int = Field(default=2, ge=1, description="plays for each of the generator")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        small = {"features": 64, "attention": 0, "orthogonal": 0.0, "discriminator_steps": 4}
        rates = (2.5e-5, 2.5e-5) if max(data.shape[1:], default=0) >= 256 else (5e-5, 2e-4)
        return cls.Config(**(small if is_small(data) else {})), recipe_of(data, *rates)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=2e-3, betas=(0.0, 0.9), schedule="linear")
        players = {"discriminator": adam, "generator": adam.merged({"ema": 0.95})}
        config = cls.Config(latents=8, embedding=4, features=12, discriminator_steps=1)
        return config, Recipe(batch_size=32, steps=150, optimizers=players)

    def __init__(self, config: Config, data: DataSpec) -> None:
        c = config
        super().__init__(c, data, latents=c.latents, plays=c.discriminator_steps, penalty=c.orthogonal)
        self.generator, self.discriminator = Generator(c, data), discriminator(c, data)
