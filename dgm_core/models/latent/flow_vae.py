"""Variational Inference with Normalizing Flows. D. J. Rezende, S. Mohamed, 2015. arXiv:1505.05770.

A VAE whose posterior goes on from the encoder's Gaussian through K invertible maps, whose parameters the encoder says
as well (section 4.2, algorithm 1): z₀ ~ N(μ(x), diag σ²(x)), z_K = f_K ∘ … ∘ f_1(z₀), by

    flow: planar    f(z) = z + û tanh(wᵀz + b)                  (eqs. 10–12)
    flow: radial    f(z) = z + β̂ (z − z_c) / (α + ‖z − z_c‖)     (eq. 14)
    flow: none      f(z) = z, a VAE with the same networks

and ln q_K(z_K) = ln q₀(z₀) − Σ_k ln |det ∂f_k/∂z_{k−1}| (eq. 13). The loss is the free energy (eq. 15), annealed
(eq. 20): F_β = E_{q₀} [ln q_K(z_K) − β_t ln p(x, z_K)] with β_t = min(1, 0.01 + t / 10,000), in nats an example.
E_{q₀} ln q₀(z₀) and ln p(z₀) are taken in closed form, what the maps change by one draw: the same expectation, and
without maps the VAE's own estimator.

Departures: two hidden layers of 400 ReLU units in place of maxout ones, and Adam, 10⁻³, 50,000 updates, where the paper
    has RMSprop, 10⁻⁵, momentum 0.9 and 500,000 updates: for speed. Maps start next to the identity, by a smaller last
    layer of the encoder; the paper gives no initialisation. m is 0 at 0 (`bijections.planar`).
    `kl` shares a map's ln |det| evenly over the latents: it belongs to none of them, and the sum is the divergence.
Expected: on MNIST, binarised once, −ln p(x) falls from no flow to ten planar maps and on to `iaf_vae`; not run yet:
    `make results ROW=inference_mnist`. The paper, on another draw: ≤ 89.9 nats without a flow, ≤ 87.5 with ten maps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from dgm_core.bijections import Planar, Radial
from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataSpec, Loss
from dgm_core.distributions.flow_posterior import FlowPosterior
from dgm_core.models.latent.amortised import AmortisedConfig, AmortisedModel, tiny_latents, usual_observation
from dgm_core.objectives.elbo import inverse_temperature

if TYPE_CHECKING:
    from jaxtyping import Float

START = 0.01  # by how much the encoder's say in how far a map moves is smaller at first


class FlowVAE(AmortisedModel):
    """A Gaussian latent, an amortised posterior through planar or radial maps."""

    class Config(AmortisedConfig):
        features: int = Field(default=400, ge=1, description="units of a dense layer")
        hidden: int = Field(default=2, ge=0, description="dense hidden layers (mlp); 0 is linear")
        flow: Literal["planar", "radial", "none"] = "planar"
        depth: int = Field(default=10, ge=0, description="K, maps in the flow")
        anneal: int = Field(default=10_000, ge=0, description="rounds over which the energy is annealed; 0: not")

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(algorithm="adam", lr=1e-3)
        recipe = Recipe(batch_size=100, steps=50_000, optimizers={"model": adam})
        return cls.Config(observation=usual_observation(data)), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(
            latents=tiny_latents(data), features=64, depth=4, anneal=100, observation=usual_observation(data)
        )
        adam = Optimizer(algorithm="adam", lr=3e-3)
        return config, Recipe(batch_size=64, steps=400, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        D, K = config.latents, 0 if config.flow == "none" else config.depth
        maps = (Radial if config.flow == "radial" else Planar)(D, K, amortised=True)
        super().__init__(config, data, layers=config.hidden, outputs=2 * D + maps.size)
        self.maps = maps if K else None
        with torch.no_grad():
            # After w and z_c come u of planar maps, a and b of radial ones: how far a map moves.
            first = 2 * D + K * D
            self._head.weight[first : first + K * (2 if config.flow == "radial" else D)] *= START

    def infer(self, x: Tensor, y: Tensor | None = None) -> FlowPosterior:
        D = self.config.latents
        mean, log_variance, steering = self._encoded(x, y).tensor_split((D, 2 * D), 1)
        if self.maps is None:
            return FlowPosterior(mean, log_variance)
        return FlowPosterior(mean, log_variance, steering, self._shared_maps, self.maps.inverse)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        q = self.infer(batch.x, batch.y)
        draws = q.draw(1)
        reconstruction = self._log_likelihood(batch.x, draws.z, batch.y).squeeze(1)
        kl, beta = q.kl(draws).sum(1), inverse_temperature(clock.step, self.config.anneal)
        # ln q_K = KL + ln p(z_K) in expectation, of which β takes only its share of ln p(z_K) back.
        value = kl + (1 - beta) * q.log_prior(draws) - beta * reconstruction
        metrics = {"reconstruction_nats": -reconstruction.detach().mean(), "kl_nats": kl.detach().mean()}
        return Loss(value.mean(), metrics)

    def _shared_maps(
        self, z: Float[Tensor, " N latents"], steering: Float[Tensor, " N size"]
    ) -> tuple[Float[Tensor, " N latents"], Float[Tensor, " N latents"]]:
        assert self.maps is not None
        z, log_det = self.maps(z, steering)
        return z, (log_det / z.shape[1])[:, None].expand_as(z)
