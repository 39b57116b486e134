"""NICE: non-linear independent components estimation. L. Dinh, D. Krueger, Y. Bengio, 2015. arXiv:1410.8516.

Four additive couplings y_moves = x_moves + m(x_passes) (eqs. 5–8, 17–20), which keep volume, between the even and the
odd components in turn; then each component is scaled, h_i = exp(s_i) y_i (3.3). Factorial prior: logistic or Gaussian
(3.4). Minimised: −log p(x) = −Σ_i [log p_H(h_i) + s_i] (eq. 4).

MNIST: m has five hidden layers of 1,000 rectified units, the prior is logistic. Integers x are dequantised and scaled
to [0, 1], (x + u) / levels (5.1). Adam with learning rate 10⁻³, β₁ = 0.9, ε = 10⁻⁴; the paper keeps the best of 1,500
epochs by the validation likelihood.

Departures: β₂ = 0.999 (the paper prints 0.01, in the notation of its time for what is now 0.99). The last layer of m
starts at zero, so that training starts from the scaling alone (the paper gives no initialisation). Batches of 200 and
150 epochs of MNIST (the paper gives no batch size). Real-valued data is standardised, where the paper scales it to
[−1, 1] or whitens it.
Expected: at most 4.40 bits/dim on MNIST (4.36 in the paper), a long run, not run yet: `make results ROW=nice_mnist`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dgm_core.bijections import (
    Additive,
    Bijection,
    Chain,
    DiagonalAffine,
    Flatten,
    Rescale,
    SplitCoupling,
    alternating_parts,
)
from dgm_core.config import Optimizer, ParameterGroup, Recipe, Strict
from dgm_core.contract import DataSpec
from dgm_core.distributions.latent_base import StandardLogistic
from dgm_core.models.flow.base import FlowModel
from dgm_core.nn.flow_nets import CouplingMLP


class NICE(FlowModel):
    """Additive couplings and one scaling: independent components of a volume-preserving map."""

    class Config(Strict):
        depth: int = Field(default=4, ge=2, description="couplings")
        features: int = Field(default=1000, ge=1, description="units of a hidden layer")
        hidden: int = Field(default=5, ge=1, description="hidden layers of a coupling's network")
        prior: Literal["logistic", "normal"] = "logistic"
        standardize: bool = Field(
            default=True, description="centre and scale real-valued data by the training split's moments"
        )

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=1e-3, eps=1e-4)
        if data.dims > 8:
            return cls.Config(), Recipe(batch_size=200, steps=37_500, optimizers={"model": adam})
        return cls.Config(depth=8, features=64, hidden=3), Recipe(
            batch_size=200, steps=6000, optimizers={"model": adam}
        )

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        faster = {"*log_scale": ParameterGroup(lr_scale=10.0)}  # the scales have far to go from one, and few rounds
        adam = Optimizer(lr=1e-2, schedule="cosine", clip_norm=10.0, groups=faster)
        prior = "normal" if data.levels is None else "logistic"
        config = cls.Config(features=64, hidden=2, prior=prior)
        return config, Recipe(batch_size=64, steps=200, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, standardize=config.standardize)
        if data.levels is not None:
            self.to_real = Rescale(0.0, 1 / data.levels)
        if config.prior == "logistic":
            self.base = StandardLogistic()
        parts: list[Bijection] = [] if data.kind == "vector" else [Flatten(data.shape)]
        for i in range(config.depth):
            passing, moving = alternating_parts(data.dims, i % 2)
            seen, said = (len(range(data.dims)[part]) for part in (passing, moving))
            net = CouplingMLP(seen, said, config.features, config.hidden)
            parts.append(SplitCoupling((passing, moving), net, Additive()))
        self.flow = Chain(*parts, DiagonalAffine(data.dims, shift=False))
