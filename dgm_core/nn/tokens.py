"""Integers as a network takes them in: a grid of coordinates, as intensities or as embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from dgm_core.contract import DataSpec

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def grid_shape(data: DataSpec) -> tuple[int, int, int]:
    """(channels, height, width); codes have one channel, sequences and vectors one row as well."""
    return (*(1,) * (3 - len(data.shape)), *data.shape)  # type: ignore[return-value]


class TokenInput(nn.Module):
    """Integers (B, C, *grid) as features (B, width, *grid): intensities in [−1, 1], or embeddings of codes."""

    def __init__(self, data: DataSpec, features: int) -> None:
        super().__init__()
        self.levels = data.levels or 0
        self.codes = nn.Embedding(self.levels, features) if data.kind == "codes" else None
        self.width = features if self.codes is not None else grid_shape(data)[0]

    def forward(self, x: Int[Tensor, " B C *grid"], like: Tensor) -> Float[Tensor, " B width *grid"]:
        if self.codes is not None:
            return self.codes(x[:, 0].long()).movedim(-1, 1)
        x = x.to(like.dtype)
        return x * (2 / (self.levels - 1)) - 1 if self.levels else x
