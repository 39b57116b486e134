"""Invertible 1 × 1 convolutions: one matrix that mixes the channels of every pixel alike.

D. P. Kingma, P. Dhariwal, 2018. arXiv:1807.03039, section 3.2, eqs. 9–11. Both start as a random rotation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.bijections.actnorm import ActNorm, Moments, StartsFromData
from dgm_core.bijections.base import Bijection, Context
from dgm_core.precision import full_precision, promote

if TYPE_CHECKING:
    from jaxtyping import Float


class InvertibleConvolution(Bijection):
    """z = W x at every pixel, log |det| = H · W · log |det W| (eq. 9)."""

    @abstractmethod
    def matrix(self) -> tuple[Float[Tensor, " C C"], Float[Tensor, ""]]:
        """W and log |det W|."""

    @abstractmethod
    def inverse_matrix(self) -> tuple[Float[Tensor, " C C"], Float[Tensor, ""]]:
        """W⁻¹ and log |det W⁻¹|."""

    def forward(
        self, x: Float[Tensor, " B C H W"], context: Context = None
    ) -> tuple[Float[Tensor, " B C H W"], Float[Tensor, " B"]]:
        with full_precision(x.device):
            return _mix(x, *self.matrix())

    def inverse(
        self, z: Float[Tensor, " B C H W"], context: Context = None
    ) -> tuple[Float[Tensor, " B C H W"], Float[Tensor, " B"]]:
        with full_precision(z.device):
            return _mix(z, *self.inverse_matrix())


class PlainConvolution(InvertibleConvolution):
    """The entries of W are learnt; its determinant costs O(C³)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(random_rotation(channels))

    def matrix(self) -> tuple[Float[Tensor, " C C"], Float[Tensor, ""]]:
        return self.weight, torch.linalg.slogdet(self.weight)[1]

    def inverse_matrix(self) -> tuple[Float[Tensor, " C C"], Float[Tensor, ""]]:
        return torch.linalg.inv(self.weight), -torch.linalg.slogdet(self.weight)[1]


class LUConvolution(InvertibleConvolution):
    """W = P L (U + diag(s)), eq. 10: the permutation P and the signs of s stay, the rest is learnt; log |det W| =
    Σ log |s| (eq. 11)."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        permutation, lower, upper = torch.linalg.lu(random_rotation(channels))
        diagonal = upper.diagonal()
        # L below the diagonal, U above it, log |s| on it.
        self.factors = nn.Parameter(lower.tril(-1) + upper.triu(1) + diagonal.abs().log().diag())
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())

    def matrix(self) -> tuple[Float[Tensor, " C C"], Float[Tensor, ""]]:
        lower, upper, log_det = self._factors()
        return self.permutation @ lower @ upper, log_det

    def inverse_matrix(self) -> tuple[Float[Tensor, " C C"], Float[Tensor, ""]]:
        lower, upper, log_det = self._factors()
        half = torch.linalg.solve_triangular(lower, self.permutation.mT, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, half, upper=True), -log_det

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        log_s = self.factors.diagonal()
        lower = self.factors.tril(-1) + torch.eye(len(log_s), dtype=log_s.dtype, device=log_s.device)
        return lower, self.factors.triu(1) + (self.sign * log_s.exp()).diag(), log_s.sum()


class NormalizedConvolution(Bijection, StartsFromData):
    """Activation normalisation, then a 1 × 1 convolution, in one pass over the image:
    W ((x + b) ⊙ s) = (W diag(s)) x + W (b ⊙ s)."""

    def __init__(self, norm: ActNorm, mix: InvertibleConvolution) -> None:
        super().__init__()
        self.norm, self.mix = norm, mix

    def start(self, x: Tensor, moments: Moments) -> None:
        self.norm.start(x, moments)

    def forward(
        self, x: Float[Tensor, " B C H W"], context: Context = None
    ) -> tuple[Float[Tensor, " B C H W"], Float[Tensor, " B"]]:
        with full_precision(x.device):
            weight, log_det = self.mix.matrix()
            log_slope = self.norm.log_slope()
            weight = weight * log_slope.exp()
            return _mix(x, weight, log_det + log_slope.sum(), weight @ self.norm.shift)

    def inverse(
        self, z: Float[Tensor, " B C H W"], context: Context = None
    ) -> tuple[Float[Tensor, " B C H W"], Float[Tensor, " B"]]:
        with full_precision(z.device):
            weight, log_det = self.mix.inverse_matrix()
            log_slope = self.norm.log_slope()
            return _mix(z, weight * (-log_slope).exp()[:, None], log_det - log_slope.sum(), -self.norm.shift)


def random_rotation(channels: int) -> Float[Tensor, " C C"]:
    """Uniform over the rotations: orthogonal, determinant 1."""
    q, r = torch.linalg.qr(torch.randn(channels, channels))
    q = q * r.diagonal().sign()
    first = q[:, :1] * torch.linalg.det(q).sign()
    return torch.cat([first, q[:, 1:]], 1)


def _mix(
    x: Float[Tensor, " B C H W"],
    weight: Float[Tensor, " C C"],
    log_det: Float[Tensor, ""],
    bias: Float[Tensor, " C"] | None = None,
) -> tuple[Float[Tensor, " B C H W"], Float[Tensor, " B"]]:
    z = F.conv2d(promote(x), weight[:, :, None, None], bias)
    return z, (log_det * math.prod(x.shape[2:])).expand(x.shape[0])
