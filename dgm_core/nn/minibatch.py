"""Layers that let a discriminator look at a batch as a whole, so that it can tell a generator that has collapsed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


class MinibatchDiscrimination(nn.Module):
    """How near each example is to the others of its batch, in learnt projections: (B, features) -> (B, kernels).

    T. Salimans et al., 2016. arXiv:1606.03498, section 3.2: with M_i = f(x_i) T of kernels × dims numbers,

        o(x_i)_b = Σ_j exp(−‖M_ib − M_jb‖₁),

    over all ranks' examples. As in the authors' code j ≠ i: the paper's sum has the constant exp(0) = 1 besides. T
    starts with columns of about unit length, as theirs do.
    """

    def __init__(self, features: int, kernels: int, dims: int = 5) -> None:
        super().__init__()
        self.shape = (kernels, dims)
        self.projection = nn.Parameter(torch.randn(features, kernels * dims) / features**0.5)

    def forward(self, f: Float[Tensor, " B features"]) -> Float[Tensor, " B kernels"]:
        m = f @ self.projection
        m = promote(m).unflatten(1, self.shape)
        everyone = distributed.gather_rows(m)
        distance = torch.cdist(m.transpose(0, 1), everyone.transpose(0, 1), p=1)  # (kernels, b, B)
        return (-distance).exp().sum(-1).T - 1


class MinibatchDeviation(nn.Module):
    """The batch's spread as one more channel, the same number everywhere: (B, C, H, W) -> (B, C + 1, H, W).

    T. Karras et al., 2018. arXiv:1710.10196, section 3: the standard deviation of each feature at each position over
    all ranks' examples, averaged over features and positions. It does not know the order of the examples.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B C+1 H W"]:
        f = promote(x)
        count = distributed.all_reduce(f.new_full((), f.shape[0]))
        deviation = f - distributed.all_reduce(f.sum(0)) / count
        variance = distributed.all_reduce(deviation.square().sum(0)) / count
        spread = (variance + self.eps).sqrt().mean().to(x.dtype)
        return torch.cat([x, spread.expand(x.shape[0], 1, *x.shape[2:])], 1)
