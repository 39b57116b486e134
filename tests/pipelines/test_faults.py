"""The soak of `benchmarks/faults.py`, three kills of it."""

from __future__ import annotations

import pytest

from benchmarks.faults import soak


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been() -> None:
    state, problems, _ = soak(kills=3, seed=3, steps=1500)
    assert sum(state.kills.values()) == 3
    assert problems == []
