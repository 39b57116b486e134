"""Variational Inference with Normalizing Flows: radial. D. Rezende, S. Mohamed, 2015. arXiv:1505.05770.

z₀ ~ N(μ, diag σ²), z_k = z_{k−1} + β̂_k (z_{k−1} − c_k) / (α_k + ‖z_{k−1} − c_k‖) (eq. 14), fitted to an unnormalised
density exp(−U) by its own samples; of the data only the energy is looked at. Minimised (eqs. 15, 20):

    E[log q(z_K) + β_t U(z_K)],   log q(z_K) = log q₀(z₀) − Σ_k log |det ∂z_k / ∂z_{k−1}|

with β_t = min(1, 0.01 + t / T). At β = 1 it is KL(q ‖ p) − log Z. Both directions are closed.

Departures: Adam, a learning rate that falls to zero along a cosine and averaged parameters where the paper has RMSprop,
10⁻⁵, momentum 0.9 and 500,000 updates; T is half of the training. μ and σ are learnt, from 0 and 1.
Expected: gaps of 0.023, 0.013, 0.072 and 0.220 nats to −log Z of U₁ to U₄, the worst of three seeds, above those of
planar flows: `make results ROW=radial_flow_u1` and so on.
"""

from __future__ import annotations

from pydantic import Field

from dgm_core.bijections import Chain, DiagonalAffine, Invert, Radial
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import DataSpec
from dgm_core.models.flow.base import FlowModel


class RadialFlow(FlowModel):
    """Radial maps after a diagonal Gaussian, by reverse KL to a known energy."""

    class Config(Strict):
        depth: int = Field(default=32, ge=1, description="K, maps in the flow")
        spread: float = Field(default=3.0, ge=0, description="standard deviation of the centres at the start")
        anneal: float = Field(default=0.5, ge=0, description="share of training in which the energy is annealed")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=1e-1, schedule="cosine", ema=0.999)
        return cls.Config(), Recipe(batch_size=256, steps=6000, optimizers={"model": adam})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=5e-2, schedule="cosine")
        return cls.Config(), Recipe(batch_size=128, steps=800, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, objective="reverse_kl", anneal=config.anneal)
        radial = Radial(data.dims, config.depth, spread=config.spread)
        self.flow = Chain(Invert(radial), DiagonalAffine(data.dims))
