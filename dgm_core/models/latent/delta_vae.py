"""Preventing Posterior Collapse with δ-VAEs. A. Razavi, A. van den Oord, B. Poole, O. Vinyals, 2019. arXiv:1901.03416.

A VAE whose decoder is as strong as one likes and whose latents are used all the same: the posterior's family keeps a
distance to the prior, min KL(q(z | x) ‖ p(z)) = δ, the committed rate, and the loss is the plain bound,

    −E_q log p(x | z) + KL(q(z | x) ‖ p(z)),    p(x | z) = Π_i p(x_i | x_<i, z) by a gated PixelCNN.

`prior: ar1` (section 2.1): a sequence of latents z_1 … z_n with a slow prior and independent Gaussians for a posterior,
`distributions.ar1`. Each z_t stands for `rows` rows of the image; its encoder is anti-causal (section 2.2): it sees
these rows and what follows them, since the decoder knows what came before. `prior: independent`: N(0, I), and a
posterior N(μ(x), σ² I) of a fixed σ < 1 whose KL at μ = 0 is δ (section 2). δ is `rate`, in equal shares, or what
`alphas` amount to. With α = 0 (`rate: 0`) it is a plain VAE, free to collapse.

In the last `auxiliary_share` of training all this stands still, and the auxiliary prior is fitted to the posteriors'
draws: p(z_t | z_<t) with the AR(1) prior's moments and what a causal network adds to them, nothing at first. `sample`
and `log_prob` go by it, `kl` and the loss by the prior that δ was committed against. An autoregressive decoder has no
mean, so `decode` draws.

Departures: the paper's decoder is a small PixelSNAIL with attention, and its auxiliary prior recurrent: here a gated
    PixelCNN and dilated convolutions. Images become sequences by their rows, and sizes, δ and the optimiser are chosen
    here: the paper's are for hardware of another kind. The encoder's log-variances start at the nearest posterior's.
Expected: the rate never below δ, to which the nearest posterior comes:
    `python -m pytest tests/families/latent/test_delta_vae.py`. Nats beside the decoder's alone on binarised MNIST:
    `make results ROW=delta_vae_mnist`, not measured yet; 2.83 bits/dim on CIFAR-10 in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from dgm_core.capabilities import HasDecoder, HasLikelihood, HasPosterior
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss, Turn
from dgm_core.distributions.ar1 import AR1, alpha_for, committed_rate, variance_for
from dgm_core.distributions.gaussian import log_normal
from dgm_core.distributions.observation import to_network
from dgm_core.nn.causal import OddKernel
from dgm_core.nn.encoders import ConvDecoder, ConvEncoder
from dgm_core.nn.gated_pixel_cnn import GatedPixelCNNNetwork, GatedPixelCNNSizes
from dgm_core.nn.incremental import draw_grid
from dgm_core.nn.latent_sequences import AntiCausal, Auxiliary, Rows
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LEVELS = 256
MEMORY = 2**24  # logits held at once while bounds are evaluated


class DeltaVAE(GenerativeModel, HasLikelihood, HasPosterior, HasDecoder):
    """An autoregressive decoder that cannot ignore its latents."""

    class Config(Strict):
        prior: Literal["ar1", "independent"] = "ar1"
        rate: float = Field(default=10.0, ge=0, description="δ, nats an example, in equal shares")
        alphas: tuple[float, ...] = Field(default=(), description="α of each dimension (ar1), in place of `rate`")
        latents: int = Field(default=8, ge=1, description="dimensions: of each z_t (ar1), or of z (independent)")
        rows: int = Field(default=4, ge=1, description="rows of the image that each z_t stands for (ar1)")
        features: int = Field(default=64, ge=1, description="channels of the anti-causal encoder (ar1)")
        depth: int = Field(default=4, ge=0, description="its residual blocks")
        kernel: OddKernel = Field(default=5, description="n of its n×n convolutions, of which half is seen")
        channels: tuple[int, ...] = Field(default=(32, 64), description="of convolutions of stride 2 (independent)")
        condition: int = Field(default=32, ge=1, description="features that the decoder hears of the latents")
        decoder: GatedPixelCNNSizes = Field(default_factory=GatedPixelCNNSizes)
        auxiliary: int = Field(default=64, ge=1, description="features of the auxiliary prior")
        auxiliary_share: float = Field(default=0.1, gt=0, lt=1, description="of training, at its end")

        @model_validator(mode="after")
        def _alphas_are_one_a_dimension(self) -> Self:
            if self.alphas and (self.prior != "ar1" or len(self.alphas) != self.latents):
                raise ValueError(f"alphas: one for each of the {self.latents} latents, with prior ar1")
            if any(not 0 <= a < 1 for a in self.alphas):
                raise ValueError("alphas lie in [0, 1): 0 is independent noise, 1 would never move")
            return self

    config: Config
    exact = False

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(rows=_rows(data, 4), decoder=GatedPixelCNNSizes(channels=128, depth=12, head=256))
        adam = Optimizer(lr=5e-4, ema=0.9999)
        return config, Recipe(batch_size=64, steps=200_000, optimizers={"model": adam, "auxiliary": Optimizer(lr=1e-3)})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(
            rate=1.0,
            latents=2,
            rows=_rows(data, 2),
            features=8,
            depth=1,
            kernel=3,
            condition=8,
            decoder=GatedPixelCNNSizes(channels=24, depth=4, kernel=3, first_kernel=5, head=48),
            auxiliary=8,
        )
        adam = Optimizer(lr=3e-3)
        return config, Recipe(batch_size=32, steps=150, optimizers={"model": adam, "auxiliary": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        if data.kind != "image" or data.levels is None or data.levels > LEVELS:
            raise DataMismatch(
                f"DeltaVAE models images of 2 to {LEVELS} levels; this is of kind {data.kind!r}, shape {data.shape}, "
                f"levels {data.levels}"
            )
        d = config.latents
        if config.prior == "ar1":
            n, rest = divmod(data.shape[1], config.rows)
            if rest or n < 2:
                raise DataMismatch(
                    f"images of {data.shape[1]} rows do not make a sequence of blocks of {config.rows}; choose `rows` "
                    "that divides the height, twice or more often"
                )
            alphas = config.alphas or (alpha_for(config.rate / d, n),) * d
            self.rate = sum(committed_rate(a, n) for a in alphas)
            self.shape = (n, d)
            sizes = {"features": config.features, "depth": config.depth, "kernel": config.kernel}
            self.encoder: nn.Module = AntiCausal(data.shape, config.rows, 2 * d, **sizes)
            self.condition: nn.Module = Rows(data.shape, config.rows, d, config.features, config.condition)
        else:
            alphas, self.rate, self.shape = (0.0,), config.rate, (d, 1)
            self.fixed = math.log(variance_for(config.rate / d))
            channels, height, width = data.shape
            self.encoder = ConvEncoder((channels, height, width), config.channels, d)
            self.condition = ConvDecoder(d, (config.condition, height, width), config.channels)
        self.prior = AR1(alphas)
        self.auxiliary = Auxiliary(*self.shape, config.auxiliary)
        self.decoder = GatedPixelCNNNetwork(config.decoder, data, config.condition)

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        model = [p for part in (self.encoder, self.condition, self.decoder) for p in part.parameters()]
        return {"model": model, "auxiliary": list(self.auxiliary.parameters())}

    def turns(self) -> Sequence[Turn]:
        end = 1.0 - self.config.auxiliary_share
        return [Turn("model", ("model",), window=(0.0, end)), Turn("auxiliary", ("auxiliary",), window=(end, 1.0))]

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        if turn == "auxiliary":
            with torch.no_grad():
                z = self._draw(*self.infer(batch.x), 1)[:, 0]
            return Loss(-self.log_prior(z).mean())
        mean, log_variance = self.infer(batch.x)
        log_likelihood = self._log_likelihood(batch.x, self._draw(mean, log_variance, 1)).squeeze(1)
        kl = self.prior.kl(mean, log_variance).flatten(1).sum(1)
        metrics = {"reconstruction_nats": -log_likelihood.detach().mean(), "kl_nats": kl.detach().mean()}
        return Loss((kl - log_likelihood).mean(), metrics)

    def infer(self, x: Tensor) -> tuple[Float[Tensor, " B n d"], Float[Tensor, " B n d"]]:
        """Mean and log-variance of q(z_t | x), all independent."""
        h = promote(self.encoder(to_network(x, self.data, self._dtype)))
        if self.config.prior == "independent":
            mean = h[:, :, None]
            return mean, torch.full_like(mean, self.fixed)
        mean, log_variance = h.chunk(2, 2)
        return mean, log_variance + self.prior.nearest(self.shape[0])

    def log_prior(self, z: Float[Tensor, " B n d"], *, auxiliary: bool = True) -> Float[Tensor, " B"]:
        """Nats under the auxiliary prior, or under the one that δ was committed against."""
        mean, log_variance = self.prior.moments(z)
        if auxiliary:
            shift, log_scale = self.auxiliary(z.to(self._dtype))
            mean, log_variance = mean + shift, log_variance + log_scale
        return log_normal(z, mean, log_variance).flatten(1).sum(1)

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """The ELBO at one sample, the importance-weighted bound above, with the auxiliary prior. Nats."""
        mean, log_variance = self.infer(x)
        if samples == 1:  # the KL in closed form, but for what the auxiliary prior differs by
            z = self._draw(mean, log_variance, 1)
            gain = self.log_prior(z[:, 0]) - self.log_prior(z[:, 0], auxiliary=False)
            return self._log_likelihood(x, z)[:, 0] + gain - self.prior.kl(mean, log_variance).flatten(1).sum(1)
        total = mean.new_full((x.shape[0],), -math.inf)
        for count in self._chunks(samples, x.shape[0]):
            z = self._draw(mean, log_variance, count)
            log_q = log_normal(z, mean[:, None], log_variance[:, None]).flatten(2).sum(2)
            log_p = self._log_likelihood(x, z) + self.log_prior(z.flatten(0, 1)).unflatten(0, z.shape[:2])
            total = torch.logaddexp(total, (log_p - log_q).logsumexp(1))
        return total - math.log(samples)

    def posterior(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Distribution:
        """q(z | x), the latents of all z_t in one event."""
        mean, log_variance = self.infer(x)
        return Independent(Normal(mean.flatten(1), (0.5 * log_variance).exp().flatten(1)), 1)

    def kl(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Float[Tensor, " B latents"]:
        """From the prior that δ was committed against: its sum is never below `rate`."""
        return self.prior.kl(*self.infer(x)).flatten(1)

    def draw_latent(self, n: int) -> Float[Tensor, " n latents"]:
        """From the auxiliary prior, one z_t after another."""
        noise = torch.randn(n, *self.shape, device=self.device, dtype=self._dtype)
        z = torch.zeros_like(noise)
        with torch.no_grad():
            for t in range(self.shape[0]):
                mean, log_variance = self.prior.moments(z)
                shift, log_scale = self.auxiliary(z)
                drawn = mean + shift + (0.5 * (log_variance + log_scale)).exp() * noise
                z[:, t] = drawn[:, t]
        return z.flatten(1)

    def decode(
        self,
        z: Tensor,
        y: Tensor | None = None,
        context: Mapping[str, Tensor] = {},
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Float[Tensor, " B C H W"]:
        """A draw of p(x | z), float, in data units."""
        condition = self._condition(z.unflatten(1, self.shape))
        x = draw_grid(self.decoder, self.data.shape, condition, temperature=temperature, top_p=top_p)
        return x.to(promote(z).dtype)

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        context: Mapping[str, Tensor] = {},
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Int[Tensor, " n C H W"]:
        """z from the auxiliary prior, x pixel by pixel: `temperature` and `top_p` are those of pixels."""
        return self.decode(self.draw_latent(n), temperature=temperature, top_p=top_p).to(self.data.dtype)

    def _draw(
        self, mean: Float[Tensor, " B n d"], log_variance: Float[Tensor, " B n d"], count: int
    ) -> Float[Tensor, " B count n d"]:
        noise = torch.randn(mean.shape[0], count, *self.shape, device=mean.device, dtype=mean.dtype)
        return mean[:, None] + (0.5 * log_variance).exp()[:, None] * noise

    def _condition(self, z: Float[Tensor, " B n d"]) -> Float[Tensor, " B features H W"]:
        z = z.to(self._dtype)
        return self.condition(z.flatten(1) if self.config.prior == "independent" else z)

    def _log_likelihood(
        self, x: Int[Tensor, " B C H W"], z: Float[Tensor, " B count n d"]
    ) -> Float[Tensor, " B count"]:
        count = z.shape[1]
        grid = x.to(self.device).long().repeat_interleave(count, 0)
        logits = promote(self.decoder(grid, self._condition(z.flatten(0, 1))))
        nats = F.cross_entropy(logits.movedim(-1, 1), grid, reduction="none").flatten(1).sum(1)
        return -nats.unflatten(0, (-1, count))

    def _chunks(self, samples: int, rows: int) -> Iterator[int]:
        largest = max(1, MEMORY // (rows * self.data.dims * (self.data.levels or 1)))
        for start in range(0, samples, largest):
            yield min(largest, samples - start)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def _rows(data: DataSpec, most: int) -> int:
    """At most so many, halved until the height is a multiple of it, and not all of it."""
    height = data.shape[-2] if len(data.shape) > 1 else 1
    while most > 1 and (height % most or height == most):
        most //= 2
    return most
