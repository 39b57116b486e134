"""What a decoder says of the data: p(x_i | θ_i), one distribution a coordinate, in data units.

A network gives each coordinate `params` numbers θ_i, on the last axis; an `Observation` turns them into the
log-probability of the stored value, its mean and a draw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgm_core.contract import DataSpec
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


class Observation(nn.Module, ABC):
    """One distribution a coordinate. Leading axes broadcast, so that θ may have more of them than x.

    Computes in float32 at least: mixed precision ends here.
    """

    params: int  # numbers the network gives a coordinate

    @abstractmethod
    def log_prob(
        self, x: Shaped[Tensor, " *shape"], theta: Float[Tensor, " *shape params"]
    ) -> Float[Tensor, " *shape"]:
        """Nats of the stored value, a coordinate."""

    @abstractmethod
    def mean(self, theta: Float[Tensor, " *shape params"]) -> Float[Tensor, " *shape"]:
        """Expectation, float, in data units."""

    @abstractmethod
    def sample(self, theta: Float[Tensor, " *shape params"]) -> Shaped[Tensor, " *shape"]:
        """A draw, as stored."""


def stored_dtype(levels: int) -> torch.dtype:
    """uint8 up to 256 levels, int64 above."""
    return torch.uint8 if levels <= 256 else torch.int64


def to_network(x: Shaped[Tensor, " *shape"], data: DataSpec, dtype: torch.dtype) -> Float[Tensor, " *shape"]:
    """What a network is fed: the levels spread evenly over [−1, 1], real values as they are."""
    x = x.to(dtype)
    return x if data.levels is None else 2 * x / (data.levels - 1) - 1


def from_network(x: Float[Tensor, " *shape"], data: DataSpec) -> Float[Tensor, " *shape"]:
    """The inverse of `to_network`, clipped to the range of the data; float."""
    x = promote(x)
    return x if data.levels is None else ((x + 1) * (data.levels - 1) / 2).clamp(0, data.levels - 1)


def to_stored(x: Float[Tensor, " *shape"], data: DataSpec) -> Shaped[Tensor, " *shape"]:
    """The nearest value that can be stored."""
    return (x if data.levels is None else x.round()).to(data.dtype)
