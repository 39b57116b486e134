"""What every flow shares: maximum likelihood of the stored data through one bijection.

log p(x) = log N(f(x); 0, I) + log |det ∂f/∂x| (eq. 2 of arXiv:1605.08803). Integers are dequantised by uniform noise
u ∈ [0, 1)ᴰ, so that log P(x) = log E_u p(x + u) ≥ E_u log p(x + u) (L. Theis et al., 2016. arXiv:1511.01844), and put
on the real line by a logit; real-valued data is centred and scaled once, before training. Both enter the determinant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.bijections import Bijection, ScaledLogit, Standardize, promote
from dgm_core.config import Strict
from dgm_core.contract import (
    Batch,
    Clock,
    DataMismatch,
    DataSpec,
    GenerativeModel,
    HasDecoder,
    HasLikelihood,
    Loss,
)
from dgm_core.nn.norm import channel_moments, settle
from dgm_core.shapes import sum_event

if TYPE_CHECKING:
    from jaxtyping import Float


class FlowModel(GenerativeModel, HasLikelihood, HasDecoder):
    """A flow: a concrete model builds `flow`, from standardised data to a flat standard normal.

    Args:
        alpha: of the logit for integer-valued data.
        standardize: centre and scale real-valued data by the training split's moments, a coordinate of a vector or a
            channel of an image at a time.
    """

    flow: Bijection

    def __init__(self, config: Strict, data: DataSpec, *, alpha: float, standardize: bool) -> None:
        super().__init__(config, data)
        if data.kind not in ("vector", "image"):
            raise DataMismatch(
                f"a flow models vectors and images; this data is of kind {data.kind!r}, whose values have no scale to "
                "transform. Use an autoregressive model for codes and audio."
            )
        if data.dims < 2:
            raise DataMismatch("a flow needs at least 2 coordinates, so that some can depend on others; given: 1")
        self.exact = data.levels is None
        self.standardize = standardize and data.levels is None
        self.to_real: Bijection = Standardize(data.shape[0]) if data.levels is None else ScaledLogit(data.levels, alpha)

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        if self.standardize and isinstance(self.to_real, Standardize):
            self.to_real.set(*channel_moments((batch.x for batch in batches), self.to_real.shift))

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        nats = -self._log_density(self._dequantize(batch.x)).mean()
        bits = nats.detach() / (self.data.dims * math.log(2))
        return Loss(nats + self.penalty(), {"nll_nats": nats.detach(), "bits_per_dim": bits})

    def penalty(self) -> Float[Tensor, ""] | float:
        """What the paper adds to the negative log-likelihood."""
        return 0.0

    def after(self, turn: str, clock: Clock) -> None:
        settle(self)

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """Nats of the stored data: exact if real-valued, else a lower bound that tightens with `samples`."""
        if self.exact:
            return self._log_density(x.to(self._dtype))
        draws = torch.stack([self._log_density(self._dequantize(x)) for _ in range(samples)])
        return draws.logsumexp(0) - math.log(samples)

    def draw_latent(self, n: int) -> Float[Tensor, " n D"]:
        return torch.randn(n, self.data.dims, device=self.device, dtype=self._dtype)

    def decode(
        self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        """The one x of this z; for integers the middle of the interval that is rounded to it."""
        x = self._invert(z.to(self._dtype))
        return x if self.data.levels is None else (x - 0.5).clamp(0, self.data.levels - 1)

    def sample(
        self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, temperature: float = 1.0
    ) -> Tensor:
        """Draw (n, *shape); `temperature` is the latent's standard deviation."""
        x = self._invert(self.draw_latent(n) * temperature)
        if self.data.levels is not None:
            x = x.floor().clamp(0, self.data.levels - 1)
        return x.to(self.data.dtype)

    def inverse_error(self, x: Tensor) -> Float[Tensor, " B"]:
        """Greatest |f⁻¹(f(x)) − x| over an example's coordinates, in data units: how invertible the flow is in
        practice."""
        x = self._dequantize(x)
        return (self._invert(self._normalize(x)[0]) - x).flatten(1).abs().amax(1)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _dequantize(self, x: Tensor) -> Float[Tensor, " B *shape"]:
        x = x.to(self._dtype)
        return x if self.data.levels is None else x + torch.rand(x.shape, device=x.device, dtype=x.dtype)

    def _normalize(self, x: Float[Tensor, " B *shape"]) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        real, first = self.to_real(x)
        z, second = self.flow(real)
        return z, first + second

    def _invert(self, z: Float[Tensor, " B D"]) -> Float[Tensor, " B *shape"]:
        return self.to_real.inverse(self.flow.inverse(z)[0])[0]

    def _log_density(self, x: Float[Tensor, " B *shape"]) -> Float[Tensor, " B"]:
        z, log_det = self._normalize(x)
        return sum_event(-0.5 * (promote(z).square() + math.log(2 * math.pi))) + log_det
