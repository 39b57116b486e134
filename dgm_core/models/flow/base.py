"""What every flow shares: one bijection between data and a base distribution, learnt in one of two ways.

Maximum likelihood of the stored data: log p(x) = log p_base(f(x)) + log |det ∂f/∂x| (eq. 2 of arXiv:1605.08803).
Integers are dequantised by noise u ∈ [0, 1)ᴰ, so that log P(x) = log E_q [p(x + u) / q(u | x)] ≥ E_q log p(x + u) −
log q(u | x); q is uniform (L. Theis et al., 2016. arXiv:1511.01844) or learnt (J. Ho et al., 2019. arXiv:1902.00275,
eq. 12). They are put on the real line by a logit; real-valued data is centred and scaled once, before training. Both
enter the determinant.

Reverse KL to an unnormalised density exp(−U): min E_q [log q(x) + U(x)] ≥ −log Z (D. Rezende, S. Mohamed, 2015.
arXiv:1505.05770, eq. 15), by samples of the model itself: no example is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_core.bijections import (
    Bijection,
    Context,
    Dequantizer,
    ScaledLogit,
    Standardize,
    UniformDequantizer,
    no_log_det,
)
from dgm_core.capabilities import HasDecoder, HasInverse, HasLikelihood, HasReparametrizedSample
from dgm_core.config import Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss
from dgm_core.data import densities
from dgm_core.distributions.latent_base import Base, StandardNormal
from dgm_core.nn.norm import channel_moments, settle
from dgm_core.objectives.elbo import inverse_temperature
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

Objective = Literal["likelihood", "reverse_kl"]


class FlowModel(GenerativeModel, HasLikelihood, HasDecoder, HasInverse, HasReparametrizedSample):
    """A flow: a concrete model builds `flow`, from standardised data to a flat latent, and may replace `base`,
    `to_real` and `dequantizer`.

    Args:
        alpha: of the logit for integer-valued data.
        standardize: centre and scale real-valued data by the training split's moments, a coordinate of a vector or a
            channel of an image at a time.
        conditional: model p(x | y): bijections and base get the one-hot label as their context.
        objective: maximum likelihood of the data, or reverse KL to the density that the data set is known to have.
        anneal: share of training in which that density's energy is annealed.
    """

    flow: Bijection

    def __init__(
        self,
        config: Strict,
        data: DataSpec,
        *,
        alpha: float = 0.05,
        standardize: bool = True,
        conditional: bool = False,
        objective: Objective = "likelihood",
        anneal: float = 0.0,
    ) -> None:
        super().__init__(config, data)
        name = type(self).__name__
        if data.kind not in ("vector", "image"):
            raise DataMismatch(
                f"{name} models vectors and images; this data is of kind {data.kind!r}, whose values have no scale to "
                "transform. Use an autoregressive model for codes and audio."
            )
        if data.dims < 2:
            raise DataMismatch(f"{name} needs at least 2 coordinates, so that some can depend on others; given: 1")
        if conditional and not data.classes:
            raise DataMismatch("conditional: true needs classes, and the data has none; set conditional: false")
        self.target = None if objective == "likelihood" else _target(name, data)
        self.exact = data.levels is None
        self.conditional, self.anneal = conditional, anneal
        self.standardize = standardize and data.levels is None and self.target is None
        self.to_real: Bijection = Standardize(data.shape[0]) if data.levels is None else ScaledLogit(data.levels, alpha)
        self.dequantizer: Dequantizer = UniformDequantizer()
        self.base: Base = StandardNormal()

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        if self.standardize and isinstance(self.to_real, Standardize):
            self.to_real.set(*channel_moments((batch.x for batch in batches), self.to_real.shift))

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        if self.target is not None:
            return self._reverse_kl(batch.x.shape[0], clock)
        nats = -self._bound(batch.x, self.context_of(batch.y)).mean()
        bits = nats.detach() / (self.data.dims * math.log(2))
        return Loss(nats + self.penalty(), {"nll_nats": nats.detach(), "bits_per_dim": bits})

    def penalty(self) -> Float[Tensor, ""] | float:
        """What the paper adds to the negative log-likelihood."""
        return 0.0

    def inverse_temperature(self, clock: Clock) -> float:
        """β of the annealed energy βU in reverse KL (eq. 20), on the clock's own scale."""
        return inverse_temperature(clock.progress, self.anneal)

    def after(self, turn: str, clock: Clock) -> None:
        settle(self)

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """Nats of the stored data: exact if real-valued, else a lower bound that tightens with `samples`."""
        label = self.context_of(y)
        if self.exact:
            return self._log_density(x.to(self._dtype), label)
        draws = torch.stack([self._bound(x, label) for _ in range(samples)])
        return draws.logsumexp(0) - math.log(samples)

    def rsample_with_log_prob(self, n: int) -> tuple[Float[Tensor, " n *shape"], Float[Tensor, " n"]]:
        """Draws of the density (before integers are rounded) and its log there, nats; differentiable in both."""
        label = self.context_of(self.draw_labels(n)) if self.conditional else None
        z = self.base.sample(self._like(n), label)
        real, first = self.flow.inverse(z, label)
        x, second = self.to_real.inverse(real)
        return x, self.base.log_prob(promote(z), label) - first - second

    def draw_latent(self, n: int) -> Float[Tensor, " n D"]:
        label = self.context_of(self.draw_labels(n)) if self.conditional else None
        return self.base.sample(self._like(n), label)

    def decode(
        self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        """The one x of this z; for integers the middle of the interval that is rounded to it."""
        x = self._invert(z.to(self._dtype), self.context_of(y))
        return x if self.data.levels is None else (x - 0.5).clamp(0, self.data.levels - 1)

    def sample(
        self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, temperature: float = 1.0
    ) -> Tensor:
        """Draw (n, *shape); `temperature` multiplies the latent's deviations from the base's centre."""
        label = self.context_of(self.labels_for(n, y)) if self.conditional else None
        x = self._invert(self.base.sample(self._like(n), label, temperature), label)
        if self.data.levels is not None:
            x = x.floor().clamp(0, self.data.levels - 1)
        return x.to(self.data.dtype)

    def to_latent(self, x: Tensor, y: Tensor | None = None) -> Float[Tensor, " B D"]:
        return self._normalize(self._dequantize(x)[0], self.context_of(y))[0]

    def inverse_error(self, x: Tensor, y: Tensor | None = None) -> Float[Tensor, " B"]:
        """Greatest |f⁻¹(f(x)) − x| over an example's coordinates, in data units: how invertible the flow is in
        practice."""
        x, label = self._dequantize(x)[0], self.context_of(y)
        return (self._invert(self._normalize(x, label)[0], label) - x).flatten(1).abs().amax(1)

    def context_of(self, y: Tensor | None) -> Context:
        """The one-hot label of a conditional model."""
        if not self.conditional:
            return None
        if y is None:
            raise DataMismatch(f"{type(self).__name__} is class-conditional: give y, one label an example")
        return F.one_hot(y.to(self.device, torch.int64), self.data.classes).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _like(self, n: int) -> Float[Tensor, " n D"]:
        return torch.empty(n, self.data.dims, device=self.device, dtype=self._dtype)

    def _reverse_kl(self, n: int, clock: Clock) -> Loss:
        assert self.target is not None
        x, log_q = self.rsample_with_log_prob(n)
        energy = self.target.energy(x)
        found = (log_q + energy).detach().mean()
        value = (log_q + self.inverse_temperature(clock) * energy).mean()
        return Loss(value + self.penalty(), {"reverse_kl_nats": found + self.target.log_z(), "free_energy_nats": found})

    def _dequantize(self, x: Tensor) -> tuple[Float[Tensor, " B *shape"], Float[Tensor, " B"]]:
        """x + u and log q(u | x)."""
        x = x.to(self._dtype)
        return (x, no_log_det(x)) if self.data.levels is None else self.dequantizer(x)

    def _normalize(
        self, x: Float[Tensor, " B *shape"], label: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        real, first = self.to_real(x)
        z, second = self.flow(real, label)
        return z, first + second

    def _invert(self, z: Float[Tensor, " B D"], label: Context = None) -> Float[Tensor, " B *shape"]:
        return self.to_real.inverse(self.flow.inverse(z, label)[0])[0]

    def _bound(self, x: Tensor, label: Context) -> Float[Tensor, " B"]:
        """log p of the stored data by one draw of the noise."""
        dequantized, log_q = self._dequantize(x)
        return self._log_density(dequantized, label) - log_q

    def _log_density(self, x: Float[Tensor, " B *shape"], label: Context) -> Float[Tensor, " B"]:
        z, log_det = self._normalize(x, label)
        return self.base.log_prob(promote(z), label) + log_det


def _target(name: str, data: DataSpec) -> densities.Density:
    if not data.density:
        raise DataMismatch(
            f"{name} is fitted by reverse KL to an unnormalised density, and of this data none is known. Use a data "
            f"set whose source is `density` ({', '.join(densities.OPTIONS)}), without a transform."
        )
    target = densities.named(**data.density)
    if not target.everywhere:
        raise DataMismatch(
            f"the density {data.density['name']!r} is zero on parts of the plane, where the reverse KL of any flow is "
            f"infinite: {name} takes one of {', '.join(n for n in densities.OPTIONS if densities.named(n).everywhere)}"
        )
    return target
