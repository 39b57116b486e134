"""Wasserstein GAN. M. Arjovsky, S. Chintala, L. Bottou, 2017. arXiv:1701.07875.

The critic climbs E f(x) − E f(G(z)) (eq. 2 and 3), which at its best is the Wasserstein-1 distance of data and samples
times the greatest slope that f may have; the generator climbs E f(G(z)). That f has a slope at all is held by clipping
every weight to [−c, c] after each of the critic's steps (algorithm 1): c = 0.01, RMSProp with a learning rate of
5·10⁻⁵, batches of 64, five plays of the critic for each of the generator. As in the authors' code it has 100 in the
first 25 rounds and in every 500th, so that the generator meets a trained critic. Images: their DCGAN, 64 channels at
the finest resolution, batch normalisation in both, clipped in the critic with everything else.

Departures: kernels are 5 × 5, theirs 4 × 4, and sides other than 64 change the number of doublings
(`dgm_core/nn/dcgan.py`). The first rounds are a share of training, 25 of 100,000 by default, of which the paper says
nothing. Real-valued images have no tanh at the end. Sampling uses running batch statistics. Vectors, on which the paper
has no experiment: ReLU perceptrons, as `defaults` says them.
Expected: the paper has no number on data that is at hand; modes found on toys, not run yet: `make results
ROW=toys_ring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataSpec, Loss, Turn
from dgm_core.models.adversarial.base import AdversarialModel, only_images
from dgm_core.nn.dcgan import DCGANGenerator, dcgan_discriminator
from dgm_core.nn.gan_blocks import mlp
from dgm_core.objectives.gan import wasserstein_critic, wasserstein_generator

if TYPE_CHECKING:
    from jaxtyping import Float


class WGAN(AdversarialModel):
    """Wasserstein GAN with clipped weights: perceptrons for vectors, DCGAN's networks for images."""

    class Config(Strict):
        latents: int = Field(default=100, ge=1)
        features: int = Field(default=64, ge=1, description="hidden units, or channels at the finest resolution")
        depth: int = Field(default=3, ge=1, description="hidden layers of a perceptron")
        clip: float = Field(default=0.01, gt=0, description="c: the greatest size of a critic's weight")
        critic_steps: int = Field(default=5, ge=1, description="plays of the critic for each of the generator")
        long_steps: int = Field(
            default=100, ge=0, description="such plays in long rounds; not above critic_steps: none"
        )
        long_start: float = Field(default=2.5e-4, ge=0, le=1, description="share of training that begins with them")
        long_every: int = Field(default=500, ge=1, description="and one round in so many thereafter")

    config: Config
    opponent = "critic"

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        if data.kind == "image":
            rmsprop = Optimizer(algorithm="rmsprop", lr=5e-5)
            recipe = Recipe(batch_size=64, steps=100_000, optimizers={"critic": rmsprop, "generator": rmsprop})
            return cls.Config(), recipe
        rmsprop = Optimizer(algorithm="rmsprop", lr=5e-4)
        recipe = Recipe(batch_size=256, steps=5000, optimizers={"critic": rmsprop, "generator": rmsprop})
        return cls.Config(latents=data.dims, features=128, clip=0.1, long_start=25 / 5000), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        rmsprop = Optimizer(algorithm="rmsprop", lr=2e-3, schedule="linear")
        recipe = Recipe(batch_size=64, steps=150, optimizers={"critic": rmsprop, "generator": rmsprop})
        if data.kind == "image":
            config = cls.Config(latents=8, features=16, clip=0.05, critic_steps=2, long_steps=0)
            return config, recipe.merged({"steps": 100, "batch_size": 32})
        config = cls.Config(latents=max(2, data.dims), features=32, depth=2, clip=0.1, critic_steps=3, long_steps=0)
        return config, recipe

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.latents, plays=config.critic_steps)
        c, bounded = config, data.levels is not None
        if data.kind == "vector":
            bound = nn.Tanh() if bounded else nn.Identity()
            self.generator = nn.Sequential(mlp(c.latents, c.features, c.depth, data.dims), bound)
            self.critic = nn.Sequential(mlp(data.dims, c.features, c.depth, 1), nn.Flatten(0))
        else:
            only_images(data)
            self.generator = DCGANGenerator(c.latents, data.shape, c.features, bounded=bounded)
            self.critic = dcgan_discriminator(data.shape, c.features)

    def turns(self) -> Sequence[Turn]:
        c = self.config
        critic, generator = super().turns()
        if c.long_steps <= c.critic_steps:
            return [critic, generator]
        more = c.long_steps - c.critic_steps
        head_start = Turn("head_start", ("critic",), repeat=more, window=(0.0, c.long_start))
        catch_up = Turn("catch_up", ("critic",), every=c.long_every, repeat=more, window=(c.long_start, 1.0))
        return [critic, head_start, catch_up, generator]

    def opponent_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        value = wasserstein_critic(self.critic(self.to_network(batch.x)), self.critic(fake))
        return Loss(value, {"wasserstein": -value.detach()})

    def generator_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        return Loss(wasserstein_generator(self.critic(fake)))

    @torch.no_grad()
    def after(self, turn: str, clock: Clock) -> None:
        super().after(turn, clock)
        if turn != "generator":
            for p in self.critic.parameters():
                p.clamp_(-self.config.clip, self.config.clip)
