"""Images and sequences of latents, one a block of rows: an encoder of what is to come, a decoder's condition, a prior.

A. Razavi et al., 2019. arXiv:1901.03416, section 2.2: a decoder that goes through the rows in order knows what came
before, so that the latents of a row are to say what it and the rows below have in store.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.causal import Pointwise, VerticalConv, shift_right
from dgm_core.nn.dilated import DilatedConv, DilatedStack
from dgm_core.nn.encoders import dense
from dgm_core.nn.gated import GatedResidual
from dgm_core.nn.stack import Stack
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


class AntiCausal(nn.Module):
    """(B, C, H, W) -> (B, n, outputs): what is said of a block of rows sees these and the rows below, none above."""

    def __init__(
        self, shape: tuple[int, ...], rows: int, outputs: int, *, features: int, depth: int, kernel: int
    ) -> None:
        super().__init__()
        colours, _, width = shape
        conv = partial(VerticalConv, kernel=kernel)
        self.rows = rows
        self.enter = conv(colours, features)
        self.blocks = Stack(GatedResidual(features, features, conv) for _ in range(depth))
        self.head = nn.Linear(features * rows * width, outputs)

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B n outputs"]:
        h = self.enter(x.flip(2))  # these convolutions see rows above
        for block in self.blocks:
            h = block(h)
        return self.head(F.elu(h).flip(2).unflatten(2, (-1, self.rows)).movedim(2, 1).flatten(2))


class Rows(nn.Module):
    """(B, n, d) -> (B, features, H, W): each z_t becomes the condition of its rows."""

    def __init__(self, shape: tuple[int, ...], rows: int, latents: int, hidden: int, features: int) -> None:
        super().__init__()
        self.block = (features, rows, shape[2])
        self.map = dense([latents, hidden, features * rows * shape[2]])

    def forward(self, z: Float[Tensor, " B n d"]) -> Float[Tensor, " B features H W"]:
        return self.map(z).unflatten(2, self.block).movedim(1, 2).flatten(2, 3)


class Auxiliary(nn.Module):
    """What is added to the mean and log-variance of z_t, given z_1 … z_{t−1}; nothing at first."""

    def __init__(self, n: int, latents: int, features: int) -> None:
        super().__init__()
        dilations = [2**i for i in range(max(1, math.ceil(math.log2(n))))]
        self.enter = DilatedConv(latents, features, 2)
        self.stack = DilatedStack(features, features, features, kernel=2, dilations=dilations)
        self.bias = nn.Parameter(torch.zeros(features, 1, 1))  # of the sum of skip connections
        self.out = Pointwise(features, 2 * latents)
        nn.init.zeros_(self.out.weight)

    def forward(self, z: Float[Tensor, " B n d"]) -> tuple[Float[Tensor, " B n d"], Float[Tensor, " B n d"]]:
        h = self.enter(shift_right(z.mT[:, :, None]))
        shift, log_scale = promote(self.out(F.elu(self.stack(h, None) + self.bias)))[:, :, 0].mT.chunk(2, 2)
        return shift, log_scale
