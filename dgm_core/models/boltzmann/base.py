"""What deep belief nets and deep Boltzmann machines share: layers of Bernoulli units over data of two levels, and one
bipartite layer, `machine`, whose log Z is the whole model's and on which annealing runs."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.capabilities import HasEnergy, HasGibbs, HasLikelihood, HasReceptiveFields
from dgm_core.config import Strict
from dgm_core.contract import Batch, DataMismatch, DataSpec, GenerativeModel
from dgm_core.nn.rbm import ENUMERABLE, AnnealedLayer, BernoulliLayer
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

MEMORY = 2**24  # inputs of units held at once while bounds are evaluated


class Layered(Strict):
    """What `Config` of both has."""

    initial_scale: float = Field(default=0.01, gt=0, description="standard deviation of the initial weights")


HiddenSizes = tuple[Annotated[int, Field(ge=1)], ...]


class DeepMachine(GenerativeModel, HasLikelihood, HasEnergy, HasGibbs, HasReceptiveFields):
    """log p(x) = −F(x) − log Z with F(x) out of reach, so that `free_energy` is the variational bound above it, and
    `log_prob` a bound from below.

    log Z is exact where one side of `machine` has at most 20 units; elsewhere `log_prob` is refused, and
    `dgm_core.evaluation.ais` estimates log Z.
    """

    exact = False
    bounded = True

    def __init__(self, config: Layered, hidden: Sequence[int], data: DataSpec) -> None:
        super().__init__(config, data)
        if data.levels != 2:
            kind = "real-valued" if data.levels is None else f"of {data.levels} levels"
            raise DataMismatch(
                f"deep belief nets and Boltzmann machines model coordinates of two levels; this data is {kind}. "
                "Prepare a binarised variant of the data set (threshold, static or dynamic)."
            )
        self.sizes = (data.dims, *hidden)
        pairs = list(pairwise(self.sizes))
        self.layers = nn.ModuleList(BernoulliLayer(below, above, config.initial_scale) for below, above in pairs)
        self._log_z: tuple[list[Tensor], Tensor] | None = None

    # What the two differ in.

    @property
    @abstractmethod
    def machine(self) -> BernoulliLayer:
        """The bipartite layer that the chains run on, with the present parameters."""

    @property
    @abstractmethod
    def machine_mean(self) -> Float[Tensor, " v"]:
        """Mean of its visible side over data: annealing starts from independent units with this mean."""

    @abstractmethod
    def bound(self, v: Float[Tensor, " B v"]) -> Float[Tensor, " B"]:
        """Below −F(v), in expectation where it is drawn."""

    @abstractmethod
    def log_weights(self, v: Float[Tensor, " B v"], count: int) -> Float[Tensor, " B count"]:
        """Of `count` draws each, log of weights whose mean is exp(−F(v))."""

    # Likelihood.

    @torch.no_grad()
    def free_energy(self, x: Tensor) -> Float[Tensor, " B"]:
        """The variational free energy: F(x) or more."""
        return -self.bound(self.visible(x))

    @torch.no_grad()
    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """Nats: the variational bound at one sample, importance-weighted above. Refused where log Z is out of reach."""
        log_z = self.exact_log_z()
        if log_z is None:
            v, h = self.machine.weight.shape
            raise RuntimeError(
                f"log Z of {v} units beside {h} is out of reach: one side must have at most {ENUMERABLE}. Estimate it "
                "with dgm_core.evaluation.ais (`ais` and `reverse_ais` lie on either side of it); then "
                "−free_energy(x) − log Z is the variational bound."
            )
        v = self.visible(x)
        return (self.bound(v) if samples == 1 else self._importance_weighted(v, samples)) - log_z.to(v)

    @torch.no_grad()
    def exact_log_z(self) -> Tensor | None:
        machine = self.machine
        if not machine.enumerable:
            return None
        # Compared by value: an average of the parameters may be swapped in, which no version counter notices.
        now = [t.detach() for t in machine.state_dict().values()]
        if self._log_z is None or not same(self._log_z[0], now):
            self._log_z = [t.clone() for t in now], machine.log_z()
        return self._log_z[1]

    def annealed(self, beta: float) -> AnnealedLayer:
        """At 0 independent units with the means that data gives them, beside units at one half."""
        return AnnealedLayer(self.machine, self.machine.bias_for(self.machine_mean), beta)

    @torch.no_grad()
    def base_log_z(self) -> Tensor:
        machine = self.machine
        hidden = machine.hidden_bias.new_zeros(1, len(machine.hidden_bias))
        base = machine.visible_log_partition(machine.bias_for(self.machine_mean))
        return base + machine.hidden_log_partition(hidden)[0]

    @torch.no_grad()
    def base_sample(self, n: int) -> Tensor:
        return self.machine.chain_state(self.draw_base(n))

    def draw_base(self, n: int) -> Float[Tensor, " n v"]:
        """Of the machine's visible side."""
        machine = self.machine
        return machine.draw_visible(machine.bias_for(self.machine_mean).expand(n, -1))

    def _importance_weighted(self, v: Float[Tensor, " B v"], samples: int) -> Float[Tensor, " B"]:
        """log (1/K) Σ_k w_k, drawn in chunks, so that memory does not grow with K."""
        largest = max(1, MEMORY // (len(v) * max(self.sizes)))
        total: Tensor | None = None
        for start in range(0, samples, largest):
            part = torch.logsumexp(self.log_weights(v, min(largest, samples - start)), 1)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total - math.log(samples)

    # Sampling.

    @torch.no_grad()
    def chain(self, x: Tensor) -> Iterator[Tensor]:
        state = self.machine_state(self.visible(x))
        while True:
            state = self.machine.gibbs(state)
            yield self.stored(self.shown(state))

    @abstractmethod
    def machine_state(self, v: Float[Tensor, " B v"]) -> Tensor:
        """A state of the machine's visible side that goes with data v."""

    def shown(self, state: Tensor) -> Float[Tensor, " B v"]:
        """Data that goes with a state of the machine's visible side; its first units, unless said otherwise."""
        return state[:, : self.data.dims]

    # Layers and data.

    def layer(self, level: int) -> BernoulliLayer:
        """Between the layers of units `level` and `level + 1`."""
        layer = self.layers[level]
        assert isinstance(layer, BernoulliLayer)
        return layer

    def receptive_fields(self) -> Float[Tensor, " hidden *shape"]:
        return self.layer(0).weight.T.unflatten(1, self.data.shape)

    def visible(self, x: Tensor) -> Float[Tensor, " B v"]:
        """From data units."""
        return x.flatten(1).to(self.device, self.dtype)

    def stored(self, v: Float[Tensor, " B v"]) -> Tensor:
        """To data units."""
        return v.unflatten(1, self.data.shape).to(self.data.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer(0).weight.dtype

    def batch_means(self, batches: Iterator[Batch], levels: int) -> list[Float[Tensor, " n"]]:
        """Means of x and of the hidden layers below `levels`, over all ranks' batches."""
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        sizes = self.sizes[:levels]
        totals = [torch.zeros(n, dtype=torch.float64, device=self.device) for n in sizes]
        for batch in batches:
            count += len(batch.x)
            for total, mean in zip(totals, self.activities(self.visible(batch.x), levels), strict=True):
                total += mean.double().sum(0)
        distributed.sum_(count, *totals)
        if count == 0:
            raise DataMismatch("the training split is empty: biases start from the data's means")
        return [(total / count).to(self.dtype) for total in totals]

    @abstractmethod
    def activities(self, v: Float[Tensor, " B v"], levels: int) -> list[Float[Tensor, " B n"]]:
        """x and probabilities of the hidden layers below `levels`, passed up as they are: no draws."""


def chains_held(total: int) -> int:
    """How many of all workers' chains are this one's."""
    share = distributed.share(total)
    if share.stop == share.start:
        raise ValueError(
            f"{total} chains do not go round {distributed.world_size()} workers: give `chains` at least one a worker, "
            "or use fewer workers"
        )
    return share.stop - share.start


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """Whether these tensors are equal in every bit, kind and place."""
    return all(s.device == t.device and s.dtype == t.dtype and torch.equal(s, t) for s, t in zip(a, b, strict=True))


def two_valued(h: Float[Tensor, " *B n"], logits: Float[Tensor, " *B n"]) -> Float[Tensor, " *B"]:
    """Σ_i log p(h_i) with p(h_i = 1) = σ(logits_i), at least in fp32."""
    z = promote(logits)
    return (h * z - nn.functional.softplus(z)).sum(-1)
