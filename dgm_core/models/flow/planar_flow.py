"""Variational Inference with Normalizing Flows: planar. D. Rezende, S. Mohamed, 2015. arXiv:1505.05770.

z₀ ~ N(μ, diag σ²), z_k = z_{k−1} + û_k tanh(w_kᵀ z_{k−1} + b_k) (eqs. 10–12), fitted to an unnormalised density
exp(−U) by its own samples; of the data only the energy is looked at. Minimised (eqs. 15, 20):

    E[log q(z_K) + β_t U(z_K)],   log q(z_K) = log q₀(z₀) − Σ_k log |1 + w_kᵀ û_k (1 − tanh²(w_kᵀ z_{k−1} + b_k))|

with β_t = min(1, 0.01 + t / T). At β = 1 it is KL(q ‖ p) − log Z. Likelihoods go the other way, where each map is
solved for one number (`bijections.planar`).

Departures: Adam, a learning rate of 4·10⁻² that falls to zero along a cosine and averaged parameters where the paper
has RMSprop, 10⁻⁵, momentum 0.9 and 500,000 updates; T is half of the training (10,000 updates). The paper gives no
initialisation: maps start as slight bends across lines that lie all over the picture, b ~ N(0, 3²); from b = 0 the same
training misses a part of U₄. μ and σ are learnt, from 0 and 1; m is 0 at 0 (`bijections.planar`).
Expected: gaps of 0.008, 0.001, 0.017 and 0.011 nats to −log Z of U₁ to U₄, the worst of three seeds: `make results
ROW=planar_flow_u1` and so on.
"""

from __future__ import annotations

from pydantic import Field

from dgm_core.bijections import Chain, DiagonalAffine, Invert, Planar
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import DataSpec
from dgm_core.models.flow.base import FlowModel


class PlanarFlow(FlowModel):
    """Planar maps after a diagonal Gaussian, by reverse KL to a known energy."""

    class Config(Strict):
        depth: int = Field(default=32, ge=1, description="K, maps in the flow")
        spread: float = Field(default=3.0, ge=0, description="standard deviation of b at the start")
        anneal: float = Field(default=0.5, ge=0, description="share of training in which the energy is annealed")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=4e-2, schedule="cosine", ema=0.999)
        return cls.Config(), Recipe(batch_size=256, steps=6000, optimizers={"model": adam})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=4e-2, schedule="cosine")
        return cls.Config(depth=16), Recipe(batch_size=128, steps=600, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, objective="reverse_kl", anneal=config.anneal)
        planar = Planar(data.dims, config.depth, spread=config.spread)
        self.flow = Chain(Invert(planar), DiagonalAffine(data.dims))
