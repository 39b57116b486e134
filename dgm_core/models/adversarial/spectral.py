"""What SAGAN and BigGAN share: the hinge game of class-conditional images between spectrally normalised networks; and
what the two BigGANs do besides: truncation, the orthogonal penalty, standing statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, Loss
from dgm_core.models.adversarial.base import AdversarialModel, only_images
from dgm_core.nn.biggan_blocks import ProjectionDiscriminator
from dgm_core.nn.spectral_norm import advance
from dgm_core.objectives.gan import hinge_discriminator, hinge_generator, verdicts
from dgm_core.objectives.orthogonal import orthogonal_penalty

if TYPE_CHECKING:
    from jaxtyping import Float

REFINED = 50  # power iterations where weights are an average, whose singular vectors no play has followed


class SpectralGAN(AdversarialModel):
    """Both networks see the class; layers of both are normalised, with one step of power iteration a play."""

    discriminator: ProjectionDiscriminator

    def __init__(self, config: Strict, data: DataSpec, *, latents: int, plays: int = 1) -> None:
        super().__init__(config, data, latents=latents, plays=plays, conditional=True)
        only_images(data)

    def opponent_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        y = self.labels_of(batch)
        # Examples do not meet in the discriminator, so that one pass scores both batches.
        scores = self.discriminator(torch.cat([self.to_network(batch.x), fake]), torch.cat([y, y]))
        real, made = scores.chunk(2)
        return Loss(hinge_discriminator(real, made), verdicts(real, made))

    def generator_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        return Loss(hinge_generator(self.discriminator(fake, self.labels_of(batch))))

    def after(self, turn: str, clock: Clock) -> None:
        super().after(turn, clock)
        advance(self.get_submodule(turn))

    def calibrate(self, batches: Iterator[Batch], *, passes: int = 16, batch_size: int = 256) -> None:
        """Singular vectors, and then batch statistics, of the weights that will sample."""
        advance(self.generator, REFINED)
        super().calibrate(batches, passes=passes, batch_size=batch_size)


class LargeScaleConfig(Strict):
    """What both BigGANs can be told; each adds its latents."""

    embedding: int = Field(default=128, ge=1, description="size of the class's shared embedding")
    features: int = Field(default=96, ge=1, description="channels at the finest grid, where the image is large")
    attention: int = Field(default=64, ge=0, description="side of the grid that has it, at most; 0 leaves it out")
    orthogonal: float = Field(default=1e-4, ge=0, description="β of the generator's penalty; 0 leaves it out")
    discriminator_steps: int = Field(default=2, ge=1, description="plays for each of the generator")


class LargeScaleGAN(SpectralGAN):
    """A generator whose `embedding` of the class is shared, with a penalty on its other weights."""

    config: LargeScaleConfig

    def __init__(self, config: LargeScaleConfig, data: DataSpec, *, latents: int) -> None:
        super().__init__(config, data, latents=latents, plays=config.discriminator_steps)

    def generator_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        game = super().generator_loss(batch, fake, clock).value
        if not self.config.orthogonal:
            return Loss(game)
        named = self.generator.named_parameters()
        penalty = orthogonal_penalty(p for name, p in named if p.ndim > 1 and not name.startswith("embedding."))
        metrics = {"game": game.detach(), "orthogonal_penalty": penalty.detach()}
        return Loss(game + self.config.orthogonal * penalty, metrics)

    def draw_latent(self, n: int, truncation: float | None = None) -> Float[Tensor, " n latents"]:
        """N(0, I), or that truncated to [−t, t] coordinate by coordinate."""
        if truncation is None:
            return super().draw_latent(n)
        if truncation < 0:
            raise DataMismatch(f"truncation {truncation} is not accepted: the latents' bound is 0 or more")
        # The inverse of the distribution function: of u uniform on [−P, P), P the mass within the bound.
        u = 2 * torch.rand(n, self.latents, device=self.device, dtype=self._dtype) - 1
        mass = torch.erf(u.new_tensor(truncation * 0.5**0.5))
        return (2**0.5 * torch.erfinv(u * mass)).clamp(-truncation, truncation)

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        context: Mapping[str, Tensor] = {},
        *,
        truncation: float | None = None,
    ) -> Tensor:
        labels = self.labels_for(n, y)
        return self.to_stored(self.generate(self.draw_latent(n, truncation), labels))

    def calibrate(self, batches: Iterator[Batch], *, passes: int = 100, batch_size: int = 64) -> None:
        super().calibrate(batches, passes=passes, batch_size=batch_size)


def options_of(data: DataSpec) -> dict[str, Any]:
    """What up to 32 × 32 the authors' code for CIFAR-10 has otherwise than the paper."""
    return {"features": 64, "attention": 0, "orthogonal": 0.0, "discriminator_steps": 4} if is_small(data) else {}


def recipe_of(data: DataSpec, generator_lr: float = 5e-5, discriminator_lr: float = 2e-4) -> Recipe:
    """The paper's for ImageNet; up to 32 × 32 the authors' code's for CIFAR-10."""
    adam = Optimizer(lr=2e-4, betas=(0.0, 0.999))
    if is_small(data):
        players = {"discriminator": adam, "generator": adam.merged({"ema": 0.9999})}
        return Recipe(batch_size=50, steps=125_000, optimizers=players)
    generator = adam.merged({"lr": generator_lr, "ema": 0.9999})
    players = {"discriminator": adam.merged({"lr": discriminator_lr}), "generator": generator}
    return Recipe(batch_size=2048, microbatch=256, steps=150_000, optimizers=players)


def is_small(data: DataSpec) -> bool:
    return max(data.shape[1:], default=0) <= 32
