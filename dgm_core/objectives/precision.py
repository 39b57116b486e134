"""Where half precision stops: it is for networks, not for what an objective makes of their outputs and weights."""

from __future__ import annotations

import contextlib

import torch


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within, products of matrices are taken in the precision of their factors, whatever the networks run in."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
