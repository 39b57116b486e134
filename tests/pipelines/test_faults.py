"""The soak of `benchmarks/faults.py`, three kills of it; a node that says that it will be taken away."""

from __future__ import annotations

import pytest

from benchmarks.faults import soak
from benchmarks.storage_faults import preemption


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been() -> None:
    state, problems, _ = soak(kills=3, seed=3, steps=1500)
    assert sum(state.kills.values()) == 3
    assert problems == []


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_notice_of_preemption_is_answered_with_a_checkpoint_that_another_node_goes_on_from() -> None:
    _, problems = preemption(steps=8000)
    assert problems.value == 0
