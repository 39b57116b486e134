"""Auto-Encoding Variational Bayes. D. P. Kingma, M. Welling, 2014. arXiv:1312.6114.

p(z) = N(0, I), p(x | z) and q(z | x) = N(μ(x), diag σ²(x)) by neural networks. The estimator (eq. 10), minus which is
the loss in nats an example:

    L(x) = ½ Σ_j (1 + log σ_j² − μ_j² − σ_j²) + (1/S) Σ_s log p(x | z_s),   z_s = μ + σ ⊙ ε_s,  ε_s ~ N(0, I).

`objective: iwae` is the importance-weighted bound of Burda et al. 2016 instead (eq. 8; arXiv:1509.00519). p(x | z) is
Bernoulli for two levels (appendix C.1), Gaussian with a learned variance for real values (C.2), discretised logistic or
categorical for more levels, so that the bound is one of the stored data's log-probability.

Departures: two hidden layers of ReLU, started as Glorot's, where the paper has one of tanh started from N(0, 0.01), and
    Adam where it has Adagrad: both for speed (Burda et al. use the same). The paper's weight decay (a prior on the
    weights) is left out. `kl_warmup` and `free_bits` are later additions and off at first.
Expected: −ELBO ≤ 105 nats a test example on dynamically binarised MNIST after 10 epochs:
    `make results ROW=vae_mnist`. The paper has curves only, near 100 after 10⁸ examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn import functional as F

from dgm_core.capabilities import HasDecoder, HasLikelihood, HasPosterior
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss
from dgm_core.distributions.bernoulli import Bernoulli
from dgm_core.distributions.categorical import Categorical
from dgm_core.distributions.discretised_logistic import DiscretisedLogistic
from dgm_core.distributions.gaussian import Gaussian, kl_to_standard_normal, log_normal
from dgm_core.distributions.observation import Observation, promote, to_network
from dgm_core.nn.encoders import Activation, ConvDecoder, ConvEncoder, dense
from dgm_core.objectives.elbo import elbo, free_bits, kl_weight
from dgm_core.objectives.iwae import iwae

if TYPE_CHECKING:
    from jaxtyping import Float

MEMORY = 2**24  # decoder outputs held at once while bounds are evaluated


class VAE(GenerativeModel, HasLikelihood, HasPosterior, HasDecoder):
    """A Gaussian latent, an amortised Gaussian posterior."""

    class Config(Strict):
        latents: int = Field(default=40, ge=1)
        network: Literal["mlp", "conv"] = "mlp"
        features: int = Field(default=500, ge=1, description="units of a dense layer")
        depth: int = Field(default=2, ge=0, description="dense hidden layers (mlp); 0 is linear")
        channels: tuple[int, ...] = Field(default=(32, 64), description="of the convolutions of stride 2 (conv)")
        activation: Activation = "relu"
        observation: Literal["bernoulli", "discretised_logistic", "categorical", "gaussian"]
        variance: Literal["network", "shared"] = Field(default="network", description="of gaussian observations")
        objective: Literal["elbo", "iwae"] = "elbo"
        importance_samples: int = Field(default=1, ge=1, description="draws of z: averaged (elbo), weighted (iwae)")
        kl_warmup: float = Field(
            default=0.0, ge=0, le=1, description="share of training in which the KL's weight rises to 1"
        )
        free_bits: float = Field(default=0.0, ge=0, description="nats a latent that the KL is not asked to go below")
        conditional: bool = Field(default=False, description="p(x | z, y) and q(z | x, y)")

        @model_validator(mode="after")
        def _objective_has_a_kl(self) -> Self:
            if self.objective == "iwae" and (self.kl_warmup or self.free_bits):
                raise ValueError("kl_warmup and free_bits change the ELBO's KL term, which iwae has not: set them to 0")
            return self

    config: Config
    exact = False

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(algorithm="adam", lr=1e-3)
        recipe = Recipe(batch_size=100, steps=50_000, optimizers={"model": adam})
        return cls.Config(observation=_usual_observation(data)), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(latents=min(8, max(2, data.dims // 4)), features=64, observation=_usual_observation(data))
        adam = Optimizer(algorithm="adam", lr=3e-3)
        return config, Recipe(batch_size=64, steps=400, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        self.observation = _make_observation(config, data)
        classes = data.classes if config.conditional else 0
        if config.conditional and not classes:
            raise DataMismatch("conditional: true needs classes, and the data has none; set conditional: false")
        P = self.observation.params
        if config.network == "conv":
            if data.kind != "image":
                raise DataMismatch(f"network: conv needs images; this is of kind {data.kind!r}. Set network: mlp")
            channels, height, width = data.shape
            self.encoder = ConvEncoder(
                (channels + classes, height, width), config.channels, 2 * config.latents, config.activation
            )
            self.decoder = ConvDecoder(
                config.latents + classes, (channels * P, height, width), config.channels, config.activation
            )
        else:
            hidden = [config.features] * config.depth
            self.encoder = dense([data.dims + classes, *hidden, 2 * config.latents], config.activation)
            self.decoder = dense([config.latents + classes, *hidden, data.dims * P], config.activation)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        mean, log_variance = self._encode(batch.x, batch.y)
        z = self._draw(mean, log_variance, self.config.importance_samples)
        log_likelihood = self._log_likelihood(batch.x, z, batch.y)
        if self.config.objective == "iwae":
            return Loss(-iwae(_log_weights(log_likelihood, z, mean, log_variance)).mean())
        kl = kl_to_standard_normal(mean, log_variance)
        reconstruction = log_likelihood.mean(1)
        weight = kl_weight(clock.progress, self.config.kl_warmup)
        if self.config.free_bits:
            value = weight * free_bits(kl, self.config.free_bits) - reconstruction.mean()
        else:
            value = -elbo(reconstruction, weight * kl).mean()
        metrics = {"reconstruction_nats": -reconstruction.detach().mean(), "kl_nats": kl.detach().sum(1).mean()}
        return Loss(value, metrics)

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """The ELBO (eq. 10, its KL in closed form) at one sample; the importance-weighted bound above. Nats.

        Samples are drawn in chunks, so that memory does not grow with them.
        """
        mean, log_variance = self._encode(x, y)
        if samples == 1:
            z = self._draw(mean, log_variance, 1)
            return elbo(self._log_likelihood(x, z, y).squeeze(1), kl_to_standard_normal(mean, log_variance))
        total = mean.new_full((x.shape[0],), -math.inf)
        for count in self._chunks(samples, x.shape[0]):
            z = self._draw(mean, log_variance, count)
            log_weights = _log_weights(self._log_likelihood(x, z, y), z, mean, log_variance)
            total = torch.logaddexp(total, log_weights.logsumexp(1))
        return total - math.log(samples)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """q(z | x) = N(μ, diag σ²), event of size `latents`."""
        mean, log_variance = self._encode(x, y)
        return Independent(Normal(mean, (0.5 * log_variance).exp()), 1)

    def kl(self, x: Tensor, y: Tensor | None = None) -> Float[Tensor, " B latents"]:
        return kl_to_standard_normal(*self._encode(x, y))

    def draw_latent(self, n: int) -> Float[Tensor, " n latents"]:
        return torch.randn(n, self.config.latents, device=self.device, dtype=self._dtype)

    def decode(
        self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        return self.observation.mean(self._theta(z, y))

    def sample(
        self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, temperature: float = 1.0
    ) -> Float[Tensor, " n *shape"]:
        """x ~ p(x | z) with z ~ N(0, temperature² I). An unconditional model has no use for y."""
        y = self.labels_for(n, y) if self.config.conditional else None
        return self.observation.sample(self._theta(temperature * self.draw_latent(n), y))

    def _encode(self, x: Tensor, y: Tensor | None) -> tuple[Float[Tensor, " B latents"], Float[Tensor, " B latents"]]:
        """μ and log σ² of q(z | x)."""
        h = to_network(x, self.data, self._dtype)
        if self.config.network == "conv":
            if (one_hot := self._one_hot(y)) is not None:
                h = torch.cat([h, one_hot[:, :, None, None].expand(-1, -1, *h.shape[2:])], 1)
        else:
            h = self._beside_label(h.flatten(1), y)
        mean, log_variance = promote(self.encoder(h)).chunk(2, 1)
        return mean, log_variance

    def _draw(self, mean: Tensor, log_variance: Tensor, count: int) -> Float[Tensor, " B count latents"]:
        noise = torch.randn(mean.shape[0], count, mean.shape[1], device=mean.device, dtype=mean.dtype)
        return mean[:, None] + (0.5 * log_variance).exp()[:, None] * noise

    def _log_likelihood(
        self, x: Tensor, z: Float[Tensor, " B count latents"], y: Tensor | None
    ) -> Float[Tensor, " B count"]:
        B, count = z.shape[:2]
        repeated = None if y is None else y.repeat_interleave(count)
        theta = self._theta(z.flatten(0, 1), repeated).unflatten(0, (B, count))
        return self.observation.log_prob(x[:, None], theta).flatten(2).sum(2)

    def _theta(self, z: Float[Tensor, " B latents"], y: Tensor | None) -> Float[Tensor, " B *shape params"]:
        """The decoder's output: what each coordinate's distribution is made of."""
        theta = self.decoder(self._beside_label(z.to(self._dtype), y))
        P = self.observation.params
        if self.config.network == "conv":
            return theta.unflatten(1, (-1, P)).movedim(2, -1)
        return theta.unflatten(1, (*self.data.shape, P))

    def _beside_label(self, h: Float[Tensor, " B n"], y: Tensor | None) -> Float[Tensor, " B m"]:
        one_hot = self._one_hot(y)
        return h if one_hot is None else torch.cat([h, one_hot], 1)

    def _one_hot(self, y: Tensor | None) -> Float[Tensor, " B classes"] | None:
        if not self.config.conditional:
            return None
        if y is None:
            raise DataMismatch("the model is class-conditional: give y, one label an example")
        return F.one_hot(y.long(), self.data.classes).to(self._dtype)

    def _chunks(self, samples: int, rows: int) -> Iterator[int]:
        largest = max(1, MEMORY // (rows * self.data.dims * self.observation.params))
        for start in range(0, samples, largest):
            yield min(largest, samples - start)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def _log_weights(
    log_likelihood: Float[Tensor, " B count"], z: Float[Tensor, " B count latents"], mean: Tensor, log_variance: Tensor
) -> Float[Tensor, " B count"]:
    """log p(x, z) − log q(z | x)."""
    log_prior = log_normal(z, 0.0, 0.0)
    log_posterior = log_normal(z, mean[:, None], log_variance[:, None])
    return log_likelihood + (log_prior - log_posterior).sum(2)


def _usual_observation(data: DataSpec) -> Literal["bernoulli", "discretised_logistic", "gaussian"]:
    if data.levels is None:
        return "gaussian"
    return "bernoulli" if data.levels == 2 else "discretised_logistic"


def _make_observation(config: VAE.Config, data: DataSpec) -> Observation:
    if data.kind == "codes":
        raise DataMismatch(
            "vae models images, audio and vectors; codes are names without order: use an autoregressive prior"
        )
    accepted = {None: ["gaussian"], 2: ["bernoulli", "categorical", "discretised_logistic"]}.get(
        data.levels, ["discretised_logistic", "categorical"]
    )
    if config.observation not in accepted:
        raise DataMismatch(
            f"observation: {config.observation} does not fit data of levels {data.levels}; accepted: "
            f"{', '.join(accepted)}"
        )
    if data.levels is None:
        return Gaussian(config.variance)
    makers = {"categorical": Categorical, "discretised_logistic": DiscretisedLogistic}
    return Bernoulli() if config.observation == "bernoulli" else makers[config.observation](data.levels)
