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

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataSpec, Loss
from dgm_core.distributions.flow_posterior import FlowPosterior
from dgm_core.models.latent.amortised import (
    AmortisedConfig,
    AmortisedModel,
    log_weights,
    tiny_latents,
    usual_observation,
)
from dgm_core.objectives.elbo import elbo, free_bits, kl_weight
from dgm_core.objectives.iwae import iwae


class VAE(AmortisedModel):
    """A Gaussian latent, an amortised Gaussian posterior."""

    class Config(AmortisedConfig):
        depth: int = Field(default=2, ge=0, description="dense hidden layers (mlp); 0 is linear")
        objective: Literal["elbo", "iwae"] = "elbo"
        importance_samples: int = Field(default=1, ge=1, description="draws of z: averaged (elbo), weighted (iwae)")
        kl_warmup: float = Field(
            default=0.0, ge=0, le=1, description="share of training in which the KL's weight rises to 1"
        )
        free_bits: float = Field(default=0.0, ge=0, description="nats a latent that the KL is not asked to go below")

        @model_validator(mode="after")
        def _objective_has_a_kl(self) -> Self:
            if self.objective == "iwae" and (self.kl_warmup or self.free_bits):
                raise ValueError("kl_warmup and free_bits change the ELBO's KL term, which iwae has not: set them to 0")
            return self

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(algorithm="adam", lr=1e-3)
        recipe = Recipe(batch_size=100, steps=50_000, optimizers={"model": adam})
        return cls.Config(observation=usual_observation(data)), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(latents=tiny_latents(data), features=64, observation=usual_observation(data))
        adam = Optimizer(algorithm="adam", lr=3e-3)
        return config, Recipe(batch_size=64, steps=400, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, layers=config.depth, outputs=2 * config.latents)

    def infer(self, x: Tensor, y: Tensor | None = None) -> FlowPosterior:
        """q(z | x) = N(μ, diag σ²)."""
        mean, log_variance = self._encoded(x, y).chunk(2, 1)
        return FlowPosterior(mean, log_variance)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        q = self.infer(batch.x, batch.y)
        draws = q.draw(self.config.importance_samples)
        log_likelihood = self._log_likelihood(batch.x, draws.z, batch.y)
        if self.config.objective == "iwae":
            return Loss(-iwae(log_weights(log_likelihood, q, draws)).mean())
        kl = q.kl(draws)
        reconstruction = log_likelihood.mean(1)
        weight = kl_weight(clock.progress, self.config.kl_warmup)
        if self.config.free_bits:
            value = weight * free_bits(kl, self.config.free_bits) - reconstruction.mean()
        else:
            value = -elbo(reconstruction, weight * kl).mean()
        metrics = {"reconstruction_nats": -reconstruction.detach().mean(), "kl_nats": kl.detach().sum(1).mean()}
        return Loss(value, metrics)
