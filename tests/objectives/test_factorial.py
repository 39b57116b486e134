"""Terms of predictability minimisation and measures of a code, on codes small enough to enumerate."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dgm_core.objectives import factorial

# The same float64 sums in another order.
EXACT = {"rtol": 0, "atol": 1e-13}
# Patterns a, b, c, d of section 7, shown once, twice, twice and four times; a factorial code of them and another.
TIMES = torch.tensor([1, 2, 2, 4])
CODE_F, CODE_B = ((1, 1), (0, 1), (1, 0), (0, 0)), ((0, 1), (0, 0), (1, 0), (1, 1))


def shown(code: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(code).double().repeat_interleave(TIMES, 0)


def expectations(y: Tensor) -> Tensor:
    """Of each unit, the mean over the examples on which all others are the same."""
    predicted = torch.empty_like(y)
    for i in range(y.shape[1]):
        others = torch.cat([y[:, :i], y[:, i + 1 :]], 1)
        for row in range(len(y)):
            predicted[row, i] = y[(others == others[row]).all(1), i].mean()
    return predicted


def random_bits(n: int = 40, units: int = 3) -> Tensor:
    """Dependent ones: each unit repeats the first in about a third of the examples."""
    g = torch.Generator().manual_seed(0)
    bits = torch.rand(n, units, generator=g) < torch.tensor([0.5, 0.3, 0.7])
    return torch.where(torch.rand(n, units, generator=g) < 1 / 3, bits[:, :1], bits)


def test_terms_are_their_formulae() -> None:
    g = torch.Generator().manual_seed(0)
    y, p = torch.rand(2, 5, 3, generator=g, dtype=torch.float64)
    conditioned = variance = predictability = 0.0
    for i in range(3):
        mean = sum(y[k, i].item() for k in range(5)) / 5
        for k in range(5):
            conditioned += (p[k, i].item() - y[k, i].item()) ** 2 / 10
            variance += (mean - y[k, i].item()) ** 2 / 10
            predictability += (p[k, i].item() - mean) ** 2 / 10
    assert factorial.conditioned_variance(y, p).item() == pytest.approx(conditioned, abs=1e-13)
    assert factorial.variance(y).item() == pytest.approx(variance, abs=1e-13)
    assert factorial.predictability(y, p).item() == pytest.approx(predictability, abs=1e-13)


def test_the_papers_codes_have_the_papers_values() -> None:
    """Section 7: V_C = 2 for the factorial code F and 19/10 for code B, summed over nine patterns."""
    for code, value in ((CODE_F, 2.0), (CODE_B, 1.9)):
        y = shown(code)
        assert 9 * factorial.conditioned_variance(y, expectations(y)).item() == pytest.approx(value, abs=1e-12)
    y = shown(CODE_F)
    assert factorial.predictability(y, expectations(y)).item() == pytest.approx(0, abs=1e-28)  # rounding, squared


def test_perfect_predictors_leave_the_variance_less_what_they_know() -> None:
    y = random_bits().double()
    predicted = expectations(y)
    left = factorial.variance(y) - factorial.predictability(y, predicted)
    torch.testing.assert_close(factorial.conditioned_variance(y, predicted), left, **EXACT)
    assert factorial.predictability(y, predicted) > 0.01


def test_variance_is_greatest_for_units_on_in_half_of_the_cases() -> None:
    half = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    assert factorial.variance(half).item() == 0.125  # ½ · ¼
    assert factorial.variance(half * 0.9).item() < 0.125
    assert factorial.variance(torch.tensor([[0.0], [1.0], [1.0], [1.0]]).double()).item() < 0.125


def enumerated(bits: Tensor, i: int, j: int) -> float:
    total, n = 0.0, len(bits)
    for a in (False, True):
        for b in (False, True):
            both = ((bits[:, i] == a) & (bits[:, j] == b)).sum().item() / n
            alone = (bits[:, i] == a).sum().item() * (bits[:, j] == b).sum().item() / n**2
            total += both * math.log(both / alone) if both else 0.0
    return total


def test_pairwise_information_is_the_sum_over_both() -> None:
    bits = random_bits()
    found = factorial.pairwise_information(bits)
    wanted = torch.tensor([[enumerated(bits, i, j) for j in range(3)] for i in range(3)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, **EXACT)
    torch.testing.assert_close(found.diag(), factorial.entropy(bits), **EXACT)
    assert found.min() > 0.003  # none of them is the trivial case


def test_independent_units_share_nothing_and_copies_everything() -> None:
    every = torch.cartesian_prod(*3 * [torch.tensor([False, True])])
    none = torch.diag(torch.full((3,), math.log(2), dtype=torch.float64))
    torch.testing.assert_close(factorial.pairwise_information(every), none, **EXACT)
    assert factorial.total_correlation(every).item() == pytest.approx(0, abs=1e-13)
    copies = every[:, :1].expand(-1, 3)
    torch.testing.assert_close(
        factorial.pairwise_information(copies), torch.full((3, 3), math.log(2), dtype=torch.float64), **EXACT
    )
    assert factorial.total_correlation(copies).item() == pytest.approx(2 * math.log(2), abs=1e-13)
    constant = torch.ones(4, 2, dtype=torch.bool)
    assert factorial.pairwise_information(constant).abs().max() == 0


def test_only_the_whole_code_shows_a_parity() -> None:
    two = torch.cartesian_prod(*2 * [torch.tensor([False, True])])
    parity = torch.cat([two, two[:, :1] ^ two[:, 1:]], 1)
    between = factorial.pairwise_information(parity)
    assert (between - between.diag().diag()).abs().max() < 1e-13
    assert factorial.total_correlation(parity).item() == pytest.approx(math.log(2), abs=1e-13)


def test_predictors_know_at_most_what_there_is_to_know() -> None:
    """With conditional probabilities, I(bᵢ; the others); with any others less, by their divergence."""
    bits = random_bits(400)
    exact = expectations(bits.double())
    found = factorial.predictors_information(bits, exact)
    # H(bᵢ) + H(others) − H(all), by counting codes.
    for i in range(3):
        others = torch.cat([bits[:, :i], bits[:, i + 1 :]], 1)
        whole = factorial.total_correlation(bits) - factorial.total_correlation(others)
        assert found[i].item() == pytest.approx(whole.item(), abs=1e-12)
    worse = factorial.predictors_information(bits, 0.5 * exact + 0.25)
    assert (worse < found).all()
    constant = bits.double().mean(0).expand(400, 3)
    torch.testing.assert_close(
        factorial.predictors_information(bits, constant), torch.zeros(3, dtype=torch.float64), **EXACT
    )
