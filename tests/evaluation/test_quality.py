"""Distances between sets of points, against closed forms, enumeration and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from dgm_core.contract import DataMismatch
from dgm_core.evaluation import quality


def spd(n: int) -> Tensor:
    A = torch.randn(n, n, dtype=torch.float64)
    return A @ A.T + 0.1 * torch.eye(n, dtype=torch.float64)


def points(n: int, d: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64)


def test_frechet_of_two_gaussians_on_the_line():
    mean = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    got = quality.frechet_of_moments(mean[0], torch.tensor([[4.0]]).double(), mean[1], torch.tensor([[9.0]]).double())
    assert got == pytest.approx(3**2 + (2 - 3) ** 2, abs=1e-12)


def test_frechet_where_the_covariances_do_not_commute():
    """Σ_b = M Σ_a M with M positive definite: (Σ_a Σ_b)^½ has the trace of Σ_a M, for M is the optimal map."""
    a, M = spd(4), spd(4)
    assert not torch.allclose(a @ M, M @ a)
    b, mean = M @ a @ M, torch.randn(4, dtype=torch.float64)
    expected = mean.square().sum() + a.trace() + b.trace() - 2 * (a @ M).trace()
    got = quality.frechet_of_moments(mean, a, torch.zeros_like(mean), b)
    assert got == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_of_singular_covariances():
    """Two points on a line in ten dimensions: everything lies along one direction."""
    e = torch.zeros(10, dtype=torch.float64)
    e[3] = 1
    a, b = torch.stack([0 * e, 2 * e]), torch.stack([1 * e, 5 * e])
    assert quality.frechet(a, b) == pytest.approx((1 - 3) ** 2 + (math.sqrt(2) - math.sqrt(8)) ** 2, abs=1e-9)
    assert quality.frechet(a, a) == pytest.approx(0, abs=1e-9)


class _AsIs(nn.Module):
    """torchmetrics asks for a network; the features are there already."""

    num_features = 6

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_agrees_with_torchmetrics():
    """Of one subset with all points torchmetrics' kernel distance is ours; it computes in single precision."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = points(60, 6), 1.5 * points(60, 6) + 0.3
    fid = FrechetInceptionDistance(feature=_AsIs())
    kid = KernelInceptionDistance(feature=_AsIs(), subsets=1, subset_size=60)
    for metric in (fid, kid):
        metric.update(a.float(), real=True)
        metric.update(b.float(), real=False)
    assert quality.frechet(a, b) == pytest.approx(fid.compute().item(), rel=1e-4)
    assert quality.kid(a, b)[0] == pytest.approx(kid.compute()[0].item(), rel=1e-4)


@pytest.mark.parametrize("kernel", [quality.cubic, quality.negative_distance, quality.gaussian(0.7)])
def test_mmd2_is_unbiased(kernel: quality.Kernel):
    """Over all draws of two points from P and of two from Q on a small support, its mean is the true discrepancy."""
    support = points(3, 2)
    p, q = (torch.tensor(w, dtype=torch.float64) for w in ((0.2, 0.5, 0.3), (0.6, 0.1, 0.3)))
    k = kernel(support, support)
    for other in (q, p):  # with P = Q it is zero on average, not positive
        truth = p @ k @ p + other @ k @ other - 2 * (p @ k @ other)
        mean = torch.zeros((), dtype=torch.float64)
        for draw in itertools.product(range(3), repeat=4):
            weight = p[draw[0]] * p[draw[1]] * other[draw[2]] * other[draw[3]]
            mean += weight * quality.mmd2(support[list(draw[:2])], support[list(draw[2:])], kernel)[0]
        assert mean.item() == pytest.approx(truth.item(), abs=1e-12)


def test_mmd2_in_chunks_is_mmd2():
    a, b = points(37, 3), points(23, 3)
    whole, pieces = quality.kid(a, b, chunk=1000), quality.kid(a, b, chunk=5)
    assert pieces == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(40, 400), (400, 40)])
def test_the_error_of_mmd2_is_its_spread_over_draws(n: int, m: int):
    """Uneven sizes, so that either side's share of the error is tested on its own."""
    kernel = quality.gaussian(1.0)
    values, errors = zip(*(quality.mmd2(points(n, 2), points(m, 2) + 1, kernel) for _ in range(300)), strict=True)
    # A standard deviation of 300 draws is known to 1 / sqrt(600) = 4 %: allow three times that.
    spread = torch.tensor(values).std().item()
    assert torch.tensor(errors).square().mean().sqrt().item() == pytest.approx(spread, rel=0.12)


def test_energy_distance_of_two_pairs_by_hand():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    between = (1 + 5 + 1 + 3) / 4
    assert quality.energy_distance(a, b)[0] == pytest.approx(2 * between - 2 - 4)


def brute_prdc(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    def dist(a: Tensor, b: Tensor) -> float:
        return math.sqrt(((a - b) ** 2).sum().item())

    def radius(x: Tensor, i: int) -> float:
        return sorted(dist(x[i], x[j]) for j in range(len(x)) if j != i)[k - 1]

    n, m = len(real), len(fake)
    in_real = [[dist(real[i], fake[j]) <= radius(real, i) for j in range(m)] for i in range(n)]
    in_fake = [[dist(real[i], fake[j]) <= radius(fake, j) for j in range(m)] for i in range(n)]
    return {
        "precision": sum(any(in_real[i][j] for i in range(n)) for j in range(m)) / m,
        "recall": sum(any(row) for row in in_fake) / n,
        "density": sum(map(sum, in_real)) / (k * m),
        "coverage": sum(any(row) for row in in_real) / n,
    }


@pytest.mark.parametrize("chunk", [3, 1000])
def test_prdc_by_brute_force(chunk: int):
    real, fake = points(23, 2), 0.7 * points(17, 2) + 0.5
    got = quality.prdc(real, fake, k=3, chunk=chunk)
    assert got == pytest.approx(brute_prdc(real, fake, 3), abs=1e-12)
    assert 0 < got["precision"] < 1
    assert 0 < got["recall"] < 1
    assert 0 < got["coverage"] < 1


def test_prdc_needs_more_points_than_neighbours():
    with pytest.raises(DataMismatch, match="neighbours=5"):
        quality.prdc(points(5, 2), points(50, 2), k=5)


def test_nearest_by_brute_force():
    a, b = points(9, 3), points(11, 3)
    distance, index = quality.nearest(a, b, chunk=4)
    table = torch.stack([(b - row).norm(dim=1) for row in a])
    assert torch.equal(index, table.argmin(1))
    assert torch.allclose(distance, table.amin(1))


def test_modes_found():
    """Centres at 0 and 10, sd 1: eight good samples of the first, one of the second, one far from both."""
    samples = torch.tensor([0.0, 0.1, 0.2, -0.3, 2.9, -2.9, 1.0, -1.0, 10.5, 5.0])[:, None]
    found = quality.modes(samples, torch.tensor([[0.0], [10.0]]), 1.0)
    assert found["good_samples"] == pytest.approx(0.9)
    assert found["least_mode_share"] == pytest.approx(1 / 5)  # one, of a fair share of five
    assert found["modes_found"] == 2  # 20 % of its share is just enough
    assert quality.modes(samples, torch.tensor([[0.0], [10.0]]), 1.0, share=0.21)["modes_found"] == 1


def test_class_balance_is_total_variation():
    classes = torch.tensor([0, 0, 0, 1])
    assert quality.class_balance(classes, torch.tensor([0.75, 0.25, 0.0])) == pytest.approx(0)
    assert quality.class_balance(classes, torch.tensor([0.25, 0.25, 0.5])) == pytest.approx(0.5)
    assert quality.class_balance(classes, torch.tensor([0.0, 0.0, 1.0])) == pytest.approx(1)
