"""The harness times what it says, and a goal that is missed cannot pass."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Row, interleave, report


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the timed work moves, so that ratios are exact."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    return now


def test_pairs_alternate_and_the_ratio_is_the_median_over_pairs(clock: list[float]) -> None:
    order: list[str] = []
    peer_seconds = iter([100.0, 2.0, 3.0, 50.0])  # warm-up, then three pairs: the middle one counts, not the mean

    def ours() -> None:
        order.append("ours")
        clock[0] += 1.0

    def peer() -> None:
        order.append("peer")
        clock[0] += next(peer_seconds)

    pairs = interleave(ours, peer, pairs=3, warmup=1)
    assert order == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert pairs.ours == [1.0, 1.0, 1.0]
    assert pairs.peer == [2.0, 3.0, 50.0]
    assert pairs.ratio == 3.0


def test_no_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        interleave(lambda: None, lambda: None, pairs=0)


@pytest.mark.parametrize(
    ("value", "goal", "at_least", "met"),
    [(2.0, 2.0, True, True), (1.9, 2.0, True, False), (2.0, 2.0, False, True), (2.1, 2.0, False, False),
     (math.nan, 2.0, True, False), (math.nan, 2.0, False, False), (0.0, None, True, True)],
)  # fmt: skip
def test_goals(value: float, goal: float | None, at_least: bool, met: bool) -> None:
    assert Row("speed", value, goal, at_least).met is met


def test_a_missed_goal_is_the_exit_code_and_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("fast", 3.0, 2.0), Row("slow", 1.0, 2.0), Row("seen", 7.0, None, unit="s")]
    assert report("trial", rows, tmp_path) == 1
    assert report("trial", rows[:1], tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.count("MISSED") == 1
    assert report("trial", rows, tmp_path) == 1
    stored = json.loads((tmp_path / "trial.json").read_text())
    assert [row["met"] for row in stored["rows"]] == [True, False, True]
    assert {"date", "revision", "hardware", "versions"} <= stored.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["trial.json"]
