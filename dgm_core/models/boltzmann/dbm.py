"""Deep Boltzmann Machines. R. Salakhutdinov, G. Hinton, 2009. AISTATS, PMLR 5:448–455.
The longer account: R. Salakhutdinov, G. Hinton, An Efficient Learning Procedure for Deep Boltzmann Machines, Neural
Computation 24(8), 2012. Annealing: R. Salakhutdinov, I. Murray, ICML 2008.

Two or three hidden layers over h⁰ = x, every weight undirected:

    p(x, h¹, …, h^L) = exp(−E) / Z,   E = −Σ_l h^l·b^l − Σ_l h^l W^l h^{l+1},
    p(h^l = 1 | the rest) = σ(b^l + h^{l−1} W^{l−1} + W^l h^{l+1}).

Even layers are independent given the odd ones and the other way round: Gibbs sampling draws these two halves in turn,
and the whole is one bipartite layer, over which log Z is enumerated or annealed.

Pre-training (section 3.1): the layers are RBMs, one after the other in their windows, trained by CD-k. So that their
inputs add up to a unit's of the whole machine, the lowest has two copies of its visible units with tied weights, the
highest two copies of its hidden units, any between doubled weights:

    lowest   p(h¹ | x) = σ(c + 2 x W⁰),      p(x | h¹) = σ(b + W⁰ h¹)
    highest  p(h^L | h^{L−1}) = σ(c + h^{L−1} W),   p(h^{L−1} | h^L) = σ(b + 2 W h^L)

A layer between two has half of what both RBMs say, the average of their inputs: b^l = (c^{l−1} + b^l) / 2.

Jointly (section 2.2): q(h) = Π μ_i^{h_i} (1 − μ_i)^{1 − h_i} maximises the bound

    log p(x) ≥ −E(x, μ) + H(q) − log Z,   μ^l ← σ(b^l + μ^{l−1} W^{l−1} + W^l μ^{l+1}),

even layers and odd ones in turn from one pass up with doubled weights, and a play descends mean E(x, μ) − mean
E(x̃, h̃) with μ and the states of persistent chains held fixed. Odd layers of a chain enter by their means given the
even ones: the same expectation with less noise.

Departures: in a pre-training chain the two copies are drawn separately, as that RBM has it; the authors' programs use
    one draw twice. A bias between two layers is the mean of two parameters, so that it moves at half the rate. Joint
    learning takes `joint_rate` of the optimiser's rate, which falls to zero over the run. No sparsity target and
    no labels.
Expected: at or above −84.6 nats by the bound with 500–1000 units after 500 epochs (the paper), −86.4 by a published
    re-implementation; with 200–200 units within 15 minutes: `make results ROW=dbm_mnist`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dgm_core.capabilities import HasCompletion
from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataSpec, Loss, Turn
from dgm_core.models.boltzmann.base import DeepMachine, HiddenSizes, Layered, chains_held, same, two_valued
from dgm_core.models.boltzmann.doubled import DoubledRBM
from dgm_core.nn.rbm import BernoulliLayer, draw_bernoulli
from dgm_core.objectives.contrastive import contrast, run_chain
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

SWEEPS, TOLERANCE = 100, 1e-6  # of the mean field that bounds a likelihood


class DBM(DeepMachine, HasCompletion):
    """Bernoulli units throughout."""

    class Config(Layered):
        hidden: HiddenSizes = Field(
            default=(500, 1000), min_length=2, max_length=3, description="units a layer, from the data up"
        )
        pretraining: float = Field(default=0.4, gt=0, lt=1, description="share of training, the same for each layer")
        pretraining_gibbs: int = Field(default=1, ge=1, description="k of CD-k in pre-training")
        gibbs: int = Field(default=5, ge=1, description="steps of the persistent chains a play")
        chains: int = Field(default=100, ge=1, description="persistent chains, over all workers")
        updates: int = Field(default=10, ge=1, description="mean-field updates of every layer, at most")
        tolerance: float = Field(
            default=0.0, ge=0, description="an example's updates end when no mean moves by more; 0: all are made"
        )
        joint_rate: float = Field(
            default=0.1, gt=0, description="what the joint gradient is multiplied by: the slower learning rate"
        )

    config: Config
    chains = frozenset({"particles"})
    particles: Tensor
    base_mean: Tensor

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        # 20 epochs a layer and 60 of all, over 50,000 examples
        return cls.Config(hidden=(500, 1000) if data.dims >= 784 else (16, 16)), _recipe(0.05, 100, 50_000)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        # Little pre-training: the chains must grow up with the weights to get the shares of the modes right.
        config = cls.Config(hidden=(8, 4), chains=10, updates=5, pretraining=0.1, joint_rate=0.5)
        return config, _recipe(min(0.5, 2 / data.dims), 64, 400)

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, config.hidden, data)
        self.even, self.odd = list(self.sizes[::2]), list(self.sizes[1::2])
        self.register_buffer("base_mean", torch.full((sum(self.even),), 0.5))
        self._machine: tuple[list[Tensor], BernoulliLayer] | None = None
        self.register_buffer("particles", draw_bernoulli(torch.zeros(chains_held(config.chains), sum(self.even))))

    # Learning.

    def turns(self) -> Sequence[Turn]:
        edges = [self.config.pretraining * (level / len(self.layers)) for level in range(len(self.layers) + 1)]
        layers = [
            Turn(f"layer{level + 1}", ("model",), window=(edges[level], edges[level + 1]))
            for level in range(len(self.layers))
        ]
        return [*layers, Turn("joint", ("model",), window=(self.config.pretraining, 1.0))]

    @torch.no_grad()
    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        """A layer starts from the means of its lower units, the chains from those of the even layers."""
        if turn != "joint":
            level = self._level(turn)
            self.layer(level).reset(self.batch_means(batches, level + 1)[level], 0.5, centred=False)
            return
        means = self.batch_means(batches, len(self.sizes))
        self.base_mean.copy_(torch.cat(means[::2]))
        self.particles.copy_(self.draw_base(len(self.particles)))
        self._step_chains()

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        v = self.visible(batch.x)
        if turn != "joint":
            return self._pretraining(v, self._level(turn))
        positive = self.energy([v, *self.mean_field(v, self.config.updates, self.config.tolerance)])
        with torch.no_grad():
            chains = list(self.particles.split(self.even, 1))
            means = [torch.sigmoid(z) for z in self._odd_inputs(chains)]
        negative = self.energy(self._interleave(chains, means))
        return Loss(self.config.joint_rate * contrast(positive, negative), {"energy": positive.detach().mean()})

    @torch.no_grad()
    def after(self, turn: str, clock: Clock) -> None:
        if self.training and turn == "joint":
            self._step_chains()

    def _step_chains(self) -> None:
        # Between plays, not in `loss`: once a play however many microbatches it has, at the parameters of the next.
        self.particles.copy_(run_chain(self.gibbs, self.particles, self.config.gibbs))

    # Pre-training.

    def doubled(self, level: int) -> DoubledRBM:
        """The RBM that trains a layer before the whole is learnt."""
        return DoubledRBM.of(self.layer(level), level, len(self.layers))

    def _pretraining(self, v: Float[Tensor, " B v"], level: int) -> Loss:
        rbm, h = self.doubled(level), v
        with torch.no_grad():
            for below in range(level):
                h = draw_bernoulli(self.doubled(below).recognise(h))
        data = rbm.below * h
        positive = rbm.free_energy(data)
        chain = run_chain(rbm.gibbs, data, self.config.pretraining_gibbs)
        value = contrast(positive, rbm.free_energy(chain))
        return Loss(value, {"free_energy": positive.detach().mean()})

    @torch.no_grad()
    def activities(self, v: Float[Tensor, " B v"], levels: int) -> list[Float[Tensor, " B n"]]:
        states = [v]
        for level in range(levels - 1):
            states.append(torch.sigmoid(self.doubled(level).recognise(states[-1])))
        return states

    # The whole machine.

    def bias(self, level: int) -> Float[Tensor, " n"]:
        """b of a layer of units."""
        if level == 0:
            return self.layer(0).visible_bias
        below = self.layer(level - 1).hidden_bias
        return below if level == len(self.layers) else (below + self.layer(level).visible_bias) / 2

    def energy(self, states: Sequence[Float[Tensor, " B n"]]) -> Float[Tensor, " B"]:
        """E(x, h¹, …, h^L), linear in each layer's states, or means."""
        total = states[0].new_zeros((), dtype=promote(states[0]).dtype)
        for level, state in enumerate(states):
            field = self.bias(level)
            if level < len(self.layers):
                field = field + promote(states[level + 1] @ self.layer(level).weight.T)
            total = total - (state * field).sum(1)
        return total

    def field(self, level: int, states: Mapping[int, Float[Tensor, " B n"]]) -> Float[Tensor, " B m"]:
        """A layer's input from the layers beside it."""
        z = self.bias(level).expand(len(next(iter(states.values()))), -1)
        if level > 0:
            z = torch.addmm(z, states[level - 1], self.layer(level - 1).weight)
        if level < len(self.layers):
            z = torch.addmm(z, states[level + 1], self.layer(level).weight.T)
        return z

    def _odd_inputs(self, even: Sequence[Float[Tensor, " B n"]]) -> list[Float[Tensor, " B m"]]:
        known = {2 * i: state for i, state in enumerate(even)}
        return [self.field(level, known) for level in range(1, len(self.sizes), 2)]

    def _even_inputs(self, odd: Sequence[Float[Tensor, " B n"]]) -> list[Float[Tensor, " B m"]]:
        known = {2 * i + 1: state for i, state in enumerate(odd)}
        return [self.field(level, known) for level in range(0, len(self.sizes), 2)]

    def _interleave(self, even: Sequence[Tensor], odd: Sequence[Tensor]) -> list[Tensor]:
        return [(odd if level % 2 else even)[level // 2] for level in range(len(self.sizes))]

    @torch.no_grad()
    def gibbs(self, even: Float[Tensor, " B even"]) -> Float[Tensor, " B even"]:
        """Odd layers given the even ones, then these given those: reversible with respect to p(even layers)."""
        odd = [draw_bernoulli(z) for z in self._odd_inputs(even.split(self.even, 1))]
        return torch.cat([draw_bernoulli(z) for z in self._even_inputs(odd)], 1)

    @torch.no_grad()
    def mean_field(self, v: Float[Tensor, " B v"], updates: int, tolerance: float) -> list[Float[Tensor, " B n"]]:
        """μ¹, …, μ^L; an example stands still once no mean of it moves by more than the tolerance, if that is not 0."""
        top = len(self.layers)
        driven = torch.addmm(self.bias(1), v, self.layer(0).weight)
        mu = [v, torch.sigmoid(2 * driven - self.bias(1))]
        for level in range(2, top + 1):
            doubled = 2.0 if level < top else 1.0
            mu.append(torch.sigmoid(torch.addmm(self.bias(level), mu[-1], self.layer(level - 1).weight, alpha=doubled)))
        moving = torch.ones(len(v), 1, dtype=torch.bool, device=v.device)
        for _ in range(updates):
            new = list(mu)
            for level in [*range(1, top + 1, 2), *range(2, top + 1, 2)]:
                if level == 1:
                    z = torch.addmm(driven, new[2], self.layer(1).weight.T)
                else:
                    z = self.field(level, dict(enumerate(new)))
                new[level] = torch.sigmoid(z)
            if tolerance > 0:
                moved = torch.cat([(a - b).abs() for a, b in zip(new[1:], mu[1:], strict=True)], 1)
                mu = [torch.where(moving, a, b) for a, b in zip(new, mu, strict=True)]
                moving = moving & (moved.amax(1, keepdim=True) > tolerance)
                if v.device.type != "meta" and not moving.any():
                    break
            else:
                mu = new
        return mu[1:]

    # Likelihood.

    @property
    def machine(self) -> BernoulliLayer:
        """Even layers on one side, odd ones on the other."""
        # Compared by value: an average of the parameters may be swapped in, which no version counter notices.
        now = [p.detach() for p in self.layers.parameters()]
        if self._machine is None or not same(self._machine[0], now):
            self._machine = [t.clone() for t in now], self._assembled()
        return self._machine[1]

    @torch.no_grad()
    def _assembled(self) -> BernoulliLayer:
        rows = []
        for level in range(0, len(self.sizes), 2):
            blocks = [torch.zeros(self.sizes[level], n, device=self.device, dtype=self.dtype) for n in self.odd]
            if level > 0:
                blocks[level // 2 - 1] = self.layer(level - 1).weight.T
            if level < len(self.layers):
                blocks[level // 2] = self.layer(level).weight
            rows.append(torch.cat(blocks, 1))
        with torch.device("meta"):
            machine = BernoulliLayer(sum(self.even), sum(self.odd), 1.0)
        machine = machine.to_empty(device=self.device).to(self.dtype).requires_grad_(False)
        machine.weight.copy_(torch.cat(rows))
        machine.visible_bias.copy_(torch.cat([self.bias(level) for level in range(0, len(self.sizes), 2)]))
        machine.hidden_bias.copy_(torch.cat([self.bias(level) for level in range(1, len(self.sizes), 2)]))
        machine.visible_offset.zero_()
        machine.hidden_offset.zero_()
        return machine

    @property
    def machine_mean(self) -> Float[Tensor, " v"]:
        return self.base_mean

    def bound(self, v: Float[Tensor, " B v"]) -> Float[Tensor, " B"]:
        """−E(x, μ) + H(q), with nothing drawn."""
        means = self.mean_field(v, SWEEPS, TOLERANCE)
        entropy = [(torch.special.entr(promote(m)) + torch.special.entr(1 - promote(m))).sum(1) for m in means]
        return torch.stack(entropy).sum(0) - self.energy([v, *means])

    def log_weights(self, v: Float[Tensor, " B v"], count: int) -> Float[Tensor, " B count"]:
        """Odd layers drawn from the mean field, even hidden ones summed out."""
        logits = [torch.logit(m, 1e-6) for m in self.mean_field(v, SWEEPS, TOLERANCE)[::2]]
        logits = [z.repeat_interleave(count, 0) for z in logits]
        odd = [draw_bernoulli(z) for z in logits]
        seen, *hidden = self._even_inputs(odd)
        total = (v.repeat_interleave(count, 0) * promote(seen)).sum(1)
        for z in hidden:
            total = total + F.softplus(promote(z)).sum(1)
        for i, (h, z) in enumerate(zip(odd, logits, strict=True)):
            total = total + promote(h @ self.bias(2 * i + 1)) - two_valued(h, z)
        return total.view(-1, count)

    # Sampling.

    @torch.no_grad()
    def sample(
        self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, burn_in: int = 1000
    ) -> Tensor:
        """`n` chains' states after `burn_in` Gibbs steps from the particles, taken in turn, which stay where they
        are."""
        start = self.particles[torch.arange(n, device=self.device) % len(self.particles)]
        return self.stored(run_chain(self.gibbs, start, burn_in)[:, : self.data.dims])

    def machine_state(self, v: Float[Tensor, " B v"]) -> Float[Tensor, " B even"]:
        """Even layers, the hidden ones drawn from the mean field."""
        return torch.cat([v, *(torch.bernoulli(m) for m in self.mean_field(v, SWEEPS, TOLERANCE)[1::2])], 1)

    @torch.no_grad()
    def complete(
        self,
        x: Tensor,
        observed: Tensor,
        y: Tensor | None = None,
        context: Mapping[str, Tensor] = {},
        *,
        burn_in: int = 1000,
    ) -> Tensor:
        """Gibbs steps with the observed coordinates clamped, from the base model's draw of the others."""
        v, known = self.visible(x), observed.to(self.device, torch.bool).expand(x.shape).flatten(1)
        rest = sum(self.even[1:])
        v, known = F.pad(v, (0, rest)), F.pad(known, (0, rest))

        def clamp(free: Tensor) -> Tensor:
            return torch.where(known, v, free)

        state = run_chain(lambda even: clamp(self.gibbs(even)), clamp(self.draw_base(len(v))), burn_in)
        return self.stored(state[:, : self.data.dims])

    def _level(self, turn: str) -> int:
        return int(turn.removeprefix("layer")) - 1


def _recipe(lr: float, batch_size: int, steps: int) -> Recipe:
    # fp32: energies of hundreds of nats are subtracted, and the products are too small for bf16 to pay.
    sgd = Optimizer(algorithm="sgd", lr=lr, schedule="linear")
    return Recipe(batch_size=batch_size, steps=steps, optimizers={"model": sgd}, precision="fp32")
