"""MADE: Masked Autoencoder for Distribution Estimation. M. Germain, K. Gregor, I. Murray, H. Larochelle, 2015.
arXiv:1502.03509.

p(x) = Π_d p(x_d | x_<d), all conditionals by one pass of a perceptron whose weights are masked,

    h = relu(b + (W ⊙ M^W) x),      logits = c + (V ⊙ M^V) h + (A ⊙ M^A) x,

so that hidden unit k sees coordinates up to its degree m(k) and the output of a coordinate sees units of degree below
it; deep networks likewise. A sigmoid for two levels, a softmax for more. Coordinates come in raster order, channels
innermost. A is optional, as are random degrees.

`masks` > 1 trains connectivity-agnostically, `orders` > 1 order-agnostically, as the paper's sections of these names:
each step takes the next of so many sets of degrees and drawn orders. What is then modelled is the even mixture of all
of them, p(x) = 1/(O M) Σ_o Σ_m p_{o, m}(x): an average of probabilities of whole examples, which is normalised, not of
conditionals in different orders, which would not be. `log_prob` is its logarithm. With one order its conditionals are
those of the mixture, and samples and completions come coordinate by coordinate from them; with several, each sample
takes one order, and completions are refused.

Departures: degrees ascend evenly by default (the paper draws them). Intensities are scaled to [−1, 1]; more than two
levels are this library's, as are codes, by learnt embeddings, and labels and contexts, which enter the first layer as a
vector. The output layer starts at zero, the others as torch's linear layers do. Where a layer has fewer units than
there are coordinates, inputs are connected to outputs as well, lest a coordinate be unseen.
Expected: 88.40 nats on statically binarised MNIST in the paper (one mask, one layer); 84.9 on dynamically binarised
MNIST in a public implementation, after 85 epochs. Not run here: `make results ROW=made_mnist`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, Loss
from dgm_core.models.autoregressive.base import Conditioner, RasterModel
from dgm_core.nn import masked
from dgm_core.nn.agnostic import AgnosticMADE
from dgm_core.nn.causal import Pointwise
from dgm_core.nn.tokens import TokenInput, grid_shape
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class FlatContext(nn.Module):
    """A grid or sequence of context as one vector: (B, features, 1, 1)."""

    def __init__(self, context: DataSpec, features: int) -> None:
        super().__init__()
        self.embed = TokenInput(context, features)
        width = features if self.embed.codes is not None else 1
        self.mix = Pointwise(context.dims * width, features)

    def forward(self, x: Tensor) -> Float[Tensor, " B features 1 1"]:
        x = x if x.ndim == 4 else x[:, None]
        return self.mix(self.embed(x, self.mix.weight).flatten(1))[:, :, None, None]


@dataclass
class Memory:
    x: Int[Tensor, " n C H W"]
    unrolled: list[Any]  # one a set of degrees
    log_weights: Float[Tensor, " masks n"]  # of each set, given what is drawn, up to a constant
    said: Tensor = field(default_factory=lambda: torch.empty(0))  # by each set, of the last coordinate


class MADENetwork(nn.Module):
    """Conditionals of the even mixture over the sets of degrees, in one order; its index is `order`."""

    def __init__(self, config: MADE.Config, data: DataSpec, condition: int) -> None:
        super().__init__()
        self.shape, self.levels = grid_shape(data), data.levels or 0
        self.masks, self.condition = config.masks, condition
        self.embed = TokenInput(data, config.code_features)
        width = self.embed.width if self.embed.codes is not None else 1
        outputs = 1 if self.levels == 2 else self.levels
        fixed = width == config.orders == config.masks == 1 and config.degrees == "sequential"
        if fixed and data.dims > 1:
            self.core = masked.MADE(
                data.dims, outputs, features=config.hidden, hidden=config.depth, context=condition, direct=config.direct
            )
        else:
            self.core = AgnosticMADE(
                data.dims,
                outputs,
                features=config.hidden,
                hidden=config.depth,
                width=width,
                context=condition,
                direct=config.direct or config.hidden < data.dims,
                orders=config.orders,
                masks=config.masks,
                random=config.degrees == "random",
            )

    def forward(
        self, x: Int[Tensor, " B C H W"], condition: Tensor | None, order: int = 0
    ) -> Float[Tensor, " B C H W levels"]:
        said = [self.conditionals(x, condition, order, mask) for mask in range(self.masks)]
        return self._on_grid(said[0] if self.masks == 1 else self._mixed(torch.stack(said), x, order))

    def one_of_many(self, x: Tensor, condition: Tensor | None, order: int, mask: int) -> Tensor:
        """What one set of degrees says."""
        return self._on_grid(self.conditionals(x, condition, order, mask))

    def conditionals(self, x: Tensor, condition: Tensor | None, order: int, mask: int) -> Float[Tensor, " B D levels"]:
        """Logits of every coordinate, channels innermost."""
        inputs = self.embed(x, next(self.core.parameters())).movedim(1, -1).flatten(1)
        condition = self._vector(len(x), condition)
        if isinstance(self.core, masked.MADE):
            said = self.core(inputs, condition).unflatten(1, (self.core.outputs, -1)).transpose(1, 2)
        else:
            said = self.core(inputs, condition, order=order, mask=mask)
        return self._logits(said)

    def start(self, x: Int[Tensor, " n C H W"], condition: Tensor | None, order: int = 0) -> Memory:
        """`x` holds the coordinates in the order, raster order its own."""
        n = len(x)
        condition = self._vector(n, condition)
        if isinstance(self.core, masked.MADE):
            unrolled = [self.core.unroll(n, condition)]
        else:
            unrolled = [self.core.unroll(n, condition, order=order, mask=mask) for mask in range(self.masks)]
        return Memory(x, unrolled, next(self.core.parameters()).new_zeros(self.masks, n))

    def row(self, memory: Memory, r: int) -> None:
        """Nothing is by rows."""

    def step(self, memory: Memory, r: int, c: int, k: int) -> Float[Tensor, " n levels"]:
        _, channels, _, width = memory.x.shape
        t = (r * width + c) * channels + k
        if t:
            self._tell(memory, t - 1)
        said = [self._logits(unrolled.step()) for unrolled in memory.unrolled]
        if self.masks == 1:
            return said[0]
        memory.said = torch.stack(said).log_softmax(-1)
        return (memory.log_weights.log_softmax(0)[..., None] + memory.said).logsumexp(0)

    def _vector(self, n: int, condition: Tensor | None) -> Tensor | None:
        """The condition (n, features), zero if there should be one and is not."""
        if not self.condition:
            return None
        return next(self.parameters()).new_zeros(n, self.condition) if condition is None else condition.flatten(1)

    def _tell(self, memory: Memory, t: int) -> None:
        _, channels, _, width = memory.x.shape
        at, k = divmod(t, channels)
        value = memory.x[:, k, at // width, at % width]
        if self.masks > 1:
            memory.log_weights += memory.said.gather(2, value.expand(self.masks, -1)[..., None])[..., 0]
        told = self.embed(value[:, None, None], memory.log_weights).flatten(1)
        for unrolled in memory.unrolled:
            unrolled.put(told[:, 0] if isinstance(self.core, masked.MADE) else told)

    def _mixed(self, said: Float[Tensor, " M B D levels"], x: Tensor, order: int) -> Float[Tensor, " B D levels"]:
        """log Σ_m p(m | x_<d) p_m(x_d | x_<d), with p(m | x_<d) ∝ p_m(x_<d)."""
        assert isinstance(self.core, AgnosticMADE)
        said = promote(said).log_softmax(-1)
        values = x.movedim(1, -1).flatten(1).expand(self.masks, -1, -1)
        drawn = said.gather(3, values[..., None])[..., 0]
        ordered = drawn[..., self.core.orders[order]]
        before = (ordered.cumsum(-1) - ordered)[..., self.core.orders[order].argsort()]
        return (before.log_softmax(0)[..., None] + said).logsumexp(0)

    def _logits(self, said: Float[Tensor, " *n outputs"]) -> Float[Tensor, " *n levels"]:
        """Of two levels the second's log-odds are said."""
        return F.pad(said, (1, 0)) if self.levels == 2 else said

    def _on_grid(self, logits: Float[Tensor, " B D levels"]) -> Float[Tensor, " B C H W levels"]:
        channels, height, width = self.shape
        return logits.unflatten(1, (height, width, channels)).movedim(3, 1)


class InOrder:
    """A network that says its coordinates in one of its orders."""

    def __init__(self, network: MADENetwork, order: int) -> None:
        self.network, self.order = network, order
        self.row, self.step = network.row, network.step

    def start(self, x: Tensor, condition: Tensor | None) -> Memory:
        return self.network.start(x, condition, self.order)


class MADE(RasterModel):
    """A masked perceptron, over anything of integers; with several masks or orders, the mixture of all of them."""

    accepts = ("grid", "sequence", "vector")

    class Config(Strict):
        hidden: int = Field(default=8000, ge=1, description="units of a hidden layer")
        depth: int = Field(default=1, ge=1, description="hidden layers")
        degrees: Literal["sequential", "random"] = Field(default="sequential", description="ascending evenly, or drawn")
        masks: int = Field(default=1, ge=1, description="sets of degrees, drawn if more than one")
        orders: int = Field(default=1, ge=1, description="1: raster order; else so many orders are drawn")
        direct: bool = Field(default=False, description="connect inputs to outputs as well")
        code_features: int = Field(default=16, ge=1, description="features of an embedded code")
        condition: int = Field(default=64, ge=1, description="features of the vector made of labels and contexts")
        conditional: bool = Field(default=False, description="use the labels, where the data has classes")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        # The paper's networks: of MNIST, and of its other data sets. More levels widen the last layer as many times.
        config = cls.Config() if data.kind == "image" and data.levels == 2 else cls.Config(hidden=500)
        optimizer = Optimizer(algorithm="adagrad", lr=0.01, eps=1e-6)
        return config, Recipe(batch_size=100, steps=50_000, optimizers={"model": optimizer})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(hidden=128, code_features=4, condition=8, conditional=True)
        return config, Recipe(batch_size=32, steps=150, optimizers={"model": Optimizer(lr=3e-3)})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        self.conditioner = Conditioner(
            data,
            config.condition,
            0,
            labels=config.conditional,
            spatial=lambda _, context: FlatContext(context, config.condition),
        )
        self.network = MADENetwork(config, data, self.conditioner.width)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        """One member of the mixture after the other."""
        orders, masks = self.config.orders, self.config.masks
        if orders == masks == 1:
            return super().loss(batch, turn, clock)
        grid = self._grid(batch.x)
        condition = self.conditioner(len(grid), batch.y, batch.context)
        said = self.network.one_of_many(grid, condition, clock.step % orders, clock.step // orders % masks)
        nll = -self.log_likelihood(grid, said).mean()
        return Loss(nll, {"bits_per_dim": nll.detach() / (self.data.dims * math.log(2))})

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """Nats, exact, of the mixture over all orders and masks; `samples` is not needed."""
        grid = self._grid(x)
        condition = self.conditioner(len(grid), y, context)
        orders = range(self.config.orders)
        each = [self.log_likelihood(grid, self.network(grid, condition, order)) for order in orders]
        return torch.stack(each).logsumexp(0) - math.log(len(orders))

    def log_conditionals(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B C H W"]:
        if self.config.orders > 1:
            raise DataMismatch(
                f"this model is a mixture over {self.config.orders} orders, so that no coordinates come before another "
                "for good; train one with orders=1"
            )
        return super().log_conditionals(x, y, context)

    def complete(
        self,
        x: Tensor,
        observed: Tensor,
        y: Tensor | None = None,
        context: Mapping[str, Tensor] = {},
        **options: Any,
    ) -> Tensor:
        if self.config.orders > 1:
            raise DataMismatch(
                f"this model is a mixture over {self.config.orders} orders, in most of which what is observed does not "
                "come first, so that it cannot complete an example; train one with orders=1"
            )
        return super().complete(x, observed, y, context, **options)

    def _draw(
        self,
        canvas: Int[Tensor, " n C H W"],
        observed: Tensor | None,
        y: Tensor | None,
        context: Mapping[str, Tensor],
        temperature: float,
        top_p: float,
        network: Any = None,
    ) -> Int[Tensor, " n *shape"]:
        if self.config.orders == 1:
            return super()._draw(canvas, observed, y, context, temperature, top_p, network)
        assert isinstance(self.network.core, AgnosticMADE)
        n, channels, height, width = canvas.shape
        y = self.labels_for(n, y) if self.conditioner.label is not None else None
        taken = torch.randint(self.config.orders, (n,), device=self.device)
        drawn = canvas.new_zeros(n, self.data.dims)  # channels innermost
        for order, coordinates in enumerate(self.network.core.orders):
            rows = (taken == order).nonzero()[:, 0]
            labels, given = (
                None if y is None else y[rows],
                {name: c.to(self.device)[rows] for name, c in context.items()},
            )
            part = super()._draw(
                canvas[rows], None, labels, given, temperature, top_p, InOrder(self.network, order)
            )  # in that order, so at other places than its own
            part = part.long().view(-1, channels, height, width).movedim(1, -1).flatten(1)
            drawn[rows[:, None], coordinates] = part
        drawn = drawn.unflatten(1, (height, width, channels)).movedim(3, 1)
        return drawn.reshape(n, *self.data.shape).to(self.data.dtype)
