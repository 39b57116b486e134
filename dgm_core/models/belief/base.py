"""What sigmoid belief nets share: the generative net, its likelihood, ancestral sampling; and, for those that have one,
the recognition net as the proposal that bounds the likelihood."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from dgm_core import distributed
from dgm_core.capabilities import HasLikelihood, HasReceptiveFields
from dgm_core.config import Strict
from dgm_core.contract import Batch, DataMismatch, DataSpec, GenerativeModel
from dgm_core.nn.belief import ENUMERABLE, RecognitionNet, SigmoidBeliefNet

if TYPE_CHECKING:
    from jaxtyping import Float

MEMORY = 2**24  # inputs of units held at once while bounds are evaluated


class Layered(Strict):
    """What `Config` of every model here has."""

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        min_length=1, description="units a hidden layer, from the data up"
    )


class BeliefNet(GenerativeModel, HasLikelihood, HasReceptiveFields):
    """A net of sigmoid units in layers over data of two levels, whatever its shape.

    The likelihood is exact where there are at most 16 hidden units, else a lower bound.
    """

    def __init__(self, config: Layered, data: DataSpec) -> None:
        super().__init__(config, data)
        if data.levels != 2:
            kind = "real-valued" if data.levels is None else f"of {data.levels} levels"
            raise DataMismatch(
                f"sigmoid belief nets model coordinates of two levels; this data is {kind}. Prepare a binarised "
                "variant of the data set (threshold, static or dynamic)."
            )
        self.sizes = (data.dims, *config.hidden)
        self.generative = SigmoidBeliefNet(self.sizes)
        self.exact = sum(config.hidden) <= ENUMERABLE

    @torch.no_grad()
    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        """Before the first turn: visible biases from the data's mean."""
        if turn == self.turns()[0].name:
            self.start_from(self._mean(batches))

    def start_from(self, mean: Float[Tensor, " v"]) -> None:
        """The start that the data's mean gives."""
        self.generative.start_from(mean)

    def log_joint(self, x: Tensor, hidden: Sequence[Float[Tensor, " *B n"]]) -> Float[Tensor, " *B"]:
        """log p(x, h¹, …, h^L), exact."""
        states = [h.to(self.device, self.dtype) for h in hidden]
        visible = self.visible(x).view(-1, *(1,) * (states[0].ndim - 2), self.data.dims)
        return self.generative.log_terms([visible, *states]).sum(-1)

    @torch.no_grad()
    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """Nats: exact by enumeration of the hidden units where these are few, else a lower bound."""
        v = self.visible(x)
        return self.generative.log_prob(v) if self.exact else self.lower_bound(v, samples)

    @abstractmethod
    def lower_bound(self, v: Float[Tensor, " B v"], samples: int) -> Float[Tensor, " B"]:
        """Of log p(x); importance-weighted above one sample."""

    def importance_weighted(
        self, log_weights: Callable[[int], Float[Tensor, " B count"]], rows: int, samples: int
    ) -> Float[Tensor, " B"]:
        """log (1/K) Σ_k w_k, drawn in chunks, so that memory does not grow with K."""
        largest = max(1, MEMORY // (rows * max(self.sizes)))
        total: Tensor | None = None
        for start in range(0, samples, largest):
            part = torch.logsumexp(log_weights(min(largest, samples - start)), 1)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total - math.log(samples)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        """From the top down, each layer given the one above."""
        return self.generative.draw(n)[0].unflatten(1, self.data.shape).to(self.data.dtype)

    def receptive_fields(self) -> Float[Tensor, " hidden *shape"]:
        """Of the generative weights: what each unit of the first hidden layer adds to the data's logits."""
        return self.generative.affine(0)[0].T.unflatten(1, self.data.shape)

    def visible(self, x: Tensor) -> Float[Tensor, " B v"]:
        """From data units."""
        return x.flatten(1).to(self.device, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.generative.prior.dtype

    def _mean(self, batches: Iterator[Batch]) -> Float[Tensor, " v"]:
        """Of all ranks' batches."""
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        total = torch.zeros(self.data.dims, dtype=torch.float64, device=self.device)
        for batch in batches:
            v = batch.x.flatten(1).to(self.device, torch.float64)
            count += len(v)
            total += v.sum(0)
        distributed.sum_(count, total)
        if count == 0:
            raise DataMismatch("the training split is empty: the visible biases start from the data's mean")
        return (total / count).to(self.dtype)


class RecognisedBeliefNet(BeliefNet):
    """A belief net with a recognition net of the same layers, the other way up."""

    def __init__(self, config: Layered, data: DataSpec) -> None:
        super().__init__(config, data)
        self.recognition = RecognitionNet(self.sizes)

    def start_from(self, mean: Float[Tensor, " v"]) -> None:
        super().start_from(mean)
        self.recognition.mean.copy_(mean)

    def log_weights(self, v: Float[Tensor, " B v"], count: int) -> Float[Tensor, " B count"]:
        """log p(x, h) − log q(h | x) of `count` draws of h."""
        hidden, log_q = self.recognition(v, count)
        return self.generative.log_terms([v[:, None], *hidden]).sum(-1) - log_q.sum(-1)

    def lower_bound(self, v: Float[Tensor, " B v"], samples: int) -> Float[Tensor, " B"]:
        """An unbiased estimate of the variational bound at one sample, the importance-weighted bound above."""
        return self.importance_weighted(lambda count: self.log_weights(v, count), len(v), samples)
