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

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.distributions.ordinal_mixture import OrdinalMixture
from dgm_core.models.autoregressive.base import Conditioner, RasterModel, TokenInput
from dgm_core.nn.causal import Pointwise, shift_right
from dgm_core.nn.dilated import DilatedConv, DilatedStack, Ring, StackMemory
from dgm_core.nn.incremental import TakesPrefix

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SOFTMAX_LEVELS = 256


class SequenceMap(nn.Module):
    """A context (T',) as features of the data's length T: y = f(h) of §2.5."""

    def __init__(self, name: str, context: DataSpec, data: DataSpec, features: int, upsampling: str) -> None:
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
        # Each output lies between two contexts and sees both.
        r = self.ratio
        margin, rest = (0, (r + 1) // 2), (0, r % 2)
        stretch = upsampling == "transposed" and r > 1
        upsample = nn.ConvTranspose2d(features, features, (1, 2 * r), (1, r), margin, rest) if stretch else None
        self.upsample = upsample

    def forward(self, x: Tensor) -> Float[Tensor, " B features 1 T"]:
        h = self.enter(self.embed(x[:, None, None], self.enter.weight))
        return h.repeat_interleave(self.ratio, 3) if self.upsample is None else self.upsample(h)


@dataclass
class Memory:
    x: Int[Tensor, " n 1 1 T"]
    condition: Tensor | None
    enter: Ring
    entering: Float[Tensor, " n channels"]  # room for what `enter` yields
    stack: StackMemory
    nothing: Float[Tensor, " n width"]  # stands before the first sample


class WaveNetNetwork(nn.Module, TakesPrefix):
    def __init__(self, config: WaveNet.Config, data: DataSpec, condition: int, params: int) -> None:
        super().__init__()
        one_hot = config.output == "softmax"
        self.embed = TokenInput(replace(data, kind="codes") if one_hot else data, config.channels)
        self.enter = DilatedConv(self.embed.width, config.channels, config.kernel)
        self.stack = DilatedStack(
            config.channels,
            config.hidden,
            config.skip,
            kernel=config.kernel,
            dilations=[2**i for i in range(config.depth)] * config.stacks,
            condition=condition,
        )
        self.bias = nn.Parameter(torch.zeros(config.skip, 1, 1))  # of the sum of skip connections
        self.hidden = Pointwise(config.skip, config.head)
        self.out = Pointwise(config.head, params)

    def forward(self, x: Int[Tensor, " B 1 1 T"], condition: Tensor | None) -> Float[Tensor, " B 1 1 T params"]:
        h = self.enter(shift_right(self.embed(x, self.out.weight)))
        return self._head(self.stack(h, condition) + self.bias).movedim(1, -1)[:, None]

    def start(self, x: Int[Tensor, " n 1 1 T"], condition: Tensor | None) -> Memory:
        n, like = x.shape[0], self.out.weight
        channels = self.enter.weight.shape[0]
        nothing, entering = like.new_zeros(n, self.embed.width), like.new_empty(n, channels)
        return Memory(x, condition, self.enter.start(n), entering, self.stack.start(n, condition), nothing)

    @torch.no_grad()
    def take_prefix(self, memory: Memory, columns: int) -> None:
        first = max(0, columns - self.stack.past - self.enter.past)  # nothing before it is seen any more
        seen = self.embed(memory.x[..., max(0, first - 1) : columns - 1], self.out.weight)
        seen = seen if first else F.pad(seen, (1, 0))
        memory.enter.fill(seen, columns)
        condition = memory.condition
        if condition is not None and condition.shape[3] > 1:
            condition = condition[..., first:columns]
        self.stack.fill(memory.stack, self.enter(seen), condition, columns)

    def row(self, memory: Memory, r: int) -> None:
        """A sequence has no rows above."""

    def step(self, memory: Memory, r: int, c: int, k: int) -> Float[Tensor, " n params"]:
        previous = self.embed(memory.x[:, :, 0, c - 1], self.out.weight) if c else memory.nothing
        entering = memory.enter.step(previous, c, memory.entering)
        return self._head(self.stack.step(memory.stack, entering, c) + self.bias[:, 0, 0])

    def _head(self, skips: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(F.relu(skips))))


class WaveNet(RasterModel):
    """Dilated causal convolutions over raw audio or codes, conditional on labels, vectors and sequences."""

    class Config(Strict):
        output: Literal["softmax", "logistic_mixture"] = Field(default="softmax", description="p(x_t | …)")
        stacks: int = Field(default=3, ge=1, description="how often the dilations are repeated")
        depth: int = Field(default=10, ge=1, le=16, description="layers a stack, of dilations 1, 2, 4 …")
        kernel: int = Field(default=2, ge=2, description="taps of a convolution")
        channels: int = Field(default=512, ge=1, description="features of the residual path")
        hidden: int = Field(default=256, ge=1, description="gated units of a layer")
        skip: int = Field(default=256, ge=1, description="features of the skip connections")
        head: int = Field(default=256, ge=1, description="features of the 1×1 layer before the output")
        mixtures: int = Field(default=10, ge=1, description="logistics of output logistic_mixture")
        condition: int = Field(default=128, ge=1, description="features that the conditions become, in sum")
        upsampling: Literal["transposed", "repeat"] = Field(default="transposed", description="of local conditions")
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
        self.network = WaveNetNetwork(config, data, self.conditioner.width, params)
        if self.mixture is not None:
            with torch.no_grad():
                self.network.out.bias.copy_(self.mixture.first())

    def log_likelihood(self, grid: Int[Tensor, " B 1 1 T"], logits: Tensor) -> Float[Tensor, " B"]:
        if self.mixture is None:
            return super().log_likelihood(grid, logits)
        return self.mixture.log_prob(grid, logits).flatten(1).sum(1)

    def draw(
        self, logits: Float[Tensor, " n params"], uniform: Float[Tensor, " n"], temperature: float, top_p: float
    ) -> Int[Tensor, " n"]:
        if self.mixture is None:
            return super().draw(logits, uniform, temperature, top_p)
        if top_p < 1:
            raise ValueError(f"top_p {top_p} needs output softmax: a mixture of logistics has no list of levels to cut")
        return self.mixture.draw(logits, uniform, temperature)
