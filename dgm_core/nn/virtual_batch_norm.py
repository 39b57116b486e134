"""Virtual batch normalisation: statistics of a fixed reference batch and of the example itself, of no other.

T. Salimans et al., 2016. arXiv:1606.03498, section 3.5. The reference batch goes through the network with every batch,
at the parameters of the moment, so that gradients reach them through its statistics too; it costs a second pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


class VirtualBatchNorm(nn.Module):
    """Of axis 1 of (r + B, C, *grid), whose first r rows are the reference batch.

    Those are normalised by their own mean and variance, as batch normalisation would; an example by the moments of
    the r + 1 examples that it makes together with them. Nothing differs between training and evaluation.
    """

    def __init__(self, channels: int, reference: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.reference, self.eps = reference, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, " R C *grid"]) -> Float[Tensor, " R C *grid"]:
        axes = tuple(range(2, x.ndim))
        full = promote(x)
        mean = full.mean(axes, keepdim=True) if axes else full  # (R, C, 1 …), each example's own
        square = (full - mean).square().mean(axes, keepdim=True) if axes else torch.zeros_like(full)
        r = self.reference
        reference = mean[:r].mean(0, keepdim=True)
        spread = square[:r].mean(0, keepdim=True) + (mean[:r] - reference).square().mean(0, keepdim=True)
        # Moments of a union, by the parts' deviations from its mean: nothing cancels.
        together = reference + (mean[r:] - reference) / (r + 1)
        theirs = spread + (reference - together).square()
        own = square[r:] + (mean[r:] - together).square()
        centre = torch.cat([reference.expand_as(mean[:r]), together])
        variance = torch.cat([spread.expand_as(mean[:r]), (r * theirs + own) / (r + 1)])
        lift = (-1, *(1,) * len(axes))
        y = (full - centre) * (variance + self.eps).rsqrt() * self.weight.reshape(lift) + self.bias.reshape(lift)
        return y.to(x.dtype)


class WithReference(nn.Module):
    """A network with virtual batch normalisation, and its reference batch of latents: (B, latents) -> (B, *shape).

    The batch is drawn at the start and never again. It is a buffer, so that it is every rank's, is saved, and comes
    along where weights are taken over: other latents would make another network of them.
    """

    latents: Tensor

    def __init__(self, network: nn.Module, latents: Float[Tensor, " r latents"]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("latents", latents)

    def forward(self, z: Float[Tensor, " B latents"]) -> Float[Tensor, " B *shape"]:
        reference = self.latents
        return self.network(torch.cat([reference, z.to(reference.dtype)]))[reference.shape[0] :]
