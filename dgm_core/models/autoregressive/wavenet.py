"""WaveNet: A Generative Model for Raw Audio. A. van den Oord et al., 2016. arXiv:1609.03499.

p(x | h) = Π_t p(x_t | x_1 … x_{t−1}, h) (eq. 1; given a condition h, §2.5). The present sample is not seen: a causal
convolution enters, then `stacks` times ten layers of dilations 1, 2, 4 … 512 (§2.1, fig. 3), each gated, residual and
with a skip connection (eq. 2, fig. 4); their sum goes through ReLU, 1×1, ReLU, 1×1 to the parameters of p(x_t | …).

`output: softmax` (§2.2): one number a level, for audio of 256 µ-law levels (variant `mu_law`) and for codes. Levels
enter one-hot. `output: logistic_mixture` (Parallel WaveNet, arXiv:1711.10433; Salimans et al. 2017, arXiv:1701.05517,
eq. 2): a mixture of logistics over ordered levels, up to 65,536 of them, which enter as numbers in [−1, 1].

Conditions (§2.5) enter every gate: global ones, a class or a speaker and vectors, alike at all times (Vᵀ h); local
ones, codes or audio at a rate that divides the data's, stretched by a transposed convolution or by repetition (V ∗ y).

Departures: the widths, the ten mixture components and the optimisation, on which the paper is silent, are those of
Parallel WaveNet's teacher (Adam at a constant 2e-4, averaged parameters, batches of 32), with the kernel of two taps
that fig. 3 shows. Glorot initialisation, with the mixture's means spread over [−1, 1] at first; log-scales are softly
bounded below at PixelCNN++'s −7 for 256 levels, in proportion for others. Context stacks (§2.6) are left out.
Expected: the paper has no likelihood; samples at least 50 × faster than the naive loop's with 3 × 10 layers, not
measured yet; `python -m pipelines.train` trains it by name.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.distributions.ordinal_mixture import OrdinalMixture
from dgm_core.models.autoregressive.base import Conditioner, RasterModel
from dgm_core.nn.causal import Pointwise
from dgm_core.nn.tokens import TokenInput
from dgm_core.nn.wavenet import Upsampling, WaveNetNetwork, WaveNetSizes, stretch

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SOFTMAX_LEVELS = 256


class SequenceMap(nn.Module):
    """A context (T',) as features of the data's length T: y = f(h) of §2.5."""

    def __init__(self, name: str, context: DataSpec, data: DataSpec, features: int, upsampling: Upsampling) -> None:
        super().__init__()
        if len(context.shape) != 1:
            raise DataMismatch(
                f"context {name!r} is {context.kind} of shape {context.shape}; accepted: audio and codes "
                "(T',), vectors (D,)"
            )
        self.ratio, rest = divmod(data.dims, context.dims)
        if rest:
            raise DataMismatch(
                f"context {name!r} has length {context.dims}, which does not divide the data's {data.dims}; give a "
                "context whose length divides it"
            )
        self.embed = TokenInput(context, features)
        self.enter = Pointwise(self.embed.width, features)
        self.upsample = stretch(features, self.ratio, upsampling)

    def forward(self, x: Tensor) -> Float[Tensor, " B features 1 T"]:
        h = self.enter(self.embed(x[:, None, None], self.enter.weight))
        return self.upsample(h)


class WaveNet(RasterModel):
    """Dilated causal convolutions over raw audio or codes, conditional on labels, vectors and sequences."""

    class Config(WaveNetSizes):
        output: Literal["softmax", "logistic_mixture"] = Field(default="softmax", description="p(x_t | …)")
        mixtures: int = Field(default=10, ge=1, description="logistics of output logistic_mixture")
        condition: int = Field(default=128, ge=1, description="features that the conditions become, in sum")
        upsampling: Upsampling = Field(default="transposed", description="of local conditions")
        conditional: bool = Field(default=True, description="use the labels, where the data has classes")

    config: Config
    accepts: ClassVar[tuple[str, ...]] = ("sequence",)
    most_levels: ClassVar[int] = 65_536

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        many = data.kind == "audio" and (data.levels or 0) > SOFTMAX_LEVELS
        optimizer = Optimizer(lr=2e-4, ema=0.9999)
        config = cls.Config(output="logistic_mixture" if many else "softmax")
        return config, Recipe(batch_size=32, steps=1_000_000, optimizers={"model": optimizer})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        sizes = {"channels": 24, "hidden": 24, "skip": 24, "head": 24, "condition": 8, "mixtures": 4}
        config = cls.defaults(data)[0].merged({"stacks": 2, "depth": 4, **sizes})
        return config, Recipe(batch_size=32, steps=150, optimizers={"model": Optimizer(lr=3e-3)})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        levels = data.levels or 0
        self.mixture = OrdinalMixture(levels, config.mixtures) if config.output == "logistic_mixture" else None
        if self.mixture is not None and data.kind == "codes":
            raise DataMismatch("codes have no order, which output logistic_mixture is made for; use output softmax")
        if self.mixture is None and data.kind == "audio" and levels > SOFTMAX_LEVELS:
            raise DataMismatch(
                f"output softmax accepts 2 to {SOFTMAX_LEVELS} levels; this has {levels}. Use output logistic_mixture, "
                f"or prepare mu_law with {SOFTMAX_LEVELS} levels."
            )
        stretched = partial(SequenceMap, data=data, features=config.condition, upsampling=config.upsampling)
        self.conditioner = Conditioner(data, config.condition, 0, labels=config.conditional, spatial=stretched)
        params = levels if self.mixture is None else self.mixture.params
        one_hot = self.mixture is None
        self.network = WaveNetNetwork(config, data, self.conditioner.width, params, one_hot=one_hot)
        if self.mixture is not None:
            with torch.no_grad():
                self.network.out.bias.copy_(self.mixture.first())

    def log_terms(self, grid: Int[Tensor, " B 1 1 T"], logits: Tensor) -> Float[Tensor, " B 1 1 T"]:
        if self.mixture is None:
            return super().log_terms(grid, logits)
        return self.mixture.log_prob(grid, logits).view_as(grid)

    def draw(
        self, logits: Float[Tensor, " n params"], uniform: Float[Tensor, " n"], temperature: float, top_p: float
    ) -> Int[Tensor, " n"]:
        if self.mixture is None:
            return super().draw(logits, uniform, temperature, top_p)
        if top_p < 1:
            raise ValueError(f"top_p {top_p} needs output softmax: a mixture of logistics has no list of levels to cut")
        return self.mixture.draw(logits, uniform, temperature)
