"""Means and covariances that follow the batches: added up in `loss`, settled in `after`, summed over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgm_core import distributed

if TYPE_CHECKING:
    from jaxtyping import Float


class RunningMoments(nn.Module):
    """Of `groups` vectors of `width` numbers each, over all other axes."""

    mean: Tensor
    covariance: Tensor
    count: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, groups: int, width: int = 1) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(groups, width))
        self.register_buffer("covariance", torch.zeros(groups, width, width))
        # What the play under way has shown so far.
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.register_buffer("first", torch.zeros(groups, width), persistent=False)
        self.register_buffer("second", torch.zeros(groups, width, width), persistent=False)

    @torch.no_grad()
    def add(self, values: Float[Tensor, " *B groups width"]) -> None:
        rows = values.flatten(0, -3)
        self.count += rows.shape[0]
        self.first += rows.sum(0)
        self.second += (rows[..., None] * rows[..., None, :]).sum(0)

    @torch.no_grad()
    def settle(self, rate: float) -> None:
        """Move by `rate` towards the play's mean and covariance, and forget the play."""
        distributed.sum_(self.count, self.first, self.second)
        mean = self.first / self.count
        self.covariance.lerp_(self.second / self.count - mean[:, :, None] * mean[:, None], rate)
        self.mean.lerp_(mean, rate)
        for total in (self.count, self.first, self.second):
            total.zero_()
