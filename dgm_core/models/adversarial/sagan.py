"""Self-attention generative adversarial networks. H. Zhang, I. Goodfellow, D. Metaxas, A. Odena, 2018.
arXiv:1805.08318.

Class-conditional residual networks that descend the hinge losses (eq. 4)

    L_D = E max(0, 1 − D(x, y)) + E max(0, 1 + D(G(z, y), y)),   L_G = −E D(G(z, y), y),

in which one layer of either attends to the whole grid (eqs. 1 to 3), added with a learned γ that starts at zero. The
class is in the generator's batch normalisation, a gain and a shift for each, and in the discriminator's projection.
Spectral normalisation stands in both, on every layer with weights but the generator's class tables. Two time scales in
place of several steps of the discriminator: Adam with β = (0, 0.9) and a learning rate of 10⁻⁴ for the generator and
4·10⁻⁴ for the discriminator, batches of 256. 128 × 128 pixels are the authors' networks, of 64 channels at the finest
grid and doubled towards the coarsest, with attention on the 32 × 32 grid.

Departures: attention has an eighth of the channels throughout, as in the paper; the authors' code halves the grid of
keys and values and gives values half the channels. Other sides than 128 change the number of blocks
(`dgm_core/nn/biggan_blocks.py`); where the image is no larger than 32, attention is on the next coarser grid. Power
iteration is taken once a play of the network, not once a pass. Samples take the labels of the batch that they are held
against, theirs are uniform. Real-valued images have no tanh at the end. Sampling uses running batch statistics.
Expected: the paper has no number on data that is at hand; none measured yet. `python -m pipelines.train` trains it by
name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, repeat
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import DataSpec
from dgm_core.models.adversarial.spectral import SpectralGAN
from dgm_core.nn.biggan_blocks import (
    DiscriminatorBlock,
    GeneratorBlock,
    ImageGenerator,
    ProjectionDiscriminator,
    SelfAttention,
    Size,
    attended,
    by_label,
    start_glorot,
)
from dgm_core.nn.dcgan import grids

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Generator(ImageGenerator):
    """A linear layer onto the coarsest grid, then blocks that double it: (B, latents), (B,) labels -> (B, C, H, W)."""

    def __init__(self, latents: int, data: DataSpec, widths: Sequence[int], at: int | None) -> None:
        super().__init__()
        sizes, outs = grids(*data.shape[1:]), (widths[-1], *widths[::-1])
        self.grid = (outs[0], *sizes[-1])
        self.enter = nn.Linear(latents, math.prod(self.grid))
        norm = by_label(data.classes)
        self.blocks = nn.ModuleList(
            GeneratorBlock(a, b, norm, size) for (a, b), size in zip(pairwise(outs), sizes[-2::-1], strict=True)
        )
        self.finish(outs, at, data, start_glorot, pooled=False)

    def forward(self, z: Float[Tensor, " B latents"], y: Int[Tensor, " B"]) -> Float[Tensor, " B C H W"]:
        return self.paint(z, self.blocks, repeat(y, len(self.blocks)))


def discriminator(
    shape: tuple[int, ...], classes: int, widths: Sequence[int], at: int | None
) -> ProjectionDiscriminator:
    """Blocks that halve the grid down to the coarsest, one that does not, projection."""
    layers: list[nn.Module] = []
    for k, (c, out) in enumerate(zip((shape[0], *widths[:-1]), widths, strict=True)):
        layers.append(DiscriminatorBlock(c, out, down=True, first=k == 0))
        layers += [SelfAttention(out)] if at == k + 1 else []
    layers.append(DiscriminatorBlock(widths[-1], widths[-1], down=False))
    return ProjectionDiscriminator(layers, widths[-1], classes, start_glorot)


class SAGAN(SpectralGAN):
    """Hinge losses between spectrally normalised ResNets with self-attention; class-conditional images."""

    class Config(Strict):
        latents: int = Field(default=128, ge=1)
        features: int = Field(default=64, ge=1, description="channels at the finest grid")
        attention: int = Field(default=32, ge=0, description="side of the grid that has it, at most; 0 leaves it out")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        slow = Optimizer(lr=1e-4, betas=(0.0, 0.9))
        players = {"discriminator": slow.merged({"lr": 4e-4}), "generator": slow}
        return cls.Config(), Recipe(batch_size=256, steps=1_000_000, optimizers=players)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        slow = Optimizer(lr=2e-3, betas=(0.0, 0.9), schedule="linear")
        players = {"discriminator": slow.merged({"lr": 4e-3}), "generator": slow.merged({"ema": 0.95})}
        return cls.Config(latents=8, features=12), Recipe(batch_size=32, steps=150, optimizers=players)

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.latents)
        sizes: list[Size] = grids(*data.shape[1:])
        widths = [config.features * min(2**k, 16) for k in range(len(sizes) - 1)]
        at = attended(sizes, config.attention)
        self.generator = Generator(config.latents, data, widths, at)
        self.discriminator = discriminator(data.shape, data.classes, widths, at)
