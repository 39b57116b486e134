"""Where half precision stops: it is for networks, not for what is made of their outputs and weights."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


def promote(x: Shaped[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """Float32, or float64 where `x` is."""
    return x if x.dtype == torch.float64 else x.float()


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within, products of matrices are taken in the precision of their factors, whatever the networks run in."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
