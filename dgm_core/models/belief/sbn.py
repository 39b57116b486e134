"""Connectionist Learning of Belief Networks. R. Neal, 1992. doi:10.1016/0004-3702(92)90065-6.
Mean field: L. Saul, T. Jaakkola, M. Jordan, Mean Field Theory for Sigmoid Belief Networks, 1996. arXiv:cs/9603102.

A sigmoid belief net: units in layers, each on with probability σ(z), z = b + W h a weighted sum of the layer above; the
top layer's units are independent. The likelihood's gradient is the posterior's mean of ∂ log p(x, h) / ∂θ: with
s = 2h − 1, Neal's rule

    ∂ log p(x) / ∂W_ij = E[s_i h_j σ(−s_i z_i) | x].

`inference: gibbs` draws from the posterior: a chain an example, started at an ancestral draw of the hidden units,
visits each hidden unit in turn and draws it given all others; after `burn_in` sweeps those of `sweeps` are averaged.
`inference: mean_field` is variational EM: the E-step finds for every example the factorised q(h) and the ξ at which
Saul et al.'s lower bound of log p(x) (in `mean_field.py`) stands still, the M-step is one gradient step on that bound.

log p(x) is exact, by enumeration, up to 16 hidden units. Beyond, whichever way it was trained, one sample gives the
mean-field bound (no sampling, never above log p); more give the importance-weighted bound whose proposal is the
mean-field posterior, which is the tighter one: log p ≥ E_q[log p − log q] ≥ the bound with ξ.

Departures: Adam on minibatches for plain gradient steps. Chains start afresh at every play and do not go on from where
    an example's last visit left them, so that training can be resumed and spread with no state an example. An M-step is
    one step, not a maximum. Weights start as Glorot's, visible biases from the data's mean, an E-step from the
    generative net's own means.
Expected: 20.0 nats a test example, exact, on thresholded 8 × 8 digits with 8 hidden units after 50 epochs of Gibbs
    learning, 20.2 of mean-field EM, 19.9 with 8–8 units and Gibbs: `make results ROW=sbn_digits`. Nothing is published
    for data at hand.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataSpec, Loss
from dgm_core.models.belief import mean_field
from dgm_core.models.belief.base import MEMORY, BeliefNet, Layered
from dgm_core.nn.rbm import draw_bernoulli
from dgm_core.precision import full_precision

if TYPE_CHECKING:
    from jaxtyping import Float


class SBN(BeliefNet):
    """No recognition net: the posterior is found anew for every example."""

    class Config(Layered):
        inference: Literal["gibbs", "mean_field"] = "gibbs"
        burn_in: int = Field(default=5, ge=0, description="Gibbs sweeps that are thrown away")
        sweeps: int = Field(default=5, ge=1, description="Gibbs sweeps that are averaged")
        e_sweeps: int = Field(default=50, ge=1, description="sweeps of an E-step, at most")
        tolerance: float = Field(default=1e-3, ge=0, description="an E-step ends when no mean moves by more")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        return cls.Config(hidden=(24, 8)), _recipe(5e-3, 100, 20_000)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        return cls.Config(hidden=(4, 2), burn_in=1, sweeps=2), _recipe(0.03, 32, 200)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        x = self.visible(batch.x)
        with full_precision(self.device):
            if self.config.inference == "mean_field":
                return Loss(-mean_field.bound(self.generative, x, self.infer(x)).mean())
            # E[log p(x, h) | x] has the likelihood's gradient; it lies below log p(x) by the posterior's entropy.
            return Loss(-self.log_joint(batch.x, self.posterior_states(x)).mean())

    @torch.no_grad()
    def posterior_states(self, x: Float[Tensor, " B v"]) -> list[Float[Tensor, " B sweeps n"]]:
        """h¹, …, h^L of a chain's sweeps after the burn-in."""
        states = [x, *self.generative.draw(len(x))[1:]]
        kept = []
        for i in range(self.config.burn_in + self.config.sweeps):
            states = self.generative.gibbs(states)
            if i >= self.config.burn_in:
                kept.append(states[1:])
        return [torch.stack(layer, 1) for layer in zip(*kept, strict=True)]

    def infer(self, x: Float[Tensor, " B v"]) -> mean_field.Field:
        """The E-step."""
        return mean_field.e_step(self.generative, x, self.config.e_sweeps, self.config.tolerance)

    def lower_bound(self, v: Float[Tensor, " B v"], samples: int) -> Float[Tensor, " B"]:
        widest = max(below * above for below, above in pairwise(self.sizes))  # the E-step has a number for each weight
        return torch.cat([self._bound(part, samples) for part in v.split(max(1, MEMORY // widest))])

    def _bound(self, v: Float[Tensor, " B v"], samples: int) -> Float[Tensor, " B"]:
        field = self.infer(v)
        if samples == 1:
            return mean_field.bound(self.generative, v, field)

        def log_weights(count: int) -> Float[Tensor, " B count"]:
            hidden = [draw_bernoulli(m[:, None].expand(-1, count, -1)) for m in field.logits]
            return self.generative.log_terms([v[:, None], *hidden]).sum(-1) - field.log_prob(hidden)

        return self.importance_weighted(log_weights, len(v), samples)


def _recipe(lr: float, batch_size: int, steps: int) -> Recipe:
    # fp32: the products are too small for bf16 to pay.
    adam = Optimizer(algorithm="adam", lr=lr)
    return Recipe(batch_size=batch_size, steps=steps, optimizers={"model": adam}, precision="fp32")
