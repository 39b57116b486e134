"""How good samples are, as sets of points: no likelihood needed.

Distances are measured on a judge's features (or on standardised coordinates), never on an Inception network's:
`frechet` is not `fid`. Everything is deterministic in its inputs, runs in float64 and in chunks. torchmetrics has
Fréchet and kernel distances too; its kernel distance draws random subsets, and importing it costs more than all of
this, so it serves as the tests' reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.contract import DataMismatch

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, F), (m, F) -> (n, m)


def frechet(a: Float[Tensor, "n F"], b: Float[Tensor, "m F"]) -> float:
    """Between Gaussians with the two sets' moments (Heusel et al. 2017, eq. 6)."""
    return frechet_of_moments(*_moments(a), *_moments(b))


def frechet_of_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½).

    Σ_a Σ_b has the eigenvalues of the symmetric Σ_a^½ Σ_b Σ_a^½, so that a singular covariance does no harm and no
    matrix square root of a non-symmetric matrix is taken.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.clamp_min(0).item()


def mmd2(a: Float[Tensor, "n F"], b: Float[Tensor, "m F"], kernel: Kernel, chunk: int = 1024) -> tuple[float, float]:
    """The unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3), and its error.

    It may be negative. The standard error is the U-statistic's first-order one, 4 Var[h] / n on either side.
    """
    a, b = a.double(), b.double()
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise DataMismatch(f"{n} and {m} points were given to compare; at least 2 of each are needed")
    aa, bb = (
        _row_sums(a, a, kernel, chunk) - _own(a, kernel, chunk),
        _row_sums(b, b, kernel, chunk) - _own(b, kernel, chunk),
    )
    ab, ba = _row_sums(a, b, kernel, chunk), _row_sums(b, a, kernel, chunk)
    value = aa.sum() / (n * (n - 1)) + bb.sum() / (m * (m - 1)) - 2 * ab.sum() / (n * m)
    variance = 4 * (aa / (n - 1) - ab / m).var() / n + 4 * (bb / (m - 1) - ba / n).var() / m
    return value.item(), variance.sqrt().item()


def cubic(a: Float[Tensor, "n F"], b: Float[Tensor, "m F"]) -> Float[Tensor, "n m"]:
    """(xᵀy / F + 1)³ (Bińkowski et al. 2018, sec. 4)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def negative_distance(a: Float[Tensor, "n F"], b: Float[Tensor, "m F"]) -> Float[Tensor, "n m"]:
    """−‖x − y‖: the squared discrepancy with this kernel is the energy distance 2 E‖X − Y‖ − E‖X − X′‖ − E‖Y − Y′‖."""
    return -_distances(a, b)


def gaussian(scale: float) -> Kernel:
    """exp(−‖x − y‖² / (2 scale²))."""
    return lambda a, b: torch.exp(-0.5 * (_distances(a, b) / scale).square())


def kid(a: Float[Tensor, "n F"], b: Float[Tensor, "m F"], chunk: int = 1024) -> tuple[float, float]:
    """Kernel distance on all pairs, with the cubic kernel, and its standard error."""
    return mmd2(a, b, cubic, chunk)


def energy_distance(a: Float[Tensor, "n F"], b: Float[Tensor, "m F"], chunk: int = 1024) -> tuple[float, float]:
    """Unbiased, with its standard error (Székely & Rizzo 2013)."""
    return mmd2(a, b, negative_distance, chunk)


def median_distance(x: Float[Tensor, "n F"], most: int = 1000) -> float:
    """Between pairs of different points: the usual scale of a Gaussian kernel."""
    x = x[torch.linspace(0, len(x) - 1, min(len(x), most)).round().long()].double()
    return torch.pdist(x).median().clamp_min(1e-12).item()


def prdc(real: Float[Tensor, "n F"], fake: Float[Tensor, "m F"], k: int = 5, chunk: int = 1024) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), in chunks of rows.

    A point's ball reaches to its k-th nearest neighbour within its own set. Precision: share of samples within some
    real ball. Recall: share of real points within some sample's ball. Density: how many real balls hold a sample, over
    k. Coverage: share of real balls that hold a sample.
    """
    real, fake = real.double(), fake.double()
    if min(len(real), len(fake)) <= k:
        raise DataMismatch(f"neighbours={k} needs more than {k} points a side; given {len(real)} and {len(fake)}")
    real_radius, fake_radius = _radii(real, k, chunk), _radii(fake, k, chunk)
    held = torch.zeros(len(fake), dtype=torch.int64)  # real balls that hold each sample
    recalled, covered = 0, 0
    for rows, radius in zip(real.split(chunk), real_radius.split(chunk), strict=True):
        distance = _distances(rows, fake)
        inside = distance <= radius[:, None]
        held += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((distance <= fake_radius).any(1).sum())
    n, m = len(real), len(fake)
    return {
        "precision": (held > 0).sum().item() / m,
        "recall": recalled / n,
        "density": held.sum().item() / (k * m),
        "coverage": covered / n,
    }


def nearest(queries: Float[Tensor, "n F"], points: Float[Tensor, "m F"], chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Of each query the distance to the nearest point, and which that is."""
    found = [_distances(rows, points.double()).min(1) for rows in queries.double().split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def modes(
    samples: Float[Tensor, "n D"], centres: Float[Tensor, "M D"], sd: float, share: float = 0.2, reach: float = 3.0
) -> dict[str, float]:
    """Of a mixture of M equal Gaussians.

    `good_samples`: share of the samples within `reach` standard deviations of a centre. A mode is found if at least
    `share` of its fair share n / M are good samples of it; `least_mode_share` is the poorest mode's, of a fair share.
    """
    distance, mode = nearest(samples, centres)
    good = distance <= reach * sd
    fair = torch.bincount(mode[good], minlength=len(centres)) / (len(samples) / len(centres))
    return {
        "modes_found": float((fair >= share).sum()),
        "least_mode_share": fair.min().item(),
        "good_samples": good.double().mean().item(),
    }


def class_balance(classes: Int[Tensor, " n"], shares: Float[Tensor, " classes"]) -> float:
    """Total variation between the classes' shares and those of the data: 0 is alike, 1 is disjoint."""
    found = torch.bincount(classes, minlength=len(shares)).double() / len(classes)
    return 0.5 * (found - shares.double()).abs().sum().item()


def _moments(x: Float[Tensor, "n F"]) -> tuple[Tensor, Tensor]:
    if len(x) < 2:
        raise DataMismatch("a covariance needs at least 2 points")
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def _row_sums(a: Tensor, b: Tensor, kernel: Kernel, chunk: int) -> Float[Tensor, " n"]:
    return torch.cat([kernel(rows, b).sum(1) for rows in a.split(chunk)])


def _own(x: Tensor, kernel: Kernel, chunk: int) -> Float[Tensor, " n"]:
    """k(x_i, x_i)."""
    size = max(1, math.isqrt(chunk))
    return torch.cat([kernel(rows, rows).diagonal() for rows in x.split(size)])


def _distances(a: Float[Tensor, "n F"], b: Float[Tensor, "m F"]) -> Float[Tensor, "n m"]:
    # Through a matrix product the distance of a point to itself comes out as 1e-8, which an equality test notices.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x: Float[Tensor, "n F"], k: int, chunk: int) -> Float[Tensor, " n"]:
    """To the k-th nearest other point: the smallest distance is a point's own."""
    return torch.cat([_distances(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(chunk)])
