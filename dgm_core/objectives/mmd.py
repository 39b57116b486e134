"""Maximum mean discrepancy: how far apart two distributions are, from samples of both, in the means of a kernel's
features.

    MMD²(p, q) = E k(x, x') − 2 E k(x, y) + E k(y, y'),   x, x' ~ p and y, y' ~ q,

zero if and only if p = q for a characteristic kernel such as the Gaussian. A. Gretton, K. Borgwardt, M. Rasch, B.
Schölkopf, A. Smola, 2012. A kernel two-sample test, JMLR 13: lemma 6 has both estimators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.precision import full_precision, promote

if TYPE_CHECKING:
    from jaxtyping import Float


def rbf_mixture(
    x: Float[Tensor, " N *event"], y: Float[Tensor, " M *event"], bandwidths: Sequence[float]
) -> Float[Tensor, " N M"]:
    """k(x, y) = Σ_σ exp(−‖x − y‖² / 2σ²), the sum over the bandwidths."""
    squared = _squared_distances(promote(x.flatten(1)), promote(y.flatten(1)))
    total = torch.zeros_like(squared)
    for sigma in bandwidths:
        total = total + (squared * (-0.5 / sigma**2)).exp()
    return total


class MMD(nn.Module):
    """An estimate of MMD² of the mixture kernel between all ranks' x and all ranks' y; the same number on every rank.

    `unbiased` leaves each example's kernel with itself out, so that its expectation is MMD², and it may be negative;
    else the value is the squared distance between the samples themselves, never negative and zero for equal ones.
    `root` gives √MMD², whose gradient does not vanish as the two come together; of a biased value only. It is no mean
    over examples: microbatches do not add up to one batch.
    """

    def __init__(self, bandwidths: Sequence[float], *, unbiased: bool = False, root: bool = False) -> None:
        super().__init__()
        if root and unbiased:
            raise ValueError("an unbiased MMD² may be negative and has no root: take the biased one, or no root")
        self.bandwidths, self.unbiased, self.root = tuple(bandwidths), unbiased, root

    def forward(self, x: Float[Tensor, " b *event"], y: Float[Tensor, " c *event"]) -> Float[Tensor, ""]:
        # This rank's rows against everyone's: the work is shared, the sums are not.
        all_x, all_y = distributed.gather_rows(x), distributed.gather_rows(y)
        pairs = ((x, all_x), (x, all_y), (y, all_y))
        sums = torch.stack([rbf_mixture(a, b, self.bandwidths).sum() for a, b in pairs])
        n, m = all_x.shape[0], all_y.shape[0]
        squared = _combine(distributed.all_reduce(sums), n, m, len(self.bandwidths), self.unbiased)
        # Equal samples: rounding may fall below zero, and the root has no derivative there.
        return (squared.clamp_min(0) + 1e-12).sqrt() if self.root else squared


def _combine(sums: Float[Tensor, " 3"], n: int, m: int, diagonal: float, unbiased: bool) -> Float[Tensor, ""]:
    xx, xy, yy = sums
    if unbiased:
        return (xx - n * diagonal) / (n * (n - 1)) - 2 * xy / (n * m) + (yy - m * diagonal) / (m * (m - 1))
    return xx / n**2 - 2 * xy / (n * m) + yy / m**2


class TwoSampleTest(NamedTuple):
    """Whether two samples come from one distribution."""

    statistic: Float[Tensor, ""]  # the unbiased MMD²
    p_value: Float[Tensor, ""]


@torch.no_grad()
def two_sample_test(
    x: Float[Tensor, " n *event"],
    y: Float[Tensor, " m *event"],
    bandwidths: Sequence[float] | None = None,
    *,
    permutations: int = 1000,
) -> TwoSampleTest:
    """The permutation test of p = q by the unbiased MMD², in this process.

    Under p = q all ways to deal the pooled examples out into n and m are equally likely, so that the rank of the
    statistic among random ones is uniform: p = (1 + #{MMD²_π ≥ MMD²}) / (1 + permutations) is at most α with
    probability at most α, for samples of any size.

    Args:
        bandwidths: of the kernel; without them the median distance between pooled examples (Gretton et al., section 8).
    """
    n, m = x.shape[0], y.shape[0]
    if min(n, m) < 2:
        raise ValueError(f"a test needs at least two examples on either side; given {n} and {m}")
    pooled = torch.cat([x.flatten(1), y.flatten(1)]).double()
    if bandwidths is None:
        distances = _squared_distances(pooled, pooled).sqrt()
        off_diagonal = distances[~torch.eye(n + m, dtype=torch.bool, device=pooled.device)]
        bandwidths = (float(off_diagonal.median().clamp_min(1e-12)),)
    kernel = rbf_mixture(pooled, pooled, bandwidths).fill_diagonal_(0)
    # Row 0 is how the examples came; the sums of every way to deal them out are two matrix products.
    dealt = torch.zeros(1 + permutations, n + m, dtype=kernel.dtype, device=kernel.device)
    dealt[0, :n] = 1
    order = torch.rand(permutations, n + m, device=kernel.device).argsort(1)
    dealt[1:].scatter_(1, order[:, :n], 1.0)
    with_x = dealt @ kernel
    xx = (with_x * dealt).sum(1)
    xy = with_x.sum(1) - xx
    values = _combine(torch.stack([xx, xy, kernel.sum() - xx - 2 * xy]), n, m, 0.0, unbiased=True)
    as_large = (values[1:] >= values[0]).sum()
    return TwoSampleTest(values[0], (1 + as_large) / (1 + permutations))


def _squared_distances(x: Float[Tensor, " N D"], y: Float[Tensor, " M D"]) -> Float[Tensor, " N M"]:
    """‖xᵢ − yⱼ‖² by one matrix product, about y's centre so that little cancels."""
    centre = y.detach().mean(0)
    x, y = x - centre, y - centre
    with full_precision(x.device):
        product = x @ y.T
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * product).clamp_min(0)
