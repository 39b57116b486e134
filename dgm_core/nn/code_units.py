"""Code units, the predictors that each of them escapes, and histograms to draw codes from.

J. Schmidhuber, 1992. Neural Computation 4(6), 863-879; J. Schmidhuber, M. Eldracher, B. Foltin, 1996. Neural
Computation 8(4), 773-786.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.contract import DataMismatch
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


def _uniform(*shape: int, inputs: int) -> nn.Parameter:
    """As `torch.nn.Linear` starts."""
    return nn.Parameter(torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5))


class Units(nn.Module):
    """Code units: a perceptron, or sigmoids of what each sees: (B, *shape) -> (B, n) in [0, 1]."""

    sees: Tensor

    def __init__(self, shape: tuple[int, ...], n: int, hidden: int, field: float | None) -> None:
        super().__init__()
        dims = math.prod(shape)
        self.hidden = nn.Linear(dims, hidden) if hidden else None
        self.weight, self.bias = (_uniform(*s, inputs=hidden or dims) for s in ((n, hidden or dims), (n,)))
        seen = torch.ones(1, 1) if field is None else discs(shape, n, field)
        self.register_buffer("sees", seen, persistent=False)

    def forward(self, x: Float[Tensor, " B *shape"]) -> Float[Tensor, " B n"]:
        h = x.flatten(1) if self.hidden is None else self.hidden(x.flatten(1)).tanh()
        return promote(nn.functional.linear(h, self.weight * self.sees, self.bias)).sigmoid()


class Predictors(nn.Module):
    """Of each unit's activation, from the others': (B, n) -> (B, n) in [0, 1]."""

    others: Tensor

    def __init__(self, n: int, hidden: int) -> None:
        super().__init__()
        k = torch.arange(n - 1)
        self.register_buffer("others", k + (k >= torch.arange(n)[:, None]), persistent=False)
        self.hidden = _uniform(n, n - 1, hidden, inputs=n - 1) if hidden else None
        self.hidden_bias = _uniform(n, hidden, inputs=n - 1) if hidden else None
        self.weight, self.bias = (_uniform(*s, inputs=hidden or n - 1) for s in ((n, hidden or n - 1), (n,)))

    def forward(self, y: Float[Tensor, " B n"]) -> Float[Tensor, " B n"]:
        h = y[:, self.others]
        if self.hidden is not None and self.hidden_bias is not None:
            h = (torch.einsum("bik,ikh->bih", h, self.hidden) + self.hidden_bias).tanh()
        return promote((h * self.weight).sum(-1) + self.bias).sigmoid()


class Marginals(nn.Module):
    """Histograms of every unit's activations over the last hundred plays, and independent draws from them."""

    shares: Tensor
    counts: Tensor
    plays: Tensor

    def __init__(self, n: int, bins: int = 64) -> None:
        super().__init__()
        self.register_buffer("shares", torch.full((n, bins), 1 / bins))
        self.register_buffer("plays", torch.zeros(()))
        self.register_buffer("counts", torch.zeros(n, bins), persistent=False)

    @torch.no_grad()
    def add(self, y: Float[Tensor, " B n"]) -> None:
        bins = self.counts.shape[1]
        index = (y * bins).long().clamp(0, bins - 1).T
        self.counts.scatter_add_(1, index, torch.ones_like(index, dtype=self.counts.dtype))

    @torch.no_grad()
    def settle(self, *, afresh: bool = False) -> None:
        """Move towards what was added since the last time, or stand there; nowhere if nothing was."""
        distributed.sum_(self.counts)
        total = self.counts.sum(1, keepdim=True)
        seen = (total > 0).to(total)
        self.plays += seen[0, 0]
        rate = seen if afresh else seen / self.plays.clamp(1, 100)
        self.shares.lerp_(self.counts / total.clamp_min(1), rate)
        self.counts.zero_()

    def draw(self, n: int) -> Float[Tensor, " n codes"]:
        """By the inverse of the distribution function, linear within a bin."""
        u = torch.rand(n, self.shares.shape[0], device=self.shares.device, dtype=self.shares.dtype).T.contiguous()
        above, last = self.shares.cumsum(1), self.shares.shape[1] - 1
        index = torch.searchsorted(above, u, right=True).clamp_max(last)
        share = self.shares.gather(1, index)
        within = 1 - (above.gather(1, index) - u) / share.clamp_min(1e-12)
        return ((index + within.clamp(0, 1)) / (last + 1)).T


def discs(shape: tuple[int, ...], n: int, diameter: float) -> Float[Tensor, " n D"]:
    """One where a unit sees: discs whose middles lie on a sunflower's spiral, all of them within the image."""
    if len(shape) != 3:
        raise DataMismatch(
            f"receptive_field is a disc of an image's pixels; the data's shape is {shape}. Leave it out."
        )
    if diameter > min(shape[1:]):
        raise DataMismatch(
            f"receptive_field {diameter:g} does not fit into images of {shape[1]} × {shape[2]} pixels; give at most "
            f"{min(shape[1:])}."
        )
    channels, height, width = shape
    k = torch.arange(n, dtype=torch.float64)
    radius, angle = ((k + 0.5) / n).sqrt() * (min(height, width) - diameter) / 2, k * math.pi * (3 - 5**0.5)
    rows = torch.arange(height) + 0.5 - height / 2 - (radius * angle.sin())[:, None]
    columns = torch.arange(width) + 0.5 - width / 2 - (radius * angle.cos())[:, None]
    inside = rows.square()[:, :, None] + columns.square()[:, None] <= (diameter / 2) ** 2
    return inside[:, None].expand(n, channels, height, width).flatten(1).float()
