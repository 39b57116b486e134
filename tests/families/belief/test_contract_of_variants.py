"""The contract over the ways of learning that are no model's `tiny`."""

from __future__ import annotations

import pytest

from tests.contract import checks
from tests.families.belief.variants import VARIANTS, MeanField, Wide
from tests.support import SPECS, TwoRanks

SPEC = SPECS["binary_vector"]


@pytest.mark.parametrize("check", [*checks.PER_SPEC, checks.microbatches_equal_one_batch], ids=lambda f: f.__name__)
@pytest.mark.parametrize("model", VARIANTS)
def test_contract(check, model) -> None:
    check(model, SPEC)


@pytest.mark.parametrize("model", VARIANTS)
def test_two_ranks_equal_one(model, two_ranks: TwoRanks) -> None:
    checks.two_ranks_equal_one(model, SPEC, two_ranks)


@pytest.mark.parametrize("model", [MeanField, Wide])
def test_bounds_sum_to_at_most_one(model, monkeypatch) -> None:
    monkeypatch.setattr("dgm_core.models.belief.base.ENUMERABLE", 0)
    checks.probabilities_sum_to_one(model, SPEC, samples=1)


@pytest.mark.slow
@pytest.mark.parametrize("model", VARIANTS)
def test_learns_its_tiny_problem(model) -> None:
    checks.learns_its_tiny_problem(model, SPECS["binary_image"])
