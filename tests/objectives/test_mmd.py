"""MMD against direct sums, the two-sample test against enumeration, the orthogonal penalty against its formula."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dgm_core import distributed
from dgm_core.objectives.mmd import MMD, rbf_mixture, two_sample_test
from dgm_core.objectives.orthogonal import orthogonal_penalty
from tests.support import TwoRanks

BANDWIDTHS = (0.5, 2.0)
# The same sums in another order, and distances by a product of matrices: float64 of values of order one.
EXACT = {"rtol": 0, "atol": 1e-12}


def samples(n: int, m: int, dims: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, dims, dtype=torch.float64), 0.5 + 1.5 * torch.randn(m, dims, dtype=torch.float64)


def kernel(a: Tensor, b: Tensor) -> float:
    squared = float((a - b).square().sum())
    return sum(math.exp(-squared / (2 * sigma**2)) for sigma in BANDWIDTHS)


def direct(x: Tensor, y: Tensor, unbiased: bool) -> float:
    """Gretton et al., equations 3 and 5, pair by pair."""

    def mean(a: Tensor, b: Tensor, skip: bool) -> float:
        pairs = [kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (skip and i == j)]
        return sum(pairs) / len(pairs)

    return mean(x, x, unbiased) - 2 * mean(x, y, False) + mean(y, y, unbiased)


@pytest.mark.parametrize("unbiased", [False, True])
def test_value_is_the_direct_sum(unbiased: bool) -> None:
    x, y = samples(7, 5)
    found = MMD(BANDWIDTHS, unbiased=unbiased)(x, y)
    assert found.item() == pytest.approx(direct(x, y, unbiased), abs=1e-12)
    if not unbiased:
        # The guard of 10⁻¹² under the root moves a root of order one by 10⁻¹².
        assert MMD(BANDWIDTHS, root=True)(x, y).item() == pytest.approx(math.sqrt(found.item()), abs=1e-11)


def test_kernel_of_images_is_that_of_their_pixels() -> None:
    x, y = samples(4, 3, 8)
    wanted = torch.tensor([[kernel(a, b) for b in y] for a in x], dtype=torch.float64)
    torch.testing.assert_close(rbf_mixture(x.view(4, 2, 2, 2), y.view(3, 2, 2, 2), BANDWIDTHS), wanted, **EXACT)


def test_zero_for_equal_samples_and_for_no_others() -> None:
    x, y = samples(9, 9)
    shuffled = x[torch.randperm(9)]
    assert MMD(BANDWIDTHS)(x, shuffled).item() == pytest.approx(0, abs=1e-12)
    assert MMD(BANDWIDTHS, root=True)(x, shuffled).item() < 1e-5  # √(10⁻¹² + rounding)
    assert MMD(BANDWIDTHS)(x, y).item() > 0.1


def test_equal_samples_give_a_finite_gradient_of_the_root() -> None:
    x, _ = samples(6, 6)
    x.requires_grad_()
    MMD(BANDWIDTHS, root=True)(x, x.detach()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"root": True}, {"unbiased": True}])
def test_gradient_is_that_of_differences(settings: dict[str, bool]) -> None:
    x, y = samples(4, 5, 2)
    assert torch.autograd.gradcheck(lambda v: MMD(BANDWIDTHS, **settings)(v, y), x.requires_grad_())


def test_the_unbiased_value_is_the_populations_in_the_mean() -> None:
    """Over every way to draw 3 of 5 examples for x and 2 of 4 for y the mean is that of all pairs of different ones."""
    x, y = samples(5, 4)
    estimate = MMD(BANDWIDTHS, unbiased=True)
    values = [
        estimate(x[list(a)], y[list(b)]).item()
        for a in itertools.combinations(range(5), 3)
        for b in itertools.combinations(range(4), 2)
    ]
    assert sum(values) / len(values) == pytest.approx(direct(x, y, True), abs=1e-12)


def test_no_root_of_what_may_be_negative() -> None:
    with pytest.raises(ValueError, match="no root"):
        MMD(BANDWIDTHS, unbiased=True, root=True)


def test_distances_survive_a_large_mean() -> None:
    """‖x‖² + ‖y‖² − 2 xᵀy at a mean of 1000 would be off by 3 · 10⁶ · 2⁻²³ = 0.4 in float32."""
    x, y = samples(6, 5)
    near = rbf_mixture(x, y, BANDWIDTHS)
    far = rbf_mixture((x + 1000).float(), (y + 1000).float(), BANDWIDTHS)
    # A coordinate of 1000 is right to 2⁻¹⁴ = 6 · 10⁻⁵.
    torch.testing.assert_close(far.double(), near, rtol=0, atol=2e-3)


def test_half_precision_of_networks_is_none_of_the_kernels() -> None:
    x, y = samples(6, 5)
    x, y = x.float(), y.float()
    with torch.autocast("cpu", torch.bfloat16):
        value, penalty = MMD(BANDWIDTHS)(x, y), orthogonal_penalty([x])
    assert torch.equal(value, MMD(BANDWIDTHS)(x, y))
    assert torch.equal(penalty, orthogonal_penalty([x]))


def _value_and_gradient() -> tuple[Tensor, Tensor]:
    x, y = samples(7, 7)
    mine = distributed.share(7)
    x = x.requires_grad_()
    value = MMD(BANDWIDTHS, root=True)(x[mine], y[mine])
    (value * (mine.stop - mine.start) / 7).backward()  # the trainer's weight of a rank's loss
    assert x.grad is not None
    return value.detach(), distributed.all_reduce(x.grad)


def test_two_ranks_share_the_sums(two_ranks: TwoRanks) -> None:
    value, gradient = _value_and_gradient()
    for found, slope in two_ranks.run(_value_and_gradient):
        torch.testing.assert_close(found, value, **EXACT)
        torch.testing.assert_close(slope, gradient, **EXACT)


def test_p_value_of_two_pairs_is_enumerated() -> None:
    """Of six ways to deal four examples out as two and two, two tell {0, 0.1} from {5, 5.1}: the given one and its
    mirror image, both of the same value. So p tends to ⅓, and a deal that mixes them to 1 − 0."""
    x = torch.tensor([[0.0], [0.1]])
    y = torch.tensor([[5.0], [5.1]])
    torch.manual_seed(0)
    apart = two_sample_test(x, y, (1.0,), permutations=4000)
    mixed = two_sample_test(torch.cat([x[:1], y[:1]]), torch.cat([x[1:], y[1:]]), (1.0,), permutations=4000)
    # Standard error √(⅓ · ⅔ / 4000) = 0.0075.
    assert apart.p_value.item() == pytest.approx(1 / 3, abs=0.04)
    assert mixed.p_value.item() > 0.5
    assert apart.statistic.item() == pytest.approx(MMD((1.0,), unbiased=True)(x.double(), y.double()).item(), abs=1e-12)


def test_level_and_power_of_the_test() -> None:
    """Under the null p is uniform: of 200 tests at level 0.1, 20 ± 4.2 reject. Another spread is found out."""
    torch.manual_seed(0)
    rejected = sum(
        float(two_sample_test(torch.randn(15, 2), torch.randn(12, 2), permutations=99).p_value) <= 0.1
        for _ in range(200)
    )
    assert 4 <= rejected <= 36  # four standard errors
    different = two_sample_test(torch.randn(80, 2), 2 * torch.randn(80, 2), permutations=199)
    assert different.p_value.item() == pytest.approx(1 / 200)


def test_a_test_needs_two_examples_on_either_side() -> None:
    with pytest.raises(ValueError, match="at least two"):
        two_sample_test(torch.zeros(1, 2), torch.zeros(4, 2))


@pytest.mark.parametrize("shape", [(4, 6), (7, 3), (3, 2, 2, 2)], ids=["wide", "tall", "convolution"])
def test_orthogonal_penalty_is_its_formula(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = weight.flatten(1).T  # a filter is a column
    wanted = ((w.T @ w) * (1 - torch.eye(shape[0], dtype=torch.float64))).square().sum()
    torch.testing.assert_close(orthogonal_penalty([weight]), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(orthogonal_penalty([weight, weight]), 2 * wanted, rtol=1e-12, atol=0)
    # d/dW ‖WᵀW ⊙ (1 − I)‖² = 4 W (WᵀW ⊙ (1 − I)).
    (found,) = torch.autograd.grad(orthogonal_penalty([weight]), weight)
    slope = 4 * w @ ((w.T @ w) * (1 - torch.eye(shape[0], dtype=torch.float64)))
    torch.testing.assert_close(found.flatten(1).T, slope, rtol=1e-9, atol=1e-9)


def test_orthogonal_weights_of_any_length_cost_nothing() -> None:
    torch.manual_seed(0)
    weight = torch.nn.init.orthogonal_(torch.empty(4, 6, dtype=torch.float64))
    scaled = weight * torch.tensor([[0.1], [1.0], [5.0], [2.0]], dtype=torch.float64)
    assert orthogonal_penalty([scaled]).item() == pytest.approx(0, abs=1e-25)  # (25 · 2⁻⁵³)² ≈ 10⁻²⁹ a pair
    scaled[1] += 0.1 * scaled[2]
    assert orthogonal_penalty([scaled]).item() > 0.1
