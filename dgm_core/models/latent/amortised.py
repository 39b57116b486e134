"""Continuous latents with an amortised posterior: what such models share is all but q(z | x) and the loss.

p(z) = N(0, I), p(x | z) by a decoder, one of `distributions.observation` a coordinate, so that bounds are of the stored
data's log-probability. A concrete model says what its encoder's outputs mean: `infer`. By one draw of it

    log p(x) ≥ E_q log p(x | z) − KL(q(z | x) ‖ p(z))

and by K of them log (1/K) Σ_k p(x, z_k) / q(z_k | x) (Burda et al. 2016, eq. 8; arXiv:1509.00519).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from dgm_core.capabilities import HasDecoder, HasLikelihood, HasPosterior, HasReceptiveFields
from dgm_core.config import Strict
from dgm_core.contract import DataMismatch, DataSpec, GenerativeModel
from dgm_core.distributions.bernoulli import Bernoulli
from dgm_core.distributions.categorical import Categorical
from dgm_core.distributions.discretised_logistic import DiscretisedLogistic
from dgm_core.distributions.flow_posterior import Draws, FlowPosterior
from dgm_core.distributions.gaussian import Gaussian, kl_to_standard_normal, log_normal
from dgm_core.distributions.observation import Observation, to_network
from dgm_core.nn.encoders import Activation, ConvDecoder, ConvEncoder, dense
from dgm_core.objectives.elbo import elbo
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

MEMORY = 2**24  # decoder outputs, or numbers that steer a posterior, held at once while bounds are evaluated
KL_DRAWS = 16  # that a divergence without a closed form is averaged over


class AmortisedConfig(Strict):
    """What every such model lets one choose of the latent, the networks and the data's distribution."""

    latents: int = Field(default=40, ge=1)
    network: Literal["mlp", "conv"] = "mlp"
    features: int = Field(default=500, ge=1, description="units of a dense layer")
    channels: tuple[int, ...] = Field(default=(32, 64), description="of the convolutions of stride 2 (conv)")
    activation: Activation = "relu"
    observation: Literal["bernoulli", "discretised_logistic", "categorical", "gaussian"]
    variance: Literal["network", "shared"] = Field(default="network", description="of gaussian observations")
    conditional: bool = Field(default=False, description="p(x | z, y) and q(z | x, y)")


class AmortisedModel(GenerativeModel, HasLikelihood, HasPosterior, HasDecoder, HasReceptiveFields):
    """Abstract: a concrete model fills in `infer` and `loss`.

    Args:
        layers: dense hidden layers of encoder and decoder (mlp); 0 is linear.
        outputs: of the encoder.
    """

    config: AmortisedConfig
    exact = False

    def __init__(self, config: AmortisedConfig, data: DataSpec, *, layers: int, outputs: int) -> None:
        super().__init__(config, data)
        self.observation = self._make_observation()
        classes = data.classes if config.conditional else 0
        if config.conditional and not classes:
            raise DataMismatch("conditional: true needs classes, and the data has none; set conditional: false")
        P = self.observation.params
        if config.network == "conv":
            if data.kind != "image":
                raise DataMismatch(f"network: conv needs images; this is of kind {data.kind!r}. Set network: mlp")
            channels, height, width = data.shape
            self.encoder = ConvEncoder((channels + classes, height, width), config.channels, outputs, config.activation)
            self.decoder = ConvDecoder(
                config.latents + classes, (channels * P, height, width), config.channels, config.activation
            )
        else:
            hidden = [config.features] * layers
            self.encoder = dense([data.dims + classes, *hidden, outputs], config.activation)
            self.decoder = dense([config.latents + classes, *hidden, data.dims * P], config.activation)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    @abstractmethod
    def infer(self, x: Tensor, y: Tensor | None = None) -> FlowPosterior:
        """q(z | x)."""

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """The ELBO at one sample, its KL in closed form if it has one; the importance-weighted bound above. Nats.

        Samples are drawn in chunks, so that memory does not grow with them.
        """
        q = self.infer(x, y)
        if samples == 1 and q.maps is None:
            draws = q.draw(1)
            return elbo(self._log_likelihood(x, draws.z, y).squeeze(1), q.kl(draws))
        total = q.start_mean.new_full((x.shape[0],), -math.inf)
        for count in self._chunks(samples, x.shape[0], q):
            draws = q.draw(count)
            weights = log_weights(self._log_likelihood(x, draws.z, y), q, draws)
            total = torch.logaddexp(total, weights.logsumexp(1))
        return total - math.log(samples)

    def posterior(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Distribution:
        """q(z | x), event of size `latents`."""
        q = self.infer(x, y)
        return q.gaussian() or q

    def kl(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Float[Tensor, " B latents"]:
        """KL(q(z | x) ‖ p(z)) a latent: in closed form of a Gaussian, else by draws."""
        q = self.infer(x, y)
        return kl_to_standard_normal(q.start_mean, q.log_variance) if q.maps is None else q.kl(q.draw(KL_DRAWS))

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

    def receptive_fields(self) -> Float[Tensor, " hidden *shape"] | None:
        """Of the encoder's first layer; None of convolutions."""
        first = self.encoder[0] if self.config.network == "mlp" and isinstance(self.encoder, nn.Sequential) else None
        return first.weight[:, : self.data.dims].unflatten(1, self.data.shape) if isinstance(first, nn.Linear) else None

    def _encoded(self, x: Tensor, y: Tensor | None) -> Float[Tensor, " B outputs"]:
        """All that the encoder says of x, in full precision."""
        h = to_network(x, self.data, self._dtype)
        if self.config.network == "conv":
            if (one_hot := self._one_hot(y)) is not None:
                h = torch.cat([h, one_hot[:, :, None, None].expand(-1, -1, *h.shape[2:])], 1)
        else:
            h = self._beside_label(h.flatten(1), y)
        return promote(self.encoder(h))

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

    def _chunks(self, samples: int, rows: int, q: FlowPosterior) -> Iterator[int]:
        steering = 0 if q.context is None else q.context.shape[1]
        largest = max(1, MEMORY // (rows * max(self.data.dims * self.observation.params, steering)))
        for start in range(0, samples, largest):
            yield min(largest, samples - start)

    def _make_observation(self) -> Observation:
        config, data = self.config, self.data
        if data.kind == "codes":
            raise DataMismatch(
                f"{type(self).__name__} models images, audio and vectors; codes are names without order: use an "
                "autoregressive prior"
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

    @property
    def _head(self) -> nn.Linear:
        """The encoder's last layer."""
        head = self.encoder.head if isinstance(self.encoder, ConvEncoder) else self.encoder[-1]
        assert isinstance(head, nn.Linear)
        return head

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def log_weights(log_likelihood: Float[Tensor, " B count"], q: FlowPosterior, draws: Draws) -> Float[Tensor, " B count"]:
    """log p(x, z) − log q(z | x)."""
    return log_likelihood + log_normal(draws.z, 0.0, 0.0).sum(2) - q.log_prob_of(draws)


def usual_observation(data: DataSpec) -> Literal["bernoulli", "discretised_logistic", "gaussian"]:
    """What fits this kind of data."""
    if data.levels is None:
        return "gaussian"
    return "bernoulli" if data.levels == 2 else "discretised_logistic"


def tiny_latents(data: DataSpec) -> int:
    """As few as the smallest problems need."""
    return min(8, max(2, data.dims // 4))
