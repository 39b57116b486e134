"""Restricted Boltzmann machine. P. Smolensky, 1986; G. Hinton, Training Products of Experts by Minimizing Contrastive
Divergence, 2002. doi:10.1162/089976602760128018. Persistent chains: T. Tieleman, 2008. doi:10.1145/1390156.1390290.
Centring: J. Melchior, A. Fischer, L. Wiskott, How to Center Deep Boltzmann Machines, 2016. arXiv:1311.1354.

p(v) = e^{−F(v)} / Z with F(v) = −log Σ_h e^{−E(v, h)} and the centred energy, here for Bernoulli visibles,

    E(v, h) = −(v − μ)·b − c·(h − λ) − (v − μ)ᵀ W (h − λ).

A play descends mean F(v⁺) − mean F(v⁻), samples held fixed; v⁻ come from k Gibbs steps started at the data (CD-k) or
from persistent chains that take k steps from play to play (PCD-k), by themselves or beside chains at lower inverse
temperatures with which they change places (`tempering`: G. Desjardins et al., 2010, PMLR 9:145–152; see
`nn/tempering.py`); `exact` has log Z, by enumeration, in place of the second term. For the energy above the plain
gradient is the centred one (Algorithm 1 of the centring paper),

    ∇W = ⟨(v − μ)(h − λ)ᵀ⟩_data − ⟨(v − μ)(h − λ)ᵀ⟩_model,   ∇b = ⟨v⟩_data − ⟨v⟩_model,   ∇c = ⟨h⟩_data − ⟨h⟩_model,

with p(h = 1 | v) in place of h. The offsets start at the data's mean and at ½ and follow the batches' means,
μ ← μ + ν (⟨v⟩_data − μ) and λ ← λ + ν (⟨h⟩_data − λ), while b ← b + ν W (⟨h⟩_data − λ) and c ← c + ν Wᵀ (⟨v⟩_data − μ)
keep the distribution where it is. `centred: false` is μ = λ = 0. Real-valued data has Gaussian visibles, v | h ~
N(μ + b + W (h − λ), σ²), with σ² a coordinate learned through its logarithm (K. Cho, A. Ilin, T. Raiko, 2011.
doi:10.1007/978-3-642-21735-7_2) or fixed; its recipe and start, with few hidden units on, follow J. Melchior, N. Wang,
L. Wiskott, 2017. doi:10.1371/journal.pone.0171015. `weight_cost` (½ cost ‖W‖²) and `sparsity` are those of sections 10
and 11 of G. Hinton's practical guide, 2010 (UTML TR 2010–003); neither is on by default.

Departures: the offsets move after a play's step, not before its gradient: a batch that is spread over microbatches and
workers is whole only then. At ν = 0.01 they lag by one batch in a hundred; the sparsity's running activity does alike.
Real-valued data is standardised, not whitened, and σ² starts below the data's variance: where it equals it and W is
small, CD's gradient vanishes. A persistent chain's steps are at the parameters of the play that uses their end, but for
the first step's hidden units: these are drawn with the inputs that the play before has found for its gradient. Tempered
chains end at the base-rate model, not at the uniform one, change places by their visible units with the hidden ones
summed out, and have fixed temperatures.
Expected: −142.6 nats a test example (exact) on thresholded MNIST, 16 hidden units, centred, PCD-1, mean of epochs 46 to
50; −149.1 not centred (both published with the PyDeep library): `make results ROW=rbm_mnist`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dgm_core import distributed
from dgm_core.capabilities import HasCompletion, HasEnergy, HasGibbs, HasLikelihood, HasReceptiveFields
from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, Loss
from dgm_core.models.boltzmann.base import same
from dgm_core.models.boltzmann.negative import NegativePhase, Sampled
from dgm_core.nn.rbm import ENUMERABLE, AnnealedLayer, BernoulliLayer, BipartiteLayer, GaussianLayer
from dgm_core.objectives.contrastive import contrast, run_chain
from dgm_core.objectives.sparsity import sparsity
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


class RBM(NegativePhase, HasLikelihood, HasEnergy, HasCompletion, HasGibbs, HasReceptiveFields):
    """One layer of hidden units over Bernoulli (two levels) or Gaussian (real-valued) visibles of any shape."""

    class Config(Sampled):
        hidden: int = Field(default=500, ge=1)
        centred: bool = True
        offset_rate: float = Field(default=0.01, ge=0, le=1, description="ν, the offsets' sliding factor")
        initial_scale: float = Field(default=0.01, gt=0, description="standard deviation of the initial weights")
        initial_activity: float = Field(
            default=0.5, gt=0, lt=1, description="share of hidden units that are on at first"
        )
        initial_variance: float = Field(
            default=0.5, gt=0, description="σ² of Gaussian visibles, in shares of the data's variance"
        )
        learn_variance: bool = True
        weight_cost: float = Field(default=0.0, ge=0, description="of half the squared weights")
        sparsity_cost: float = Field(default=0.0, ge=0, description="of hidden units whose activity is off the target")
        sparsity_target: float = Field(default=0.05, gt=0, lt=1, description="share of the time a hidden unit is on")
        sparsity_decay: float = Field(default=0.95, ge=0, lt=1, description="what the running activity keeps a play")

    config: Config
    activity: Tensor
    shift: Tensor
    scale: Tensor
    sum_visible: Tensor
    sum_hidden: Tensor
    count: Tensor

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        if data.levels is None:  # Melchior, Wang & Wiskott 2017: 200 epochs of 40,000 patches
            return cls.Config(**_gaussian(data, 196, 0.1), negative="cd"), _recipe(_sgd(0.1, clip=1.0), 100, 80_000)
        # Melchior, Fischer & Wiskott 2016: 500 hidden units for MNIST, 16 where log Z is to be exact; 200 epochs
        return cls.Config(hidden=500 if data.dims >= 784 else 16), _recipe(_sgd(0.01), 100, 120_000)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        if data.levels is None:
            exact = cls.Config(**_gaussian(data, 4, 0.5), negative="exact", chains=10)
            return exact, _recipe(_sgd(0.1, clip=1.0, schedule="linear"), 64, 1500)
        # Slow and short, so that chains still cross between modes and keep their shares right.
        recipe = _recipe(_sgd(min(0.5, 2 / data.dims), schedule="linear"), 64, 300)
        return cls.Config(hidden=8, chains=10, gibbs=5, initial_scale=0.1), recipe

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        if data.levels not in (None, 2):
            raise DataMismatch(
                f"rbm models coordinates of two levels, or real-valued ones; this data has {data.levels} levels. "
                "Prepare a binarised variant of the data set (threshold, static or dynamic), or a real-valued one."
            )
        d = data.dims
        if data.levels == 2:
            self.layer: BipartiteLayer = BernoulliLayer(d, config.hidden, config.initial_scale)
        else:
            self.layer = GaussianLayer(
                d, config.hidden, config.initial_scale, config.initial_variance, learn=config.learn_variance
            )
        if config.negative == "exact" and not self.layer.enumerable:
            raise ValueError(
                f"negative: exact needs at most {ENUMERABLE} binary units on one side; given {d} visible and "
                f"{config.hidden} hidden ones. Use pcd or cd."
            )
        self.register_buffer("base_mean", self.layer.rates())
        if data.levels is None:
            self.register_buffer("shift", torch.zeros(d))
            self.register_buffer("scale", torch.ones(d))
        self.register_buffer("sum_visible", torch.zeros(d), persistent=False)
        self.register_buffer("sum_hidden", torch.zeros(config.hidden), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.sparse = config.sparsity_cost > 0
        if self.sparse:
            self.register_buffer("activity", torch.full((config.hidden,), config.initial_activity))
        with torch.no_grad():
            self._reset()
            self.start_chains()
        self.exact = self.layer.enumerable
        self._log_z: tuple[list[Tensor], Tensor] | None = None

    # Learning.

    @torch.no_grad()
    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        mean, variance = self._moments(batches)
        if self.data.levels is None:
            self.shift.copy_(mean)
            self.scale.copy_(variance.sqrt())
        else:
            self.base_mean.copy_(mean)
        self._reset()
        self.restart_chains()

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        v, n = self._visible(batch.x), len(batch.x)
        if self.config.negative == "exact":
            a = self.layer.hidden_input(v)
            free_energy = self.layer.free_energy(v, a)
            value = free_energy.mean() + self.layer.log_z().to(free_energy)
        else:
            both, a = self.with_negative(v)
            free_energy = self.layer.free_energy(both, a)
            # Of several workers' chains each counts with its worker's share of the batch.
            value = contrast(free_energy[:n], free_energy[n:])
        metrics = {"free_energy": free_energy[:n].detach().mean(), **self.swap_metrics()}
        if self.config.weight_cost > 0:
            value = value + 0.5 * self.config.weight_cost * self.layer.weight.square().sum()
        if self.sparse:
            mean_input = self.layer.mean_hidden_input(v)
            value = value + self.config.sparsity_cost * sparsity(mean_input, self.activity, self.config.sparsity_target)
            metrics["activity"] = self.activity.mean()
        if self.training and (self.config.centred or self.sparse):
            with torch.no_grad():
                self.sum_visible += v.sum(0)
                self.sum_hidden += torch.sigmoid(promote(a[:n])).sum(0)
                self.count += n
        return Loss(value, metrics)

    @torch.no_grad()
    def after(self, turn: str, clock: Clock) -> None:
        if not self.training:
            return
        if self.config.centred or self.sparse:
            distributed.sum_(self.count, self.sum_visible, self.sum_hidden)
            visible, hidden = self.sum_visible / self.count, self.sum_hidden / self.count
            rate, layer = self.config.offset_rate, self.layer
            if self.config.centred:
                layer.move_offsets(rate * (visible - layer.visible_offset), rate * (hidden - layer.hidden_offset))
            if self.sparse:
                self.activity.lerp_(hidden, 1 - self.config.sparsity_decay)
            for total in (self.count, self.sum_visible, self.sum_hidden):
                total.zero_()
        self.step_chains()

    # Likelihood.

    def free_energy(self, x: Tensor) -> Float[Tensor, " B"]:
        """F(x) in nats: −log of the stored data's unnormalised probability, or density."""
        energy = self.layer.free_energy(self._visible(x))
        return energy if self.data.levels is not None else energy + self.scale.log().sum()

    @torch.no_grad()
    def exact_log_z(self) -> Tensor | None:
        if not self.exact:
            return None
        # Compared by value: an average of the parameters may be swapped in, which no version counter notices.
        now = [t.detach() for t in self.layer.state_dict().values()]
        if self._log_z is None or not same(self._log_z[0], now):
            self._log_z = [t.clone() for t in now], self.layer.log_z()
        return self._log_z[1]

    @torch.no_grad()
    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """Nats, exact; `samples` is not needed. Refused where log Z is out of reach."""
        log_z = self.exact_log_z()
        if log_z is None:
            v, h = self.layer.weight.shape
            raise RuntimeError(
                f"log Z of an rbm with {v} visible and {h} hidden units is out of reach: one side must have at most "
                f"{ENUMERABLE} binary units. Estimate it with dgm_core.evaluation.ais (`ais` and `reverse_ais` lie on "
                "either side of it) and use −free_energy(x) − log Z."
            )
        return -self.free_energy(x) - log_z.to(self.base_mean)

    def annealed(self, beta: float) -> AnnealedLayer:
        """At 0 the base-rate model, whose independent visibles have the training split's mean."""
        return AnnealedLayer(self.layer, self.layer.bias_for(self.base_mean), beta)

    @torch.no_grad()
    def base_log_z(self) -> Tensor:
        hidden = torch.zeros(1, self.config.hidden, device=self.device, dtype=self.base_mean.dtype)
        base = self.layer.visible_log_partition(self.layer.bias_for(self.base_mean))
        return base + self.layer.hidden_log_partition(hidden)[0]

    @torch.no_grad()
    def base_sample(self, n: int) -> Tensor:
        return self.layer.chain_state(self._draw_base(n))

    @torch.no_grad()
    def chain_state(self, x: Tensor) -> Tensor:
        """The state of `annealed`'s chains at data `x`, where reverse annealing starts."""
        return self.layer.chain_state(self._visible(x))

    # Sampling.

    @torch.no_grad()
    def sample(
        self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, burn_in: int = 1000
    ) -> Tensor:
        """`n` chains' states after `burn_in` Gibbs steps from the particles, taken in turn: with PCD from its chains,
        with CD from the base-rate model's draws. The particles themselves stay where they are."""
        start = self.standing()[torch.arange(n, device=self.device) % len(self.particles)]
        return self._stored(run_chain(self.layer.gibbs, start, burn_in))

    @torch.no_grad()
    def chain(self, x: Tensor) -> Iterator[Tensor]:
        v = self._visible(x)
        while True:
            v = self.layer.gibbs(v)
            yield self._stored(v)

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
        """Gibbs steps with the observed coordinates clamped, from the base-rate model's draw of the others."""
        v, known = self._visible(x), observed.to(self.device, torch.bool).expand(x.shape).flatten(1)

        def clamp(free: Tensor) -> Tensor:
            return torch.where(known, v, free)

        start = clamp(self._draw_base(len(v)))
        return self._stored(run_chain(lambda state: clamp(self.layer.gibbs(state)), start, burn_in))

    def receptive_fields(self) -> Float[Tensor, " hidden *shape"]:
        return self.layer.weight.T.unflatten(1, self.data.shape)

    def _draw_base(self, n: int) -> Float[Tensor, " n v"]:
        return self.layer.draw_visible(self.layer.bias_for(self.base_mean).expand(n, -1))

    def _visible(self, x: Tensor) -> Float[Tensor, " B v"]:
        """From data units; real-valued coordinates are standardised, so that a learning rate suits every scale."""
        v = x.flatten(1).to(self.device, self.base_mean.dtype)
        return v if self.data.levels is not None else (v - self.shift) / self.scale

    def _stored(self, v: Float[Tensor, " B v"]) -> Tensor:
        if self.data.levels is None:
            return (v * self.scale + self.shift).unflatten(1, self.data.shape)
        return v.unflatten(1, self.data.shape).to(self.data.dtype)

    def _reset(self) -> None:
        self.layer.reset(self.base_mean, self.config.initial_activity, centred=self.config.centred)

    def _moments(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """Mean and variance a coordinate over all ranks' batches, in one pass; variance 1 where it is constant."""
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        first = torch.zeros(self.data.dims, dtype=torch.float64, device=self.device)
        second = torch.zeros_like(first)
        for batch in batches:
            v = batch.x.flatten(1).to(self.device, torch.float64)
            count += v.shape[0]
            first += v.sum(0)
            second += v.square().sum(0)
        distributed.sum_(count, first, second)
        if count == 0:
            raise DataMismatch("the training split is empty: rbm takes its visible biases from the data's mean")
        mean, square = first / count, second / count
        variance = square - mean.square()
        constant = variance <= 1e-12 * square  # no more than rounding
        return mean.to(self.base_mean), torch.where(constant, 1.0, variance).to(self.base_mean)


def _gaussian(data: DataSpec, hidden: int, activity: float) -> dict[str, Any]:
    scale = math.sqrt(2 / (data.dims + hidden))  # Glorot & Bengio 2010
    return {"hidden": hidden, "initial_activity": activity, "initial_scale": scale}


def _sgd(lr: float, clip: float | None = None, schedule: Literal["constant", "linear"] = "constant") -> Optimizer:
    return Optimizer(algorithm="sgd", lr=lr, clip_norm=clip, schedule=schedule)


def _recipe(sgd: Optimizer, batch_size: int, steps: int) -> Recipe:
    # fp32: two free energies of hundreds of nats are subtracted, and the products are too small for bf16 to pay.
    return Recipe(batch_size=batch_size, steps=steps, optimizers={"model": sgd}, precision="fp32")
