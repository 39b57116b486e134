"""Spectral normalisation: a layer's weight over its largest singular value, so that the layer is 1-Lipschitz.

T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida, 2018. arXiv:1802.05957. W̄ = W / σ(W) (eq. 8) with σ(W) = uᵀ W v, u and v
by power iteration (algorithm 1). The iteration is no part of `forward`, as it is in torch's own: `advance`, called once
a play from a model's `after`, moves u and v at the weights that the play left. So a pass changes nothing, however often
it is taken (microbatches, recomputed activations, evaluation), and ranks, whose weights agree, agree in u and v.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from jaxtyping import Float

STARTS = 20  # iterations at a layer's start, where one a play has not yet added up


class SpectralNorm(nn.Module):
    """W / uᵀ W v, W as a matrix of (outputs, all others); the gradient takes u and v for constants."""

    u: Tensor
    v: Tensor

    def __init__(self, weight: Float[Tensor, " O *others"]) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("v", torch.zeros_like(matrix[0]))
        self.iterate(weight, 0 if weight.is_meta else STARTS)  # without values there is nothing to follow

    def forward(self, weight: Float[Tensor, " O *others"]) -> Float[Tensor, " O *others"]:
        # A sum of products: a product of matrices would be taken in half precision where networks are.
        sigma = (weight.flatten(1) * torch.outer(self.u, self.v)).sum()
        return weight / sigma

    @torch.no_grad()
    def iterate(self, weight: Float[Tensor, " O *others"], times: int = 1) -> None:
        matrix = weight.flatten(1)
        for _ in range(times):
            self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
            self.u.copy_(F.normalize(matrix @ self.v, dim=0))


def spectrally_normalise(
    module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear, nn.Embedding)
) -> None:
    """Give every layer of these kinds within `module` a normalised weight, from the one that it has now."""
    for layer in list(module.modules()):
        if isinstance(layer, kinds):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(cast("Tensor", layer.weight)))


def advance(module: nn.Module, times: int = 1) -> None:
    """Power iteration for every normalised layer within; call it from `after`, where the weights have moved."""
    for layer in module.modules():
        if isinstance(layer, parametrize.ParametrizationList):
            for part in layer:
                if isinstance(part, SpectralNorm):
                    part.iterate(cast("Tensor", layer.original), times)
