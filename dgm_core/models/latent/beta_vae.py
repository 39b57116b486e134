"""β-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework. I. Higgins et al., 2017.
openreview.net/forum?id=Sy2fzU9gl. Its capacity-controlled form: C. P. Burgess et al., 2018. Understanding disentangling
in β-VAE. NIPS workshop, arXiv 1804.03599.

p(z) = N(0, I), p(x | z) and q(z | x) = N(μ(x), diag σ²(x)) by neural networks. Minus the loss, in nats an example:

    E_q log p(x | z) − β KL(q(z | x) ‖ p(z))            `objective: beta` (Higgins et al., eq. 4; β = 1 is a VAE)
    E_q log p(x | z) − γ |KL(q(z | x) ‖ p(z)) − C|      `objective: capacity` (Burgess et al., eq. 8),

C rising linearly from 0 as training goes, so that the latents are let out one by one, the one that is worth most first.
`log_prob` is the ELBO of the same networks, β = 1, whatever was trained. Defaults are those of the paper's 2DShapes:
dense layers of 1200, 10 latents, β = 4, Adagrad with a learning rate of 0.01; γ = 1000 and C up to 25 nats in 100,000
rounds are Burgess et al.'s there.

Departures: encoder and decoder have two hidden layers of ReLU each, started as Glorot's, where the paper's decoder has
    three of tanh; `network: conv` has the small convolutions of `vae`. Eq. 8 is written for one x; here the KL in it is
    the mean over the batch (of all ranks), so that C is the channel's rate and not every example's. The papers name no
    batch size: 64; 100,000 rounds are Burgess et al.'s for C, for either objective.
Expected: a higher β-VAE metric than a VAE's on shapes of known factors, at a worse reconstruction, not run yet:
    `make results ROW=beta_vae_sprites`. The paper has 99.23 % at β = 4 beside a VAE's 61.58 % on 2DShapes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataSpec, Loss
from dgm_core.distributions.flow_posterior import FlowPosterior
from dgm_core.models.latent.amortised import AmortisedConfig, AmortisedModel, tiny_latents, usual_observation
from dgm_core.objectives.elbo import capacity_gap, kl_weight


class BetaVAE(AmortisedModel):
    """A VAE whose latents are paid for at another price than the bound's."""

    class Config(AmortisedConfig):
        latents: int = Field(default=10, ge=1)
        features: int = Field(default=1200, ge=1, description="units of a dense layer")
        depth: int = Field(default=2, ge=0, description="dense hidden layers (mlp); 0 is linear")
        objective: Literal["beta", "capacity"] = "beta"
        beta: float = Field(default=4.0, gt=0, description="β, the price of a nat of KL (beta)")
        gamma: float = Field(default=1000.0, gt=0, description="γ, the price of a nat away from C (capacity)")
        capacity: float = Field(default=25.0, ge=0, description="C in the end, nats (capacity)")
        rise: float = Field(
            default=1.0, ge=0, le=1, description="share of training in which C rises from 0 to that (capacity)"
        )

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adagrad = Optimizer(algorithm="adagrad", lr=1e-2)
        recipe = Recipe(batch_size=64, steps=100_000, optimizers={"model": adagrad})
        return cls.Config(observation=usual_observation(data)), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(latents=tiny_latents(data), features=64, beta=1.5, observation=usual_observation(data))
        adam = Optimizer(algorithm="adam", lr=3e-3)
        return config, Recipe(batch_size=64, steps=400, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, layers=config.depth, outputs=2 * config.latents)

    def infer(self, x: Tensor, y: Tensor | None = None) -> FlowPosterior:
        """q(z | x) = N(μ, diag σ²)."""
        mean, log_variance = self._encoded(x, y).chunk(2, 1)
        return FlowPosterior(mean, log_variance)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        c = self.config
        q = self.infer(batch.x, batch.y)
        draws = q.draw(1)
        reconstruction = self._log_likelihood(batch.x, draws.z, batch.y).mean()
        kl = q.kl(draws)
        metrics = {"reconstruction_nats": -reconstruction.detach(), "kl_nats": kl.detach().sum(1).mean()}
        if c.objective == "beta":
            return Loss(c.beta * kl.sum(1).mean() - reconstruction, metrics)
        C = c.capacity * kl_weight(clock.progress, c.rise)
        metrics["capacity_nats"] = metrics["kl_nats"].new_tensor(C)
        return Loss(c.gamma * capacity_gap(kl, C) - reconstruction, metrics)
