"""Improved variational inference with inverse autoregressive flow. D. P. Kingma et al., 2016. arXiv:1606.04934.

From noise to data, in one pass a layer: z₀ = μ + σ ⊙ ε; then [m, s] from a MADE of z_{t−1}, σ_t = sigmoid(s + 2),
z_t = σ_t ⊙ z_{t−1} + (1 − σ_t) ⊙ m, and log q(z_T) = log N(ε; 0, I) − Σ log σ₀ − Σ_t Σ_i log σ_{t,i} (eqs. 10–15); the
order is reversed from one layer to the next. Two ways to train:

`objective: reverse_kl`, the default where the data set knows an unnormalised density exp(−U) that is positive
everywhere: E_q [log q(x) + U(x)], by draws of the model itself, each of one pass.

`objective: likelihood`, the default elsewhere: −log p(x). A layer's noise takes D dependent steps there, which together
cost about a pass, and its gradient up to D − 1 vector-Jacobian products of the layer's network, fewer where they
settle earlier: a MAF is the model whose density is one pass.

Departures: z₀'s μ and σ are learnt constants, in place of an encoder's outputs (`iaf_vae` has the encoder). The MADE's
last layer starts at zero, and the bias 2 (the paper: +1 to +2) is a constant. The paper gives no optimiser for
densities in the plane: Adam, learning rate 5·10⁻³ that falls to zero along a cosine, gradient norm at most 1, averaged
parameters.
Expected: a gap of 0.021 nats to −log Z of Rezende and Mohamed's U₂, the worst of three seeds: `make results
ROW=iaf_u2`.
"""

from __future__ import annotations

from pydantic import Field

from dgm_core.bijections import Autoregressive, Bijection, Chain, DiagonalAffine, Flatten, GatedAffine, Invert, Reverse
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import DataSpec
from dgm_core.data import densities
from dgm_core.models.flow.base import FlowModel, Objective
from dgm_core.nn.masked import MADE, Activation


class IAF(FlowModel):
    """A stack of gated autoregressive maps from noise to data, each in the reverse of the last one's order."""

    class Config(Strict):
        objective: Objective = Field(default="likelihood", description="or reverse KL to the data set's density")
        depth: int = Field(default=8, ge=1, description="autoregressive layers")
        features: int = Field(default=64, ge=1, description="units of a hidden layer")
        hidden: int = Field(default=2, ge=1, description="hidden layers of a MADE, or residual blocks after the first")
        residual: bool = False
        activation: Activation = Field(default="tanh", description="bounded units keep the noise of far data finite")
        forget_bias: float = Field(default=2.0, description="added to s: how much of z a layer keeps at the start")
        alpha: float = Field(default=0.05, gt=0, lt=0.5, description="keeps the logit of integer data finite")
        standardize: bool = Field(
            default=True, description="centre and scale real-valued data by the training split's moments"
        )

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=5e-3, schedule="cosine", clip_norm=1.0, ema=0.99)
        recipe = Recipe(batch_size=256, steps=4000, optimizers={"model": adam})
        return cls.Config(objective=_objective(data)), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam, objective = Optimizer(lr=1e-2, schedule="cosine", clip_norm=10.0), _objective(data)
        if objective == "reverse_kl":
            config = cls.Config(objective=objective, depth=8, hidden=1)
            return config, Recipe(batch_size=128, steps=500, optimizers={"model": adam})
        config = cls.Config(objective=objective, depth=4, hidden=1)
        return config, Recipe(batch_size=64, steps=150, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, alpha=config.alpha, standardize=config.standardize, objective=config.objective)
        c = config
        parts: list[Bijection] = [] if data.kind == "vector" else [Flatten(data.shape)]
        for i in range(c.depth):
            parts += [Reverse()] if i else []
            made = MADE(
                data.dims,
                GatedAffine.outputs,
                features=c.features,
                hidden=c.hidden,
                residual=c.residual,
                activation=c.activation,
            )
            parts.append(Invert(Autoregressive(made, GatedAffine(c.forget_bias))))
        self.flow = Chain(*parts, DiagonalAffine(data.dims))


def _objective(data: DataSpec) -> Objective:
    """Reverse KL where the data set knows a density for it."""
    known = bool(data.density) and densities.named(**data.density).everywhere
    return "reverse_kl" if known else "likelihood"
