"""Autoencoding beyond pixels using a learned similarity metric. A. B. L. Larsen, S. K. Sønderby, H. Larochelle, O.
Winther, 2016. arXiv:1512.09300.

A VAE whose reconstructions are compared in the features f of a GAN's discriminator, its l-th layer, where x is taken to
be Gaussian about x̃ = Dec(z), z ~ q(z | x) (eqs. 6, 7); x_p = Dec(z_p), z_p ~ N(0, I). Three players (algorithm 1):

    L_prior = KL(q(z | x) ‖ p(z)),   L_like = ½ ‖f(x) − f(x̃)‖² + const,
    L_GAN = log D(x) + log(1 − D(x_p)) + log(1 − D(x̃))                      (eq. 10)

    the encoder descends L_prior + L_like, the decoder γ L_like + L_GAN, the discriminator −L_GAN.

No error is fed further than that: not L_GAN's to the encoder, nor L_like's to the discriminator (section 2.4). Neither
side may win: as in the authors' code the discriminator waits while −log D(x) or −log(1 − D(fake)), means over a batch,
is below 0.68 − 0.35, the decoder while one of them is above 0.68 + 0.35, and neither if both would; a D that knows
nothing has ln 2 = 0.69. Networks: the authors' for 64 × 64 pixels and, up to 32 × 32, for CIFAR-10: 5 × 5 convolutions
of stride 2 and their transposes, batch normalisation, ReLU; f is the third or the second strided convolution, in front
of its norm. RMSProp, 0.0003, on batches of 64.

Departures: the players move one after another on batches of their own, the authors' at once on one. D's two errors
    weigh alike, so that an even match is at ½, within the rule's reach; eq. 10 would have it at ⅓, the code weighs data
    by 0.66 for CelebA and CIFAR-10. No weight decay (theirs: 10⁻⁵). Any size of image: sides are halved with rounding
    up. Real-valued images have no tanh at the end. 37,500 rounds are the 150 epochs of 250 batches of their code.
Expected: samples nearer to MNIST (Fréchet distance) than those of a VAE of equal size; not run yet: `make results
    ROW=vae_gan_mnist`. The paper has no number on data that is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from dgm_core import distributed
from dgm_core.capabilities import HasCritic, HasDecoder, HasPosterior
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss, Turn
from dgm_core.distributions.flow_posterior import FlowPosterior
from dgm_core.distributions.gaussian import kl_to_standard_normal
from dgm_core.distributions.observation import from_network, to_network, to_stored
from dgm_core.nn.norm import settle, standing_statistics
from dgm_core.nn.vae_gan_nets import Discriminator, decoder, encoder, start_uniform
from dgm_core.objectives.gan import (
    cross_entropy_discriminator,
    minimax_generator,
    non_saturating_generator,
    verdicts,
)
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

PLAYERS = ("encoder", "decoder", "discriminator")


def unlike(f: Float[Tensor, " B c h w"], other: Float[Tensor, " B c h w"]) -> Float[Tensor, ""]:
    """L_like but for its constant, nats an example; `f` is a target."""
    return 0.5 * (promote(f.detach()) - promote(other)).square().flatten(1).sum(1).mean()


@torch.no_grad()
def who_moves(
    real: Float[Tensor, " B"], fake: Float[Tensor, " N"], equilibrium: float, margin: float
) -> dict[str, Tensor]:
    """Player -> 0/1, by D's errors on all ranks' examples: whoever is too far ahead waits for the other."""
    errors = F.softplus(promote(-real)), F.softplus(promote(fake))
    sums = torch.stack([s for e in errors for s in (e.sum(), e.new_tensor(float(e.numel())))])
    sums = distributed.all_reduce(sums)
    means = sums[0::2] / sums[1::2]
    ahead = (means < equilibrium - margin).any()
    behind = (means > equilibrium + margin).any()
    return {"decoder": promote(~behind | ahead), "discriminator": promote(~ahead | behind)}


class VAEGAN(GenerativeModel, HasPosterior, HasDecoder, HasCritic):
    """An autoencoder that compares in features which a discriminator learns."""

    class Config(Strict):
        latents: int = Field(default=128, ge=1)
        encoder_channels: tuple[int, ...] = Field(default=(64, 128, 256), min_length=1)
        encoder_hidden: int = Field(default=1024, ge=1, description="units of the encoder's dense layer")
        decoder_channels: tuple[int, ...] = Field(default=(256, 128, 32), min_length=1)
        discriminator_channels: tuple[int, ...] = Field(
            default=(32, 128, 256, 256), min_length=2, description="the first of stride 1"
        )
        discriminator_hidden: int = Field(default=512, ge=1)
        layer: int = Field(default=3, ge=1, description="l: which strided convolution images are compared behind")
        gamma: float = Field(default=1e-5, ge=0, description="γ, weight of L_like for the decoder")
        objective: Literal["minimax", "non_saturating"] = Field(
            default="minimax", description="the decoder's side of L_GAN: log(1 − D), or −log D"
        )
        equilibrium: float = Field(default=0.68, gt=0, description="D's errors, nats, at an even match")
        margin: float | None = Field(default=0.35, gt=0, description="either way, before a player waits; None: never")

        @model_validator(mode="after")
        def _the_layer_is_there(self) -> Self:
            if self.layer >= len(self.discriminator_channels):
                strided = len(self.discriminator_channels) - 1
                raise ValueError(f"layer {self.layer} is not accepted: the discriminator has {strided} strided ones")
            return self

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        rms = Optimizer(algorithm="rmsprop", lr=3e-4, alpha=0.9)
        recipe = Recipe(batch_size=64, steps=37_500, optimizers=dict.fromkeys(PLAYERS, rms))
        if max(data.shape[1:], default=0) > 32:
            return cls.Config(), recipe
        wide, deep = (192, 128, 32), (32, 128, 192, 256)
        return cls.Config(decoder_channels=wide, discriminator_channels=deep, layer=2, gamma=5e-6), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(
            latents=4,
            encoder_channels=(8, 16),
            encoder_hidden=32,
            decoder_channels=(16, 8),
            discriminator_channels=(8, 16, 128),
            discriminator_hidden=32,
            layer=2,
            gamma=1.0,
            objective="non_saturating",
        )
        adam = Optimizer(lr=2e-3, betas=(0.5, 0.999), schedule="linear")
        slower = adam.merged({"lr": 5e-4})
        players = {"encoder": adam, "decoder": adam, "discriminator": slower}
        return config, Recipe(batch_size=32, steps=100, optimizers=players)

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        if data.kind != "image":
            raise DataMismatch(
                f"this model makes images, with convolutions; the data is of kind {data.kind!r}. Use vae for vectors "
                "and audio."
            )
        c, shape = config, data.shape
        self.encoder = encoder(shape, c.encoder_channels, c.encoder_hidden, 2 * c.latents)
        self.decoder = decoder(c.latents, shape, c.decoder_channels, bounded=data.levels is not None)
        self.discriminator = Discriminator(shape, c.discriminator_channels, c.discriminator_hidden, c.layer)
        start_uniform(self)

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {name: list(self.get_submodule(name).parameters()) for name in PLAYERS}

    def turns(self) -> Sequence[Turn]:
        return [Turn(name, (name,)) for name in PLAYERS]

    def infer(self, x: Tensor) -> FlowPosterior:
        """q(z | x) = N(μ, diag σ²)."""
        mean, log_variance = promote(self.encoder(to_network(x, self.data, self._dtype))).chunk(2, 1)
        return FlowPosterior(mean, log_variance)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        if turn == "encoder":
            return self._encoder_loss(batch.x)
        # Whoever does not move needs no graph; the trainer has frozen its parameters, but not what it sees.
        with torch.set_grad_enabled(turn == "decoder" and torch.is_grad_enabled()):
            made = self._make(batch.x)
        B = batch.x.shape[0]
        scores, f = self.discriminator(torch.cat([to_network(batch.x, self.data, self._dtype), made]))
        real, fake = scores[:B], scores[B:]
        c, metrics = self.config, verdicts(real, fake)
        gates = {} if c.margin is None else who_moves(real, fake, c.equilibrium, c.margin)
        gate = {player: moves for player, moves in gates.items() if player == turn}
        if gate:
            metrics["moves"] = gate[turn]
        if turn == "discriminator":
            return Loss(cross_entropy_discriminator(real, fake), metrics, gate)
        similarity = unlike(f[:B], f[B : 2 * B])
        game = minimax_generator if c.objective == "minimax" else non_saturating_generator
        metrics["unlike_nats"] = similarity.detach()
        return Loss(c.gamma * similarity + 2 * game(fake), metrics, gate)  # two fakes an example

    def _encoder_loss(self, x: Tensor) -> Loss:
        q = self.infer(x)
        draws = q.draw(1)
        both = torch.cat([to_network(x, self.data, self._dtype), self._render(draws.z.squeeze(1))])
        similarity = unlike(*self.discriminator.features(both).chunk(2))
        kl = q.kl(draws).sum(1).mean()
        return Loss(kl + similarity, {"kl_nats": kl.detach(), "unlike_nats": similarity.detach()})

    def _make(self, x: Tensor) -> Float[Tensor, " 2*B C H W"]:
        """Reconstructions and then as many samples, in network units; no graph to the encoder."""
        with torch.no_grad():
            z = self.infer(x).draw(1).z.squeeze(1)
        return self._render(torch.cat([z, self.draw_latent(x.shape[0])]))

    def after(self, turn: str, clock: Clock) -> None:
        settle(self)

    def calibrate(self, batches: Iterator[Batch], *, passes: int = 16) -> None:
        """Average the encoder's and the decoder's batch statistics afresh, over as many batches of data."""
        kept = list(islice(batches, passes))
        waiting = iter(kept)
        standing_statistics(nn.ModuleList([self.encoder, self.decoder]), lambda: self._make(next(waiting).x), len(kept))

    def posterior(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Distribution:
        """q(z | x), event of size `latents`."""
        q = self.infer(x)
        return q.gaussian() or q

    def kl(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Float[Tensor, " B latents"]:
        """KL(q(z | x) ‖ p(z)) a latent, in closed form."""
        q = self.infer(x)
        return kl_to_standard_normal(q.start_mean, q.log_variance)

    def draw_latent(self, n: int) -> Float[Tensor, " n latents"]:
        return torch.randn(n, self.config.latents, device=self.device, dtype=self._dtype)

    def decode(
        self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B C H W"]:
        return from_network(self._render(z), self.data)

    def sample(
        self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, temperature: float = 1.0
    ) -> Tensor:
        """Dec(z) with z ~ N(0, temperature² I); classes are not told apart."""
        return to_stored(self.decode(temperature * self.draw_latent(n)), self.data)

    @property
    def threshold(self) -> float | None:
        return 0.0

    def data_scores(self, x: Tensor, y: Tensor | None = None) -> Float[Tensor, " B"]:
        return self.discriminator(to_network(x, self.data, self._dtype))[0]

    def sample_scores(self, n: int) -> Float[Tensor, " n"]:
        return self.discriminator(self._render(self.draw_latent(n)))[0]

    def _render(self, z: Float[Tensor, " B latents"]) -> Float[Tensor, " B C H W"]:
        return self.decoder(z.to(self._dtype)).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
