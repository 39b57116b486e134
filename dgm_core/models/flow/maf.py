"""Masked Autoregressive Flow for density estimation. G. Papamakarios, T. Pavlakou, I. Murray, 2017. arXiv:1705.07057.

A stack of MADEs, each of which models the random numbers of the one before it: u_i = (x_i − μ_i) exp(−α_i), where
(μ_i, α_i) are functions of x_1 … x_{i−1} (eqs. 3–5), with batch normalisation after every MADE and the order reversed
from one to the next (4.1). `base: mog` puts a MADE whose conditionals are mixtures of Gaussians at the end: MAF MoG,
and with `depth: 0` MADE MoG; one layer without batch normalisation is MADE. `conditional` models p(x | y): the label
enters the first hidden layer of every MADE (3.4). Minimised: −log p(x).

Adam, batches of 100, weight decay 10⁻⁶, learning rate 10⁻⁴ (10⁻³ with a single MADE). MNIST: logit with λ = 10⁻⁶, two
hidden layers of 1,024 ReLU units.

A draw takes D steps, which together cost about one pass of each network: every hidden unit is computed once, when what
it sees is known.

Departures: |α| is softly bounded by 7 (the paper's exp is not). Weights start as torch's linear layers do, the last
layer at zero, so that training starts from the identity. In a conditional model some units see the label alone, so that
the first coordinate depends on it as well. Batch normalisation is evaluated with running averages (over about 200
batches at `momentum: 0.01`) where the paper takes the moments of the whole training split. 50 epochs of MNIST stand for
early stopping after 30 epochs without improvement. Real-valued data is standardised. Few coordinates are not in the
paper's tables: there, more MADEs of few units without batch normalisation.
Expected: 2.888 nats on eight Gaussians in the plane (entropy 2.832) and 1.017 on moons (1.008), three seeds:
`make results ROW=maf_8gaussians`, `make results ROW=maf_moons`; −1272.7 nats on logit-MNIST (a re-implementation's 50
epochs; −1300.5 in the paper), not run yet: `make results ROW=maf_logit_mnist`.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from dgm_core.bijections import (
    Autoregressive,
    BatchNormalization,
    Bijection,
    Chain,
    DiagonalAffine,
    Flatten,
    Permutation,
    Reverse,
    SoftAffine,
)
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import DataSpec
from dgm_core.distributions.autoregressive_mixture import AutoregressiveMixture
from dgm_core.models.flow.base import FlowModel
from dgm_core.nn.masked import MADE, Activation
from dgm_core.nn.norm import Moments


class MAF(FlowModel):
    """A stack of masked autoregressive maps, each in the reverse of the last one's order."""

    class Config(Strict):
        depth: int = Field(default=5, ge=0, description="MADEs in the stack, besides that of `base: mog`")
        features: int = Field(default=1024, ge=1, description="units of a hidden layer")
        hidden: int = Field(default=2, ge=1, description="hidden layers of a MADE, or residual blocks after the first")
        residual: bool = False
        activation: Activation = "relu"
        order: Literal["reversed", "random"] = Field(
            default="reversed", description="of the coordinates in each MADE: the last one's reversed, or drawn anew"
        )
        batch_norm: bool = Field(default=True, description="after every MADE of the stack")
        momentum: float = Field(default=0.01, gt=0, le=1, description="of batch normalisation's running averages")
        base: Literal["normal", "mog"] = "normal"
        components: int = Field(default=10, ge=1, description="of a conditional's mixture, for base 'mog'")
        conditional: bool = Field(default=False, description="model p(x | y)")
        alpha: float = Field(default=1e-6, gt=0, lt=0.5, description="λ: keeps the logit of integer data finite")
        standardize: bool = Field(
            default=True, description="centre and scale real-valued data by the training split's moments"
        )

        @model_validator(mode="after")
        def _has_parameters(self) -> Self:
            if self.depth == 0 and self.base == "normal":
                raise ValueError("depth 0 with base 'normal' leaves nothing to learn; set depth, or base: mog")
            return self

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        if data.dims > 8:
            adam = Optimizer(lr=1e-4, weight_decay=1e-6)
            return cls.Config(), Recipe(batch_size=100, steps=25_000, optimizers={"model": adam})
        adam = Optimizer(lr=5e-3, schedule="cosine", clip_norm=1.0, ema=0.99)
        config = cls.Config(depth=12, features=64, hidden=2, batch_norm=False)
        return config, Recipe(batch_size=256, steps=6000, optimizers={"model": adam})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=5e-3, schedule="cosine", clip_norm=10.0)
        config = cls.Config(depth=3, features=64, hidden=1, batch_norm=data.dims > 8, momentum=0.1, alpha=0.05)
        return config, Recipe(batch_size=64, steps=150, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(
            config, data, alpha=config.alpha, standardize=config.standardize, conditional=config.conditional
        )
        c, dims = config, data.dims
        parts: list[Bijection] = [] if data.kind == "vector" else [Flatten(data.shape)]
        for i in range(c.depth):
            parts += self._reorder() if i else []
            parts.append(Autoregressive(self._made(SoftAffine.outputs), SoftAffine()))
            if c.batch_norm:
                parts += [BatchNormalization(Moments(dims, c.momentum)), DiagonalAffine(dims)]
        if c.base == "mog":
            parts += self._reorder() if c.depth else []
            self.base = AutoregressiveMixture(self._made(3 * c.components), c.components)
        self.flow = Chain(*parts)

    def _made(self, outputs: int) -> MADE:
        c = self.config
        return MADE(
            self.data.dims,
            outputs,
            features=c.features,
            hidden=c.hidden,
            residual=c.residual,
            activation=c.activation,
            context=self.data.classes if c.conditional else 0,
        )

    def _reorder(self) -> list[Bijection]:
        if self.config.order == "reversed":
            return [Reverse()]
        return [Permutation(torch.randperm(self.data.dims))]
