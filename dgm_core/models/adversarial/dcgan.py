"""Unsupervised representation learning with deep convolutional GANs. A. Radford, L. Metz, S. Chintala, 2016.
arXiv:1511.06434.

The game of Goodfellow et al. 2014 (eq. 1; −E log D(G(z)) for the generator) between convolutional networks: transposed
convolutions up from a 4 × 4 grid, strided ones down, 5 × 5 kernels, batch normalisation but at the image, ReLU in the
generator and LeakyReLU of slope 0.2 in the discriminator, weights from N(0, 0.02²). Adam with a learning rate of
2·10⁻⁴ and β₁ = 0.5 on batches of 128. The discriminator sees data and samples in batches of their own, each with its
own statistics, over all ranks.

Departures: sides other than 64 change the number of doublings, and with it the greatest width, and a side that is no
power of two is halved with rounding up (`dgm_core/nn/dcgan.py`); latents are N(0, I), theirs U[−1, 1]; the projection's
statistics are of channels, in their code of units; no weight decay (their code has 10⁻⁵); 25,000 rounds by default, of
which the paper says nothing. Real-valued images have no tanh at the end. Sampling uses running statistics.
Expected: the paper has no number on data that is at hand; none measured yet. `python -m pipelines.train` trains it by
name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataSpec, Loss
from dgm_core.models.adversarial.base import AdversarialModel, only_images
from dgm_core.nn.dcgan import DCGANGenerator, dcgan_discriminator
from dgm_core.objectives.gan import cross_entropy_discriminator, non_saturating_generator, verdicts

if TYPE_CHECKING:
    from jaxtyping import Float


class DCGAN(AdversarialModel):
    """The original game between convolutional networks with batch normalisation; images only."""

    class Config(Strict):
        latents: int = Field(default=100, ge=1)
        features: int = Field(default=128, ge=1, description="channels at the finest resolution")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=2e-4, betas=(0.5, 0.999))
        recipe = Recipe(batch_size=128, steps=25_000, optimizers={"discriminator": adam, "generator": adam})
        return cls.Config(), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=5e-3, betas=(0.0, 0.9), schedule="linear")
        players = {"discriminator": adam, "generator": adam.merged({"ema": 0.95})}
        recipe = Recipe(batch_size=32, steps=200, optimizers=players)
        return cls.Config(latents=8, features=16), recipe

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.latents)
        only_images(data)
        bounded = data.levels is not None
        self.generator = DCGANGenerator(config.latents, data.shape, config.features, bounded=bounded)
        self.discriminator = dcgan_discriminator(data.shape, config.features)

    def opponent_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        real, fake = self.discriminator(self.to_network(batch.x)), self.discriminator(fake)
        return Loss(cross_entropy_discriminator(real, fake), verdicts(real, fake))

    def generator_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        return Loss(non_saturating_generator(self.discriminator(fake)))
