"""Conditional image synthesis with auxiliary classifier GANs. A. Odena, C. Olah, J. Shlens, 2017. arXiv:1610.09585.

The generator is told the class; the discriminator is not, and names it: it gives D = P(S = real | x) and P(C | x),

    L_S = E log P(S = real | x) + E log P(S = fake | x̃)        (eq. 2)
    L_C = E log P(C = c | x) + E log P(C = c | x̃)              (eq. 3)

The discriminator climbs L_S + L_C, on data and on samples; the generator L_C − L_S (`objective: minimax`) or, by
default, L_C + E log P(S = real | x̃), as GANs are trained. Images are the paper's CIFAR-10 networks: the latents with
the class beside them on a 4 × 4 grid of 384 channels, then transposed 5 × 5 convolutions to 192, 96 and the image; six
3 × 3 convolutions of 16 … 512 channels, every other of stride 2, LeakyReLU 0.2, dropout 0.5, batch normalisation but in
the first. Weights N(0, 0.02²), Adam with a learning rate of 2·10⁻⁴ and β₁ = 0.5, 50,000 rounds of 100.

Departures: the generator's default objective, above; batch normalisation on the projection too, which the paper's table
leaves out; no noise on activations (of its 0, 0.1 and 0.2). Sides other than 32 change the number of doublings, as in
`dgm_core/nn/dcgan.py`. Samples take the labels of the batch that they are held against. Data and samples are normalised
in batches of their own. Vectors, on which the paper has no experiment: ReLU perceptrons with three hidden layers of
128, no dropout, and the recipe is that of `gan`.
Expected: the paper has no number on data that is at hand; none measured yet. `python -m pipelines.train` trains it by
name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataSpec, Loss
from dgm_core.models.adversarial.base import AdversarialModel, only_images
from dgm_core.nn.dcgan import SLOPE, DCGANGenerator, start_normal
from dgm_core.nn.gan_blocks import maxout_layers, mlp, one_hot
from dgm_core.nn.norm import BatchNorm
from dgm_core.objectives.gan import (
    cross_entropy_discriminator,
    minimax_generator,
    non_saturating_generator,
    verdicts,
)
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class LabelledGenerator(nn.Module):
    """A network of latents that sees the class beside them: (B, latents), (B,) labels -> (B, *shape)."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, z: Float[Tensor, " B latents"], y: Int[Tensor, " B"]) -> Float[Tensor, " B *shape"]:
        return self.network(torch.cat([z, one_hot(y, self.classes, z.dtype)], 1))


class Discriminator(nn.Module):
    """Two heads on one body: (B, *shape) -> (B,) scores of being data, (B, classes) logits."""

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body, self.heads = body, nn.Linear(features, 1 + classes)

    def forward(self, x: Float[Tensor, " B *shape"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B classes"]]:
        heads = self.heads(self.body(x))
        return heads[:, 0], heads[:, 1:]


def convolutions(shape: tuple[int, ...], features: int, dropout: float) -> tuple[nn.Sequential, int]:
    """The paper's six, flat, and how many numbers that are."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for k in range(6):
        stride = 2 if k % 2 == 0 else 1
        out = features * 2**k
        layers.append(nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=k == 0))
        layers += [BatchNorm(out)] if k else []
        layers += [nn.LeakyReLU(SLOPE), nn.Dropout(dropout)]
        channels, height, width = out, -(-height // stride), -(-width // stride)
    return nn.Sequential(*layers, nn.Flatten()), channels * height * width


class ACGAN(AdversarialModel):
    """The generator is told the class, the discriminator names it, and both gain by its being right."""

    class Config(Strict):
        objective: Literal["non_saturating", "minimax"] = Field(default="non_saturating", description="the generator's")
        latents: int = Field(default=100, ge=1)
        features: int = Field(
            default=96, ge=1, description="generator: channels in front of the image, hidden units of a perceptron"
        )
        units: int = Field(
            default=16, ge=1, description="discriminator: channels of the first convolution, units of a perceptron"
        )
        depth: int = Field(default=3, ge=1, description="hidden layers of a perceptron")
        dropout: float = Field(default=0.5, ge=0, lt=1, description="in the discriminator, behind every hidden layer")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        if data.kind == "image":
            adam = Optimizer(lr=2e-4, betas=(0.5, 0.999))
            recipe = Recipe(batch_size=100, steps=50_000, optimizers={"discriminator": adam, "generator": adam})
            return cls.Config(), recipe
        adam = Optimizer(lr=1e-3, betas=(0.5, 0.999), schedule="linear")
        players = {"discriminator": adam, "generator": adam.merged({"ema": 0.99})}
        recipe = Recipe(batch_size=256, steps=12_000, optimizers=players)
        return cls.Config(latents=data.dims, features=128, units=128, dropout=0.0), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=2e-3, betas=(0.5, 0.99), schedule="linear")
        slower = adam.merged({"lr": 1e-3})  # at one rate, some starts never find both classes' pictures
        recipe = Recipe(batch_size=64, steps=300, optimizers={"discriminator": slower, "generator": adam})
        if data.kind == "image":
            return cls.Config(latents=8, features=16, units=4, dropout=0.1), recipe
        faster = {"lr": 5e-3, "betas": (0.0, 0.9)}
        recipe = recipe.merged({"optimizers": {"discriminator": faster, "generator": faster}})
        return cls.Config(latents=max(2, data.dims), features=32, units=32, depth=2, dropout=0.0), recipe

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.latents, conditional=True)
        c, bounded = config, data.levels is not None
        latents = c.latents + data.classes
        if data.kind == "vector":
            bound = nn.Tanh() if bounded else nn.Identity()
            network: nn.Module = nn.Sequential(mlp(latents, c.features, c.depth, data.dims), bound)
            body, size = maxout_layers(data.dims, c.units, c.depth, 1, dropout=c.dropout), c.units
            self.discriminator = Discriminator(body, size, data.classes)
        else:
            only_images(data)
            network = DCGANGenerator(latents, data.shape, c.features, bounded=bounded)
            body, size = convolutions(data.shape, c.units, c.dropout)
            self.discriminator = Discriminator(body, size, data.classes)
            start_normal(self.discriminator)
        self.generator = LabelledGenerator(network, data.classes)

    def opponent_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        y = self.labels_of(batch)
        real, of_real = self.discriminator(self.to_network(batch.x))
        score, of_fake = self.discriminator(fake)
        source, named = cross_entropy_discriminator(real, score), _misnamed(of_real, y) + _misnamed(of_fake, y)
        metrics = {
            **verdicts(real, score),
            "source_loss": source.detach(),
            "class_loss": named.detach(),
            "class_accuracy_real": _recognised(of_real, y),
            "class_accuracy_fake": _recognised(of_fake, y),
        }
        return Loss(source + named, metrics)

    def generator_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        score, logits = self.discriminator(fake)
        game = minimax_generator if self.config.objective == "minimax" else non_saturating_generator
        source, named = game(score), _misnamed(logits, self.labels_of(batch))
        return Loss(source + named, {"source_loss": source.detach(), "class_loss": named.detach()})

    def score(self, x: Float[Tensor, " B *shape"], y: Int[Tensor, " B"] | None) -> Float[Tensor, " B"]:
        return self.discriminator(x)[0]


def _misnamed(logits: Float[Tensor, " B classes"], y: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """−E log P(C = c | x)."""
    return F.cross_entropy(promote(logits), y)


@torch.no_grad()
def _recognised(logits: Float[Tensor, " B classes"], y: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    return (logits.argmax(1) == y).float().mean()
