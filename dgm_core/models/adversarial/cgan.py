"""Conditional generative adversarial nets. M. Mirza, S. Osindero, 2014. arXiv:1411.1784.

Both players are told the class y (eq. 2):

    min_G max_D E log D(x | y) + E log(1 − D(G(z | y))),

the generator by −E log D(G(z | y)), as Goodfellow et al. 2014 do. Images are the paper's MNIST networks: z and y enter
ReLU layers of 200 and 1000, a joint one of 1200 follows; in the discriminator x and y enter maxout layers of 240 × 5
and 50 × 5, a joint one of 240 × 4 follows; dropout of 0.5 in both. Gradient descent on batches of 100, at a learning
rate that falls from 0.1 to 10⁻⁶ by 1.00004 a step.

Departures: latents are N(0, I), theirs uniform on the unit cube; images end in tanh on [−1, 1], theirs in a sigmoid;
momentum is 0.7 throughout, theirs rises from 0.5 to that; dropout stands behind hidden layers, not on inputs. Samples
take the labels of the batch that they are held against. Weights start as torch's: the paper says nothing of them, nor
of the discriminator's objective being halved. Vectors, on which the paper has no experiment: every hidden layer has
128 ReLU units, no dropout, and the recipe is that of `gan`.
Expected: 132 ± 1.8 nats on MNIST by a Parzen window in the paper, not measured here yet; `python -m pipelines.train`
trains it by name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataSpec, Loss
from dgm_core.models.adversarial.base import AdversarialModel
from dgm_core.nn.gan_blocks import hidden, one_hot
from dgm_core.objectives.gan import cross_entropy_discriminator, non_saturating_generator, verdicts

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class TwoInputs(nn.Module):
    """A hidden layer for each of two inputs, and a joint one: (B, a), (B, b) labels' one-hot -> (B, units)."""

    def __init__(
        self, inputs: tuple[int, int], first: tuple[int, int], units: int, pieces: tuple[int, int], dropout: float
    ) -> None:
        super().__init__()
        self.classes = inputs[1]
        self.of_input = hidden(inputs[0], first[0], pieces[0])
        self.of_label = hidden(inputs[1], first[1], pieces[0])
        self.joint = hidden(sum(first), units, pieces[1])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, " B D"], y: Int[Tensor, " B"]) -> Float[Tensor, " B units"]:
        label = one_hot(y, self.classes, x.dtype)
        h = torch.cat([self.of_input(x), self.of_label(label)], 1)
        return self.dropout(self.joint(self.dropout(h)))


class Generator(nn.Module):
    """(B, latents), (B,) labels -> (B, *shape)."""

    def __init__(self, body: TwoInputs, units: int, shape: tuple[int, ...], bounded: bool) -> None:
        super().__init__()
        self.shape, self.bounded = shape, bounded
        self.body, self.out = body, nn.Linear(units, math.prod(shape))

    def forward(self, z: Float[Tensor, " B latents"], y: Int[Tensor, " B"]) -> Float[Tensor, " B *shape"]:
        x = self.out(self.body(z, y)).unflatten(1, self.shape)
        return x.tanh() if self.bounded else x


class Discriminator(nn.Module):
    """(B, *shape), (B,) labels -> (B,) scores."""

    def __init__(self, body: TwoInputs, units: int) -> None:
        super().__init__()
        self.body, self.score = body, nn.Linear(units, 1)

    def forward(self, x: Float[Tensor, " B *shape"], y: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        return self.score(self.body(x.flatten(1), y)).flatten()


class CGAN(AdversarialModel):
    """The original game between perceptrons that both know the class."""

    class Config(Strict):
        latents: int = Field(default=100, ge=1)
        latent_features: int = Field(default=200, ge=1, description="generator: hidden units of the latents")
        label_features: int = Field(default=1000, ge=1, description="generator: hidden units of the label")
        features: int = Field(default=1200, ge=1, description="generator: joint hidden units")
        units: int = Field(default=240, ge=1, description="discriminator: hidden units of the data, and joint ones")
        label_units: int = Field(default=50, ge=1, description="discriminator: hidden units of the label")
        pieces: int = Field(default=5, ge=1, description="of a maxout unit in the first layer; 1: ReLU units instead")
        joint_pieces: int = Field(default=4, ge=1, description="of a maxout unit in the joint layer; 1: ReLU units")
        dropout: float = Field(default=0.5, ge=0, lt=1, description="behind every hidden layer of both")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        if data.kind == "image":
            # 0.1 · 1.00004^−n reaches 10⁻⁶ after n = 288,000 steps.
            sgd = Optimizer(algorithm="sgd", lr=0.1, momentum=0.7, schedule="exponential", final=1e-5)
            recipe = Recipe(batch_size=100, steps=288_000, optimizers={"discriminator": sgd, "generator": sgd})
            return cls.Config(), recipe
        adam = Optimizer(lr=1e-3, betas=(0.5, 0.999), schedule="linear")
        players = {"discriminator": adam, "generator": adam.merged({"ema": 0.99})}
        recipe = Recipe(batch_size=256, steps=12_000, optimizers=players)
        return cls.Config(latents=data.dims, **_plain(128)), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=5e-3, betas=(0.0, 0.9), schedule="linear")
        players = {"discriminator": adam, "generator": adam.merged({"ema": 0.95})}
        recipe = Recipe(batch_size=64, steps=600, optimizers=players)
        config = cls.Config(latents=max(2, min(8, data.dims)), **_plain(32))
        return config.merged({"pieces": 2, "joint_pieces": 2, "dropout": 0.3}), recipe

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.latents, conditional=True)
        c, classes = config, data.classes
        body = TwoInputs((c.latents, classes), (c.latent_features, c.label_features), c.features, (1, 1), c.dropout)
        self.generator = Generator(body, c.features, data.shape, data.levels is not None)
        pieces = (c.pieces, c.joint_pieces)
        body = TwoInputs((data.dims, classes), (c.units, c.label_units), c.units, pieces, c.dropout)
        self.discriminator = Discriminator(body, c.units)

    def opponent_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        y = self.labels_of(batch)
        real, fake = self.discriminator(self.to_network(batch.x), y), self.discriminator(fake, y)
        return Loss(cross_entropy_discriminator(real, fake), verdicts(real, fake))

    def generator_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        return Loss(non_saturating_generator(self.discriminator(fake, self.labels_of(batch))))


def _plain(units: int) -> dict[str, Any]:
    """ReLU layers of one size without dropout."""
    widths = ("latent_features", "label_features", "features", "units", "label_units")
    return {**dict.fromkeys(widths, units), "pieces": 1, "joint_pieces": 1, "dropout": 0.0}
