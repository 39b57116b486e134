"""Generative adversarial networks. I. Goodfellow et al., 2014. arXiv:1406.2661.

The two-player game min_G max_D V(D, G) (eq. 1):

    V(D, G) = E log D(x) + E log(1 − D(G(z))),

by one step of each in turn (algorithm 1, k = 1). The discriminator descends −V. The generator descends V
(`objective: minimax`) or, as the authors do in practice, −E log D(G(z)) (`non_saturating`, section 3). Images: the
networks and the optimiser of the authors' MNIST configuration. A generator of two ReLU layers of 1200, weights uniform
within 0.05; a discriminator of two maxout layers of 240 × 5, weights uniform within 0.005, dropout 0.2 on its input and
0.5 behind; both by gradient descent with momentum, on batches of 100.

Departures: images end in tanh on [−1, 1] and its bias starts at zero, where theirs end in a sigmoid whose bias starts
at the data's marginals. Theirs halves the discriminator's objective, not the generator's: here its learning rate is
halved instead (0.05 beside 0.1). Momentum is 0.7 throughout; theirs rises from 0.5 to that over 250 epochs. The
learning rate decays by 1.000004 a step as theirs; how long they trained is not said, here 250,000 rounds. Vectors, on
which the paper has no experiment: ReLU perceptrons with three hidden layers of 128 and torch's start, no dropout,
12,000 rounds of 256 by Adam with β₁ = 0.5 and a learning rate that falls from 10⁻³ linearly to zero, and an averaged
generator, as `wgan_gp` has there.
Expected: 225 ± 2 nats on MNIST by a Parzen window in the paper, not measured here yet; modes found on toys, not run
yet: `make results ROW=toys_ring`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataSpec, Loss
from dgm_core.models.adversarial.base import AdversarialModel
from dgm_core.nn.gan_blocks import maxout_layers, mlp, start_uniform
from dgm_core.objectives.gan import (
    cross_entropy_discriminator,
    minimax_generator,
    non_saturating_generator,
    verdicts,
)

if TYPE_CHECKING:
    from jaxtyping import Float

DECAY = 1.000004  # of the learning rate, a step


class GAN(AdversarialModel):
    """The original game between perceptrons, minimax or non-saturating."""

    class Config(Strict):
        objective: Literal["non_saturating", "minimax"] = Field(default="non_saturating", description="the generator's")
        latents: int = Field(default=100, ge=1)
        features: int = Field(default=1200, ge=1, description="units of the generator's hidden layers")
        depth: int = Field(default=2, ge=1, description="hidden layers of either network")
        units: int = Field(default=240, ge=1, description="of the discriminator's hidden layers")
        pieces: int = Field(default=5, ge=1, description="of a maxout unit; 1: ReLU units instead")
        input_dropout: float = Field(default=0.2, ge=0, lt=1, description="of the discriminator's input")
        dropout: float = Field(default=0.5, ge=0, lt=1, description="of the discriminator's hidden layers")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        if data.kind == "image":
            steps = 250_000
            sgd = Optimizer(algorithm="sgd", lr=0.1, momentum=0.7, schedule="exponential", final=DECAY**-steps)
            players = {"discriminator": sgd.merged({"lr": 0.05}), "generator": sgd}
            return cls.Config(), Recipe(batch_size=100, steps=steps, optimizers=players)
        adam = Optimizer(lr=1e-3, betas=(0.5, 0.999), schedule="linear")
        players = {"discriminator": adam, "generator": adam.merged({"ema": 0.99})}
        return cls.Config(latents=data.dims, **_plain(128, 3)), Recipe(batch_size=256, steps=12_000, optimizers=players)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=2e-3, betas=(0.0, 0.9), schedule="linear")
        players = {"discriminator": adam, "generator": adam.merged({"ema": 0.98})}
        recipe = Recipe(batch_size=64, steps=1000, optimizers=players)
        if data.kind == "image":
            return cls.Config(latents=8, features=64, units=64, pieces=1, input_dropout=0.0), recipe
        faster = {"lr": 5e-3}
        recipe = recipe.merged({"steps": 600, "optimizers": {"discriminator": faster, "generator": faster}})
        return cls.Config(latents=max(2, data.dims), **_plain(32, 2)), recipe

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.latents)
        c = config
        body = mlp(c.latents, c.features, c.depth, data.dims)
        layers = maxout_layers(data.dims, c.units, c.depth, c.pieces, input_dropout=c.input_dropout, dropout=c.dropout)
        self.discriminator = nn.Sequential(nn.Flatten(), layers, nn.Linear(c.units, 1), nn.Flatten(0))
        bound = nn.Identity() if data.levels is None else nn.Tanh()
        self.generator = nn.Sequential(body, bound, nn.Unflatten(1, data.shape))
        if data.kind == "image":
            start_uniform(self.generator, 0.05 * (1200 / c.features) ** 0.5)
            start_uniform(self.discriminator, 0.005)

    def opponent_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        real, fake = self.discriminator(self.to_network(batch.x)), self.discriminator(fake)
        return Loss(cross_entropy_discriminator(real, fake), verdicts(real, fake))

    def generator_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        score = self.discriminator(fake)
        if self.config.objective == "minimax":
            return Loss(minimax_generator(score))
        return Loss(non_saturating_generator(score))


def _plain(units: int, depth: int) -> dict[str, Any]:
    """ReLU perceptrons of one size without dropout."""
    return {"features": units, "units": units, "depth": depth, "pieces": 1, "input_dropout": 0.0, "dropout": 0.0}
