"""Small reductions over the event axes that every family needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def sum_event(x: Float[Tensor, " B *event"]) -> Float[Tensor, " B"]:
    """Sum all axes but the first: (B, *event) -> (B,)."""
    return x.sum(tuple(range(1, x.ndim))) if x.ndim > 1 else x  # by axes: flattening copies channels-last images


def mean_event(x: Float[Tensor, " B *event"]) -> Float[Tensor, " B"]:
    """Average all axes but the first: (B, *event) -> (B,)."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


def left_expand(x: Float[Tensor, " B"], ndim: int) -> Float[Tensor, " B ..."]:
    """Append axes of length one until `x` has `ndim` axes, so that it broadcasts over the event."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))
