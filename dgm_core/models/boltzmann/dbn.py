"""A Fast Learning Algorithm for Deep Belief Nets. G. Hinton, S. Osindero, Y.-W. Teh, 2006.
doi:10.1162/neco.2006.18.7.1527.
The bound with annealed importance sampling: R. Salakhutdinov, I. Murray, 2008. doi:10.1145/1390156.1390266.

The two top layers are an RBM, below which each layer is generated from the one above:

    p(x, h¹, …, h^{L−1}) = p(x | h¹) ⋯ p(h^{L−2} | h^{L−1}) p(h^{L−1}),   p(h^{L−1}) = exp(−F(h^{L−1})) / Z.

Greedily (section 4): each layer in its own window is an RBM, trained with CD-k on draws from the layers below it, whose
weights stand still and serve both ways. A layer whose upper units are as many as the units below its lower ones starts
from the transposed weights of the layer below, with the biases changed over: the RBM below is then an infinite
directed net with tied weights (section 3, complementary priors), the deeper net the same distribution, and learning
from there raises the bound

    log p(x) ≥ E_q[log p(x | h¹) + … − F(h^{L−1}) − log q(h | x)] − log Z,   q(h | x) = Π_l σ(c^l + h^{l−1} R^l).

Then up–down (section 5 and appendix B), with the recognition weights R untied from the generative W:

    wake   h ~ q(h | x): every W ascends log p(h^{l−1} | h^l)
    top    CD-k from h^{L−1}, in thirds of the window with k = 3, 6, 10
    sleep  a pass down from where the top's chain stands: R and c ascend log q(h^l | h^{l−1})

log p is reported by the bound (importance-weighted above one sample), log Z exactly where one side of the top has at
most 20 units, else by annealed importance sampling. Before the last window opens, the model is the net of the layers
that have been started, so that a likelihood can be followed as layers are added.

Departures: no labels at the top. One optimiser steps all layers; up–down takes `up_down_rate` of its rate. The
    batches are of 100, not of 10, and the windows are shares of training: 30 epochs a layer by default, as in the
    paper, and 40 of up–down, not 300. Data-driven states of the top are draws, as all states are.
Expected: a published 500–2000 net is at or above −86.2 nats by the bound, 0.1 above its RBM (Salakhutdinov & Murray):
    `make results ROW=dbn_mnist`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataSpec, Loss, Turn
from dgm_core.models.boltzmann.base import DeepMachine, HiddenSizes, Layered, two_valued
from dgm_core.nn.rbm import BernoulliLayer, draw_bernoulli
from dgm_core.objectives.contrastive import contrast, run_chain
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


class DBN(DeepMachine):
    """Two players: `layers` has the RBMs, and so the generative weights; `recognition` the untied weights upwards."""

    class Config(Layered):
        hidden: HiddenSizes = Field(default=(500, 500), min_length=2, description="units a layer, from the data up")
        greedy: float = Field(
            default=0.6, gt=0, lt=1, description="share of training in which layers are added; the rest is up–down"
        )
        gibbs: int = Field(default=1, ge=1, description="k of CD-k while layers are added")
        top_gibbs: tuple[Annotated[int, Field(ge=1)], ...] = Field(
            default=(3, 6, 10), min_length=1, description="k at the top in equal parts of up–down"
        )
        up_down_rate: float = Field(
            default=0.1, gt=0, description="what up–down's gradient is multiplied by: the slower learning rate"
        )

    config: Config
    depth: Tensor

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        # 30 epochs a layer and 40 of up–down over 50,000 examples
        return cls.Config(hidden=(500, 500) if data.dims >= 784 else (64, 16)), _recipe(0.1, 100, 50_000)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(hidden=(8, 6), gibbs=5, initial_scale=0.1, up_down_rate=0.3)
        return config, _recipe(min(0.5, 4 / data.dims), 64, 400)

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, config.hidden, data)
        self.top = len(config.hidden) - 1
        self.up = nn.ParameterList(self.layer(level).weight.detach().clone() for level in range(self.top))
        self.register_buffer("depth", torch.zeros((), dtype=torch.int64))  # layers started so far
        for level, size in enumerate(self.sizes[:-1]):
            self.register_buffer(f"mean{level}", torch.full((size,), 0.5))

    # Learning.

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"layers": list(self.layers.parameters()), "recognition": list(self.up)}

    def turns(self) -> Sequence[Turn]:
        edges = [self.config.greedy * (level / len(self.layers)) for level in range(len(self.layers) + 1)]
        greedy = [
            Turn(f"layer{level + 1}", ("layers",), window=(edges[level], edges[level + 1]))
            for level in range(len(self.layers))
        ]
        return [*greedy, Turn("up_down", ("layers", "recognition"), window=(self.config.greedy, 1.0))]

    @torch.no_grad()
    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        """Start the layers up to the turn's; a window may be too short to have had a round of its own."""
        before, now = int(self.depth), self.top + 1 if turn == "up_down" else self._level(turn) + 1
        if now <= before:
            return
        for level in range(max(before, 1), now):
            self._tie(level)
        means = self.batch_means(batches, now)
        for level in range(before, now):
            self._mean(level).copy_(means[level])
            if level == 0 or self.sizes[level + 1] != self.sizes[level - 1]:
                self.layer(level).reset(means[level], 0.5, centred=False)
        self.depth.fill_(now)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        v = self.visible(batch.x)
        if turn == "up_down":
            return self._up_down(v, clock)
        level = self._level(turn)
        h = self.recognise(v, level)[-1]
        return self._contrast(level, h, run_chain(self.layer(level).gibbs, h, self.config.gibbs))

    def _up_down(self, v: Float[Tensor, " B v"], clock: Clock) -> Loss:
        wake = self.recognise(v, self.top)
        fantasy = run_chain(self.layer(self.top).gibbs, wake[-1], self.top_steps(clock))
        dream = self.generate(fantasy, self.top)
        top = self._contrast(self.top, wake[-1], fantasy)
        ascent = top.value.new_zeros(())
        for level in range(self.top):
            ascent = ascent + self.log_p(level, wake[level], wake[level + 1]).mean()
            ascent = ascent + self.log_q(level, dream[level], dream[level + 1]).mean()
        return Loss(self.config.up_down_rate * (top.value - ascent), top.metrics)

    def top_steps(self, clock: Clock) -> int:
        """k at this point of up–down."""
        steps, start = self.config.top_gibbs, self.config.greedy
        part = int((clock.progress - start) / (1 - start) * len(steps))
        return steps[min(max(part, 0), len(steps) - 1)]

    def _contrast(self, level: int, data: Float[Tensor, " B n"], chain: Float[Tensor, " B n"]) -> Loss:
        layer = self.layer(level)
        positive = layer.free_energy(data)
        return Loss(contrast(positive, layer.free_energy(chain)), {"free_energy": positive.detach().mean()})

    def _tie(self, level: int) -> None:
        """Fix the layer below this one, and start this one from it where the sizes allow."""
        below, layer = self.layer(level - 1), self.layer(level)
        self.up[level - 1].copy_(below.weight)
        if self.sizes[level + 1] == self.sizes[level - 1]:
            layer.weight.copy_(below.weight.T)
            layer.visible_bias.copy_(below.hidden_bias)
            layer.hidden_bias.copy_(below.visible_bias)

    # Both ways through the layers.

    def log_p(self, level: int, below: Float[Tensor, " B n"], above: Float[Tensor, " B m"]) -> Float[Tensor, " B"]:
        """log p(h^level | h^{level + 1})."""
        return two_valued(below, self.layer(level).visible_input(above))

    def log_q(self, level: int, below: Float[Tensor, " B n"], above: Float[Tensor, " B m"]) -> Float[Tensor, " B"]:
        """log q(h^{level + 1} | h^level)."""
        return two_valued(above, self._upward(level, below))

    @torch.no_grad()
    def recognise(self, v: Float[Tensor, " B v"], levels: int) -> list[Float[Tensor, " B n"]]:
        """x and draws of h¹, …, h^levels from the bottom up."""
        states = [v]
        for level in range(levels):
            states.append(draw_bernoulli(self._upward(level, states[-1])))
        return states

    @torch.no_grad()
    def generate(self, state: Float[Tensor, " B n"], levels: int) -> list[Float[Tensor, " B m"]]:
        """x, h¹, …, h^levels from the top down, given the last."""
        states = [state]
        for level in reversed(range(levels)):
            states.insert(0, draw_bernoulli(self.layer(level).visible_input(states[0])))
        return states

    def activities(self, v: Float[Tensor, " B v"], levels: int) -> list[Float[Tensor, " B n"]]:
        states = [v]
        for level in range(levels - 1):
            states.append(torch.sigmoid(self._upward(level, states[-1])))
        return states

    def _upward(self, level: int, below: Float[Tensor, " B n"]) -> Float[Tensor, " B m"]:
        """The recognition net's input: its bias is the layer's hidden bias, for which the directed net has no use."""
        return torch.addmm(self.layer(level).hidden_bias, below, self.up[level])

    # Likelihood and sampling, of the layers started so far.

    @property
    def machine(self) -> BernoulliLayer:
        return self.layer(self._stacked)

    @property
    def machine_mean(self) -> Float[Tensor, " v"]:
        return self._mean(self._stacked)

    @property
    def _stacked(self) -> int:
        """The level of the RBM on top."""
        return max(int(self.depth) - 1, 0)

    def bound(self, v: Float[Tensor, " B v"]) -> Float[Tensor, " B"]:
        """One draw of q."""
        states = self.recognise(v, self._stacked)
        total = -promote(self.machine.free_energy(states[-1]))
        for level in range(self._stacked):
            below, above = states[level], states[level + 1]
            total = total + self.log_p(level, below, above) - self.log_q(level, below, above)
        return total

    def log_weights(self, v: Float[Tensor, " B v"], count: int) -> Float[Tensor, " B count"]:
        return self.bound(v.repeat_interleave(count, 0)).view(-1, count)

    @torch.no_grad()
    def sample(
        self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, burn_in: int = 1000
    ) -> Tensor:
        """`burn_in` Gibbs steps at the top, from independent units with the data's means, then one pass down."""
        state = run_chain(self.machine.gibbs, self.draw_base(n), burn_in)
        return self.stored(self.shown(state))

    def machine_state(self, v: Float[Tensor, " B v"]) -> Float[Tensor, " B n"]:
        """One pass up."""
        return self.recognise(v, self._stacked)[-1]

    def shown(self, state: Float[Tensor, " B n"]) -> Float[Tensor, " B v"]:
        """One pass down."""
        return self.generate(state, self._stacked)[0]

    def _mean(self, level: int) -> Float[Tensor, " n"]:
        return self.get_buffer(f"mean{level}")

    def _level(self, turn: str) -> int:
        return int(turn.removeprefix("layer")) - 1


def _recipe(lr: float, batch_size: int, steps: int) -> Recipe:
    # fp32: two free energies of hundreds of nats are subtracted, and the products are too small for bf16 to pay.
    sgd = Optimizer(algorithm="sgd", lr=lr)
    return Recipe(batch_size=batch_size, steps=steps, optimizers={"layers": sgd, "recognition": sgd}, precision="fp32")
