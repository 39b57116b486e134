"""Improved Variational Inference with Inverse Autoregressive Flow. D. P. Kingma et al., 2016. arXiv:1606.04934.

The encoder says μ₀, σ₀ and a context h; z₀ = μ₀ + σ₀ ⊙ ε, ε ~ N(0, I), goes through T steps (eqs. 10–14, algorithm 1)

    [m_t, s_t] = MADE_t(z_{t−1}, h),   σ_t = sigmoid(s_t),   z_t = σ_t ⊙ z_{t−1} + (1 − σ_t) ⊙ m_t

each of which is one pass with a triangular Jacobian; the order of coordinates is reversed from one step to the next:

    log q(z_T | x) = −Σ_i (½ ε_i² + ½ log 2π + log σ_{0,i} + Σ_t log σ_{t,i}).

The loss in nats an example is −L_λ (eq. 15), with the mean over the batch inside the maximum and a latent as a group:

    L_λ = E_q log p(x | z) − Σ_j max(λ, KL_j),   KL_j = E_q [log q_j − log p(z_j)],

where log q_j are the terms of coordinate j above. KL_j is that of z₀, in closed form, and what the steps change, by one
draw; T = 0 is a VAE.

Departures: the paper's ResNets and its ladder of latents are left out: one layer of latents under the dense or small
    convolutional networks of `vae`, ReLU and tanh units in place of ELU; groups are single latents where the paper has
    feature maps and λ = 0.25, hence the smaller λ. The MADE's last layer starts at zero, the forget gate's bias 2 (the
    paper: 1 to 2) is a constant and s is softly bounded (`bijections.GatedAffine`). `anneal` is Rezende & Mohamed's
    and off at first.
Expected: on MNIST, binarised once, −log p(x) below that of planar maps and of none; not run yet:
    `make results ROW=inference_mnist`. The paper has 79.1 nats, by ResNets on images binarised anew every epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.bijections import Autoregressive, GatedAffine
from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataSpec, Loss
from dgm_core.distributions.flow_posterior import FlowPosterior
from dgm_core.models.latent.amortised import AmortisedConfig, AmortisedModel, tiny_latents, usual_observation
from dgm_core.nn.masked import MADE
from dgm_core.nn.masked import Activation as MadeActivation
from dgm_core.objectives.elbo import free_bits, inverse_temperature

if TYPE_CHECKING:
    from jaxtyping import Float


class IAFVAE(AmortisedModel):
    """A Gaussian latent, an amortised posterior through inverse autoregressive steps."""

    class Config(AmortisedConfig):
        hidden: int = Field(default=2, ge=0, description="dense hidden layers (mlp); 0 is linear")
        depth: int = Field(default=2, ge=0, description="T, autoregressive steps")
        context: int = Field(default=128, ge=1, description="size of h, what the steps are told of x")
        made_features: int = Field(default=320, ge=1, description="units of a MADE's hidden layer")
        made_hidden: int = Field(default=2, ge=1, description="hidden layers of a MADE")
        made_activation: MadeActivation = "tanh"
        forget_bias: float = Field(default=2.0, description="added to s: how much of z a step keeps at the start")
        free_bits: float = Field(default=0.05, ge=0, description="λ, nats a latent that its KL may have for nothing")
        anneal: int = Field(default=0, ge=0, description="rounds over which the energy is annealed; 0: not")

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adamax = Optimizer(algorithm="adamax", lr=2e-3, ema=0.999)
        recipe = Recipe(batch_size=100, steps=50_000, optimizers={"model": adamax})
        return cls.Config(observation=usual_observation(data)), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(
            latents=tiny_latents(data),
            features=64,
            context=16,
            made_features=32,
            made_hidden=1,
            free_bits=0.0,
            observation=usual_observation(data),
        )
        adam = Optimizer(algorithm="adam", lr=3e-3)
        return config, Recipe(batch_size=64, steps=400, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        D, C = config.latents, config.context if config.depth else 0
        super().__init__(config, data, layers=config.hidden, outputs=2 * D + C)
        self.steps = nn.ModuleList()
        for t in range(config.depth):
            made = MADE(
                D,
                GatedAffine.outputs,
                features=config.made_features,
                hidden=config.made_hidden,
                activation=config.made_activation,
                context=C,
                order=range(D)[::-1] if t % 2 else None,
            )
            self.steps.append(Autoregressive(made, GatedAffine(config.forget_bias)))

    def infer(self, x: Tensor, y: Tensor | None = None) -> FlowPosterior:
        D = self.config.latents
        mean, log_variance, h = self._encoded(x, y).tensor_split((D, 2 * D), 1)
        if not self.steps:
            return FlowPosterior(mean, log_variance)
        return FlowPosterior(mean, log_variance, h, self._forward_steps, self._backward_steps)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        q = self.infer(batch.x, batch.y)
        draws = q.draw(1)
        reconstruction = self._log_likelihood(batch.x, draws.z, batch.y).squeeze(1)
        kl, beta = q.kl(draws), inverse_temperature(clock.step, self.config.anneal)
        paid = free_bits(kl, self.config.free_bits) if self.config.free_bits else kl.sum(1).mean()
        value = paid + ((1 - beta) * q.log_prior(draws) - beta * reconstruction).mean()
        metrics = {"reconstruction_nats": -reconstruction.detach().mean(), "kl_nats": kl.detach().sum(1).mean()}
        return Loss(value, metrics)

    def _forward_steps(
        self, z: Float[Tensor, " N latents"], h: Float[Tensor, " N context"]
    ) -> tuple[Float[Tensor, " N latents"], Float[Tensor, " N latents"]]:
        """z_T, and Σ_t log σ_t of each coordinate."""
        total = torch.zeros_like(z)
        for step in self.steps:
            assert isinstance(step, Autoregressive)
            z, log_gate = step.transformer(z, step.net(z, h))
            total = total + log_gate
        return z, total

    def _backward_steps(
        self, z: Float[Tensor, " N latents"], h: Float[Tensor, " N context"]
    ) -> tuple[Float[Tensor, " N latents"], Float[Tensor, " N"]]:
        """z₀, a coordinate after another, and −Σ_t Σ_i log σ_{t,i}."""
        total = z.new_zeros(z.shape[0])
        for step in reversed(self.steps):
            assert isinstance(step, Autoregressive)
            z, log_det = step.inverse(z, h)
            total = total + log_det
        return z, total
