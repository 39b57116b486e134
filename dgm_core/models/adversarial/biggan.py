"""Large scale GAN training for high fidelity natural image synthesis. A. Brock, J. Donahue, K. Simonyan, 2018.
arXiv:1809.11096.

SAGAN's game (hinge losses, spectral normalisation and self-attention in both, projection) at scale: wide networks,
large batches, and

- one embedding of the class for the whole generator, from which every batch normalisation takes its gain and shift;
- skip-z: the latents are cut into chunks of 20, one for the first layer and one for each block, beside the class;
- orthogonal start, and in the generator β ‖WᵀW ⊙ (1 − I)‖²_F (eq. 3), β = 10⁻⁴, on all weights but the embedding;
- truncation: `sample(…, truncation=t)` draws latents within [−t, t] only, from a normal truncated there; nearer to the
  mean of a class the smaller t is, and at 0 one image for each;
- an averaged generator (decay 0.9999) with standing statistics: batch moments averaged over 100 passes.

128 × 128 pixels are the paper's networks (table 4), of 96 channels at the finest grid, with attention at 64 × 64. Adam
with β = (0, 0.999), a learning rate of 2·10⁻⁴ for the discriminator and 5·10⁻⁵ for the generator, two steps of the one
for each of the other, batches of 2048; they are accumulated from microbatches of 256, whose batch statistics are their
own.
Images of up to 32 × 32 have the networks and the recipe of the authors' PyTorch code for CIFAR-10: 4 · 64 channels
throughout, no attention, no penalty, 2·10⁻⁴ for both, four steps, batches of 50.

Departures: an orthogonal start at 32 pixels too, where that code's is N(0, 0.02²). Sides between those of the paper's
tables have the next larger one's widths (`dgm_core/nn/biggan_blocks.py`). Power iteration is taken once a play of the
network, not once a pass, and fifty times for the average. Samples take the labels of the batch that they are held
against. Real-valued images have no tanh at the end.
Expected: the paper has no number on data that is at hand; none measured yet. `python -m pipelines.train` trains it by
name.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import DataSpec
from dgm_core.models.adversarial.spectral import LargeScaleConfig, LargeScaleGAN, options_of, recipe_of
from dgm_core.nn.biggan_blocks import (
    DiscriminatorBlock,
    GeneratorBlock,
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


class Generator(ImageGenerator):
    """The first chunk onto the coarsest grid, then blocks that double it, each told the class and a chunk of its own:
    (B, latents), (B,) labels -> (B, C, H, W)."""

    def __init__(self, config: BigGAN.Config, data: DataSpec) -> None:
        super().__init__()
        c, sizes = config, grids(*data.shape[1:])
        outs = [c.features * width for width in generator_widths(len(sizes) - 1)]
        self.chunk, self.grid = c.chunk, (outs[0], *sizes[-1])
        self.embedding = nn.Embedding(data.classes, c.embedding)
        self.enter = nn.Linear(c.chunk, math.prod(self.grid))
        norm = by_vector(c.embedding + c.chunk)
        self.blocks = nn.ModuleList(
            GeneratorBlock(a, b, norm, size) for (a, b), size in zip(pairwise(outs), sizes[-2::-1], strict=True)
        )
        self.finish(outs, attended(sizes, c.attention), data, start_orthogonal, pooled=True)

    def forward(self, z: Float[Tensor, " B latents"], y: Int[Tensor, " B"]) -> Float[Tensor, " B C H W"]:
        first, *chunks = z.split(self.chunk, 1)
        of_class = self.embedding(y)
        return self.paint(first, self.blocks, (torch.cat([of_class.to(z.dtype), chunk], 1) for chunk in chunks))


def discriminator(config: BigGAN.Config, data: DataSpec) -> ProjectionDiscriminator:
    """Residual blocks from the image on, all but the last halving it where it is large; projection."""
    outs, downs, at = descent(data.shape, config.features, config.attention)
    layers: list[nn.Module] = []
    for k, (a, b) in enumerate(pairwise([data.shape[0], *outs])):
        layers.append(DiscriminatorBlock(a, b, down=k < downs, first=k == 0))
        layers += [SelfAttention(b, pooled=True)] if k == at else []
    return ProjectionDiscriminator(layers, outs[-1], data.classes, start_orthogonal)


class BigGAN(LargeScaleGAN):
    """Wide residual networks, a shared class embedding and latents at every resolution; images of given classes."""

    class Config(LargeScaleConfig):
        chunk: int = Field(default=20, ge=1, description="latents of the first layer and of each block")

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        return cls.Config(**options_of(data)), recipe_of(data)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=4e-3, betas=(0.0, 0.9), schedule="linear")
        players = {"discriminator": adam, "generator": adam.merged({"ema": 0.95})}
        config = cls.Config(chunk=4, embedding=4, features=6, discriminator_steps=1)
        return config, Recipe(batch_size=32, steps=150, optimizers=players)

    def __init__(self, config: Config, data: DataSpec) -> None:
        doublings = len(grids(*data.shape[1:])) - 1 if data.kind == "image" else 0
        super().__init__(config, data, latents=config.chunk * (1 + doublings))
        self.generator, self.discriminator = Generator(config, data), discriminator(config, data)
