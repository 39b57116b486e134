"""Capabilities: nominal classes that say what else a model can do; evaluation and tests dispatch on them.

A model inherits from those that it has, and from `GenerativeModel`; nothing asks `hasattr`. Last, what bijections and
distributions ask of a network that is causal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dgm_core.contract import DataSpec

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class HasLikelihood(ABC):
    """Models whose log-likelihood, or a lower bound of it, can be computed."""

    exact: bool  # of the instance: False if `log_prob` is a lower bound

    @abstractmethod
    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """Nats of the stored data. Where not exact: the ELBO at one sample, importance-weighted above."""


class HasConditionals(ABC):
    """Models whose log-likelihood is a sum of conditionals, one for each coordinate."""

    @abstractmethod
    def log_conditionals(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B C H W"]:
        """Nats of each coordinate given those before it, summing to `log_prob`: a sequence or vector is a grid of one
        row, and where an image's channels are told together they are one."""


class HasPosterior(ABC):
    """Models with an amortised posterior q(z | x)."""

    @abstractmethod
    def posterior(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> torch.distributions.Distribution:
        """q(z | x), event of size `latents`."""

    @abstractmethod
    def kl(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Float[Tensor, " B latents"]:
        """KL(q(z | x) ‖ p(z)) a latent dimension, in nats."""


class HasDecoder(ABC):
    """Models that map a latent to data."""

    @abstractmethod
    def draw_latent(self, n: int) -> Tensor:
        """(n, *latent) from the prior."""

    @abstractmethod
    def decode(
        self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        """The mean, float, in data units (`sample` is a draw)."""


class HasInverse(ABC):
    """Models whose latent is a function of the data, and the data of the latent."""

    @abstractmethod
    def to_latent(self, x: Tensor, y: Tensor | None = None) -> Float[Tensor, " B D"]:
        """The z that `decode` turns back into x (one of them, where x is dequantised)."""

    @abstractmethod
    def inverse_error(self, x: Tensor, y: Tensor | None = None) -> Float[Tensor, " B"]:
        """Greatest |f⁻¹(f(x)) − x| over an example's coordinates, in data units."""


class HasCodes(ABC):
    """Models with discrete latents that become a data set for a prior."""

    @abstractmethod
    def code_specs(self) -> Mapping[str, DataSpec]:
        """Level -> what its codes are, coarsest first; a finer level carries the coarser ones as context."""

    @abstractmethod
    def codes(self, x: Tensor, y: Tensor | None = None) -> Mapping[str, Int[Tensor, " B *grid"]]:
        """Level -> code indices."""

    @abstractmethod
    def decode_codes(
        self, codes: Mapping[str, Tensor], y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        """The mean given the codes, float, in data units."""


class AnnealedChain(ABC):
    """A Markov chain at one inverse temperature, on the model's own kind of state."""

    @abstractmethod
    def free_energy(self, state: Tensor) -> Float[Tensor, " B"]:
        """Of the unnormalised density exp(−F) at this temperature."""

    @abstractmethod
    def gibbs(self, state: Tensor) -> Tensor:
        """One transition that leaves exp(−F) invariant."""


class HasEnergy(ABC):
    """Models with an unnormalised density exp(−F(x))."""

    bounded: bool = False  # True if `free_energy` is an upper bound of F: deep machines, whose F cannot be computed

    @abstractmethod
    def free_energy(self, x: Tensor) -> Float[Tensor, " B"]:
        """F(x), with log p(x) = −F(x) − log Z."""

    @abstractmethod
    def exact_log_z(self) -> Tensor | None:
        """log Z by enumeration, or None where the model is too large for it."""

    @abstractmethod
    def annealed(self, beta: float) -> AnnealedChain:
        """The chain at inverse temperature `beta`: at 0 a base whose log Z and samples are known, at 1 the model."""

    @abstractmethod
    def base_log_z(self) -> Tensor:
        """log Z of `annealed(0)`."""

    @abstractmethod
    def base_sample(self, n: int) -> Tensor:
        """Exact draws of `annealed(0)`'s state."""


class HasCompletion(ABC):
    """Models that fill in what is not observed."""

    @abstractmethod
    def complete(
        self, x: Tensor, observed: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Tensor:
        """`x` with the coordinates where `observed` is False drawn given the others, in data units."""


class HasCritic(ABC):
    """Models with an opponent that tells data from samples; a greater score takes an example for data."""

    @property
    @abstractmethod
    def threshold(self) -> float | None:
        """Scores above it say "data"; None: a critic's, which have no origin."""

    @abstractmethod
    def data_scores(self, x: Tensor, y: Tensor | None = None) -> Float[Tensor, " B"]:
        """Of stored examples, among themselves: some opponents look at a whole batch."""

    @abstractmethod
    def sample_scores(self, n: int) -> Float[Tensor, " n"]:
        """Of fresh samples, as the opponent meets them in training: not rounded to what would be stored."""


class HasStyles(ABC):
    """Models whose samples are drawn layer by layer, each layer in the style of a latent."""

    @property
    @abstractmethod
    def style_layers(self) -> int:
        """How many there are, coarsest first."""

    @abstractmethod
    def decode_mixed(self, coarse: Tensor, fine: Tensor, cut: int) -> Float[Tensor, " B *shape"]:
        """Layers below `cut` in the style of one latent, the others of another; float, in data units."""


class HasGibbs(ABC):
    """Models that are sampled by a Gibbs chain."""

    @abstractmethod
    def chain(self, x: Tensor) -> Iterator[Tensor]:
        """The data that a chain from `x` shows after one step, two, …, as stored; without end."""


class HasReceptiveFields(ABC):
    """Models with hidden units that a matrix joins to the data's coordinates."""

    @abstractmethod
    def receptive_fields(self) -> Float[Tensor, " hidden *shape"] | None:
        """Each unit's weights; None where this instance's first layer is another (convolutions)."""


class HasReparametrizedSample(ABC):
    """Models that can be fitted to an energy by reverse KL, with no data."""

    @abstractmethod
    def rsample_with_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        """Differentiable draws (n, *shape) and their log-densities (n,)."""


class Unrolling(Protocol):
    """A causal network that is told its coordinates one at a time, without gradients."""

    order: Sequence[int]

    def step(self) -> Float[Tensor, " n outputs"]:
        """What it says of the next coordinate in its order."""
        ...

    def put(self, value: Float[Tensor, " n"]) -> None:
        """Tell that coordinate."""
        ...

    def told(self) -> Float[Tensor, " n D"]:
        """All that was told, coordinates in their own order."""
        ...

    def all_said(self) -> Float[Tensor, " n outputs*D"]:
        """What `forward` says of it."""
        ...


class CausalNet(Protocol):
    """(B, D) -> (B, outputs · D), what is said of a coordinate depending on those before it in some order."""

    def __call__(self, x: Tensor, context: Tensor | None = None, /) -> Tensor: ...

    def unroll(self, n: int, context: Tensor | None = None) -> Unrolling:
        """The same for n examples that are yet to be drawn."""
        ...
