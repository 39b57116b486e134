"""The contract, over every model in CATALOG and every kind of data that it accepts."""

from __future__ import annotations

import pytest

from dgm_core.capabilities import HasLikelihood
from dgm_core.contract import DataMismatch
from dgm_core.models import CATALOG
from dgm_core.nn.minibatch import MinibatchDeviation, MinibatchDiscrimination
from dgm_core.nn.norm import Moments
from dgm_core.objectives.mmd import MMD
from tests.contract import checks
from tests.support import SPECS, TwoRanks, accepted

MODELS = [pytest.param(model, id=name) for name, model in CATALOG.items()]
CASES = [pytest.param(model, SPECS[s], id=f"{n}-{s}") for n, model in CATALOG.items() for s in accepted(model)]
BATCHWISE = Moments | MinibatchDeviation | MinibatchDiscrimination | MMD


def fits(model: checks.Model, spec: object) -> bool:
    try:
        model(model.tiny(spec)[0], spec)  # type: ignore[arg-type]
    except DataMismatch:
        return False
    return True


ENUMERABLE = [
    pytest.param(model, spec, id=f"{name}-{s}")
    for name, model in CATALOG.items()
    for s, spec in checks.ENUMERABLE.items()
    if issubclass(model, HasLikelihood) and fits(model, spec)
]


@pytest.mark.parametrize("check", checks.PER_SPEC, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("model", "spec"), CASES)
def test_contract(check, model, spec) -> None:
    check(model, spec)


@pytest.mark.parametrize(("model", "spec"), CASES)
def test_two_ranks_equal_one(model, spec, two_ranks: TwoRanks) -> None:
    checks.two_ranks_equal_one(model, spec, two_ranks)


@pytest.mark.parametrize(("model", "spec"), CASES)
def test_microbatches_equal_one_batch(model, spec) -> None:
    instance, _ = checks.build(model, spec)
    if any(isinstance(module, BATCHWISE) for module in instance.modules()):
        pytest.skip("batch statistics: microbatches have others, by definition")
    checks.microbatches_equal_one_batch(model, spec)


@pytest.mark.parametrize(("model", "spec"), ENUMERABLE)
def test_probabilities_sum_to_one(model, spec) -> None:
    checks.probabilities_sum_to_one(model, spec)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "spec"), CASES)
def test_learns_its_tiny_problem(model, spec) -> None:
    checks.learns_its_tiny_problem(model, spec)


@pytest.mark.parametrize("model", MODELS)
def test_docstring_is_complete(model) -> None:
    checks.docstring_is_complete(model)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_tested_on_some_data(model) -> None:
    assert accepted(model)
