"""A style-based generator architecture for generative adversarial networks. T. Karras, S. Laine, T. Aila, 2019.
arXiv:1812.04948.

ProGAN's growing networks, with a generator that draws a learnt constant by styles w = f(z): each layer's features are
normalised image by image, scaled and shifted by affine functions of w (AdaIN, eq. 1), after noise with a learnt
strength. The players descend

    −E log D(x) − E log(1 − D(x̃)) + γ/2 E ‖∇ D(x)‖²   and   −E log D(x̃),

the non-saturating game with R1 on data, γ = 10 (appendix C). For 90 % of the samples a second w takes over at a random
layer (section 3.1). Samples may be truncated: w̄ + ψ (w − w̄), w̄ the running mean of w (appendix B). Eight mapping layers
of 512 with a hundredth of the learning rate, which is 10⁻³ with Adam's β = (0, 0.99); binomial filters at up- and
down-sampling; growing starts at 8 × 8 pixels, with batches of 256 there, 128 at 16, 64 at 32 and 32 from 64 on, 600,000
images for each fade and each resolution alone, 25 million in all; an average of the generator with a half-life of
10,000 images.

Departures: images are of 8 to 256 pixels, sides may differ. The learning rate does not rise to 1.5 · 10⁻³ and 2 · 10⁻³
at 128 and 256 pixels, the average's decay is that of the last resolution's batches, and Adam's moments are kept at a
doubling, as in `pro_gan`. The batch's spread is of all of it, in the authors' code of groups of four. Where styles
cross is drawn for each image, theirs for a batch. Applied lazily (`penalty_every` above 1, T. Karras et al., 2020,
arXiv:1912.04958, section 3.1), R1 is a turn of its own, weighted by its interval. Calibration measures w̄ anew for the
averaged mapping network.
Expected: the paper has no number on data that is at hand; none measured yet: `make results ROW=stylegan_mnist`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.capabilities import HasStyles
from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, Loss, Turn
from dgm_core.models.adversarial.growing import GrowingConfig, GrowingGAN, recipe_of
from dgm_core.nn.dcgan import SLOPE
from dgm_core.nn.equalised import EqualisedConv2d
from dgm_core.nn.growing import GrowingCritic, Size, Stage, plan, sides_of
from dgm_core.nn.styled import Blur, RunningMean, Synthesis, crossed, layers_at, mapping
from dgm_core.objectives.gan import (
    cross_entropy_discriminator,
    gradient_norm,
    non_saturating_generator,
    r1_penalty,
    verdicts,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PHASE, TOTAL = 600_000, 25_000_000  # images
BATCHES = {4: 512, 8: 256, 16: 128, 32: 64}  # by side; 32 above
RATE = 0.01  # of the mapping network's learning


class Generator(nn.Module):
    """(B, latents) -> (B, C, h, w), as it is trained: styles mixed with probability `mixing`, full noise."""

    def __init__(
        self, latents: int, depth: int, mixing: float, channels: int, widths: Sequence[int], first: int, grid: Size
    ) -> None:
        super().__init__()
        self.mixing = mixing
        self.mapping = mapping(latents, depth, RATE)
        self.average = RunningMean(latents, 0.005)
        self.synthesis = Synthesis(latents, channels, widths, first, grid)

    def forward(self, z: Float[Tensor, " B latents"], stage: Stage) -> Float[Tensor, " B C h w"]:
        w, layers = self.mapping(z), layers_at(stage)
        if self.training:
            self.average.note(w)
        cut, other = torch.full((len(z),), layers, device=z.device), w
        if self.mixing:
            other = self.mapping(torch.randn_like(z))
            somewhere = torch.randint(1, layers, (len(z),), device=z.device)
            mixed = torch.rand(len(z), device=z.device, dtype=z.dtype) < self.mixing
            cut = torch.where(mixed, somewhere, cut)
        return self.synthesis(crossed(w, other, cut, layers), stage, 1.0)


def halving(channels: int, out: int) -> nn.Sequential:
    """3 × 3, then a binomial filter, 3 × 3 and means of 2 × 2."""
    first, second = EqualisedConv2d(channels, channels, 3), EqualisedConv2d(channels, out, 3)
    return nn.Sequential(first, nn.LeakyReLU(SLOPE), Blur(), second, nn.AvgPool2d(2), nn.LeakyReLU(SLOPE))


class StyleGAN(GrowingGAN, HasStyles):
    """The non-saturating game with R1 between a style-based generator and a discriminator that grow; images only."""

    class Config(GrowingConfig):
        mapping: int = Field(default=8, ge=0, description="layers from z to w, each as wide as they are")
        penalty: float = Field(default=10.0, ge=0, description="γ of R1")
        penalty_every: int = Field(default=1, ge=1, description="rounds between plays of R1; 1: in the discriminator's")
        mixing: float = Field(default=0.9, ge=0, le=1, description="share of samples with two styles in training")

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]
    generator: Generator

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        batches = [BATCHES.get(side, 32) for side in sides_of(data)[1:]] or [32]
        fades, sizes, steps = plan(batches, PHASE, TOTAL)
        ema = 0.5 ** (batches[-1] / 10_000)
        return cls.Config(growth=fades), recipe_of("discriminator", _adam(1e-3), ema, sizes, steps)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        fades, _, _ = plan([16] * len(sides_of(data)), 800, 8000)
        config = cls.Config(latents=8, mapping=2, features=16, growth=fades, penalty=1.0, penalty_every=4)
        return config, recipe_of("discriminator", _adam(1e-2), 0.95, ((0.0, 32),), 150)

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        shape = (data.shape[0], self.widths, self.growth.first, self.growth.sizes[0])
        self.generator = Generator(  # pyright: ignore[reportIncompatibleVariableOverride]
            config.latents, config.mapping, config.mixing, *shape
        )
        self.discriminator = GrowingCritic(*shape, halving)

    @property
    def lazy(self) -> bool:
        return self.config.penalty > 0 and self.config.penalty_every > 1

    def moves(self) -> Sequence[Turn]:
        penalty = Turn("penalty", (self.opponent,), every=self.config.penalty_every)
        return [*super().moves(), *([penalty] if self.lazy else [])]

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        move, stage = self.where(turn, clock)
        if move != "penalty":
            return super().loss(batch, turn, clock)
        penalty = self.smoothness(self.shown(batch, stage), stage)
        return Loss(self.config.penalty_every * self.config.penalty * penalty, {"r1": penalty.detach()})

    def opponent_loss(self, real: Float[Tensor, " B C h w"], fake: Float[Tensor, " B C h w"], stage: Stage) -> Loss:
        on_real, on_fake = self.discriminator(real, stage), self.discriminator(fake, stage)
        game, metrics = cross_entropy_discriminator(on_real, on_fake), verdicts(on_real, on_fake)
        if self.lazy or not self.config.penalty:
            return Loss(game, metrics)
        penalty = self.smoothness(real, stage)
        metrics |= {"game": game.detach(), "r1": penalty.detach()}
        return Loss(game + self.config.penalty * penalty, metrics)

    def smoothness(self, real: Float[Tensor, " B C h w"], stage: Stage) -> Float[Tensor, ""]:
        """½ E ‖∇ D(x)‖²."""
        return r1_penalty(gradient_norm(lambda x: self.discriminator(x, stage), real))

    def generator_loss(self, fake: Float[Tensor, " B C h w"], stage: Stage) -> Loss:
        return Loss(non_saturating_generator(self.discriminator(fake, stage)))

    def after(self, turn: str, clock: Clock) -> None:
        super().after(turn, clock)
        self.generator.average.settle()

    @torch.no_grad()
    def calibrate(self, batches: Iterator[Batch], *, passes: int = 16, batch_size: int = 1024) -> None:
        """The mean of w over `passes` batches of latents, for the mapping network that will sample."""
        means = [self.generator.mapping(self.draw_latent(batch_size)).mean(0) for _ in range(passes)]
        self.generator.average.mean.copy_(torch.stack(means).mean(0))

    def truncated(
        self, w: Float[Tensor, " B layers latents"], truncation: float, cutoff: int | None = None
    ) -> Float[Tensor, " B layers latents"]:
        """w̄ + ψ (w − w̄), ψ the `truncation`; in the first `cutoff` layers, or in all."""
        mean = self.generator.average.mean
        near = torch.lerp(mean.expand_as(w), w.to(mean.dtype), truncation)
        return near if cutoff is None else torch.cat([near[:, :cutoff], w[:, cutoff:]], 1)

    def draw(self, w: Float[Tensor, " B layers latents"], noise: float) -> Float[Tensor, " B *shape"]:
        """Images in network units of a style for each layer."""
        return self.growth.enlarged(self.generator.synthesis(w, self.stage, noise).to(self._dtype), self.stage)

    def generate(self, z: Float[Tensor, " B latents"], y: Int[Tensor, " B"] | None) -> Float[Tensor, " B *shape"]:
        """Without noise, at its mean: an image is then a function of z."""
        return self.mixed(z, z, 0)

    def mixed(
        self, coarse: Float[Tensor, " B latents"], fine: Float[Tensor, " B latents"], cut: int
    ) -> Float[Tensor, " B *shape"]:
        """In network units: layers below `cut` in the style of one latent, the others of another (figure 3)."""
        a, b = self.generator.mapping(coarse), self.generator.mapping(fine)
        return self.draw(crossed(a, b, cut, layers_at(self.stage)), 0.0)

    @property
    def style_layers(self) -> int:
        return layers_at(self.stage)

    def decode_mixed(
        self, coarse: Float[Tensor, " B latents"], fine: Float[Tensor, " B latents"], cut: int
    ) -> Float[Tensor, " B *shape"]:
        return self.to_units(self.mixed(coarse, fine, cut))

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        context: Mapping[str, Tensor] = {},
        *,
        truncation: float = 1.0,
        cutoff: int | None = None,
        noise: float = 1.0,
    ) -> Tensor:
        if noise < 0:
            raise DataMismatch(f"noise {noise} is not accepted: its strength is 0 (none) or more, 1 as trained")
        w = self.generator.mapping(self.draw_latent(n))
        styles = crossed(w, w, 0, layers_at(self.stage))
        return self.to_stored(self.draw(self.truncated(styles, truncation, cutoff), noise))


def _adam(lr: float) -> Optimizer:
    return Optimizer(lr=lr, betas=(0.0, 0.99))
