"""docs/results.md shows what was measured, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.rows import Figure, Measured, QualityRow, at_least, at_most, within


def row(figures: Measured, name: str = "trial", minutes: float = 1.0, seeds: tuple[int, ...] = (0,)) -> QualityRow:
    declared = {
        "score": Figure("nll_nats", at_most(105.0), published="≤ 100", source="Someone 2014"),
        "ceiling": Figure("nll_nats"),
    }
    return QualityRow(name, "vae", "dynamic MNIST", "ELBO", minutes, declared, seeds, lambda workdir: figures)


def store(docs: Path, stored: dict[str, object]) -> None:
    (docs / "results").mkdir(parents=True, exist_ok=True)
    (docs / "results" / f"{stored['row']}.json").write_text(json.dumps(stored))


def rendered(tmp_path: Path, *rows: QualityRow) -> str:
    (tmp_path / "docs").mkdir(exist_ok=True)
    return results.render({r.name: r for r in rows}, tmp_path / "docs", tmp_path / "benchmarks").read_text()


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [(at_most(3.0), 3.0, 3.01), (at_least(3.0), 3.0, 2.99), (within(-1744.0, 0.5), -1744.5, -1744.51)],
)
def test_bounds_include_their_ends(bound: object, inside: float, outside: float) -> None:
    assert bound.met(inside)
    assert not bound.met(outside)
    assert not bound.met(float("nan"))


def test_a_measurement_holds_all_that_it_takes_to_read_it(tmp_path: Path) -> None:
    found = results.measure(row({"score": [104.0, 106.0, 105.0], "ceiling": 45.5}, seeds=(0, 1, 2)), tmp_path)
    assert found["figures"]["score"]["value"] == pytest.approx(105.0)
    assert found["figures"]["score"]["sd"] == pytest.approx(1.0)  # the sample's, over n − 1
    assert found["figures"]["score"]["bound"] == "≤ 105"
    assert found["met"] is True
    assert found["command"] == "make results ROW=trial"
    assert {"wall_s", "minutes", "seeds", "hardware", "versions", "revision", "data", "estimator"} <= found.keys()


@pytest.mark.parametrize(
    "figures", [{"score": 1.0}, {"score": 1.0, "ceiling": 1.0, "more": 1.0}, {"score": float("nan"), "ceiling": 1.0}]
)
def test_a_row_measures_what_it_declares(figures: Measured, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trial"):
        results.measure(row(figures), tmp_path)


def test_a_row_over_its_budget_is_not_met(tmp_path: Path) -> None:
    assert results.measure(row({"score": 104.0, "ceiling": 1.0}, minutes=0.0), tmp_path)["met"] is False


def test_an_unmeasured_row_shows_its_command_and_no_figure(tmp_path: Path) -> None:
    page = rendered(tmp_path, row({"score": 104.321, "ceiling": 45.5}))
    assert page.count("| `make results ROW=trial` |") == 1
    assert "score ≤ 105 nats (published ≤ 100); ceiling" in page
    assert "104.3" not in page


def test_a_measured_row_is_shown_beside_what_was_published(tmp_path: Path) -> None:
    good, bad = row({"score": 104.321, "ceiling": 45.5}), row({"score": 109.0, "ceiling": 45.5}, "worse")
    for one in (good, bad):
        store(tmp_path / "docs", results.measure(one, tmp_path))
    page = rendered(tmp_path, good, bad)
    assert "| **104.32** nats | ≤ 105 nats | met | ≤ 100 (Someone 2014) |" in page
    assert "| **109** nats | ≤ 105 nats | **missed** |" in page
    assert "not run yet" not in page


def test_figures_of_another_definition_are_not_shown_as_this_rows(tmp_path: Path) -> None:
    before = row({"score": 104.321, "ceiling": 45.5})
    store(tmp_path / "docs", results.measure(before, tmp_path))
    page = rendered(tmp_path, dataclasses.replace(before, data="static MNIST"))
    assert "104.3" not in page
    assert "not run yet" in page


def test_the_graphs_figures_are_taken_from_the_evaluations(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make repro"):
        results.graph(tmp_path)
    metric = {"value": 2.5, "error": 0.01, "floor": 2.0, "context": {"split": "test", "n": 360}}
    for name in ("flow", "gan"):
        for kind in ("evaluations", "models"):
            (tmp_path / kind / name).mkdir(parents=True)
        (tmp_path / "evaluations" / name / "evaluation.json").write_text(
            json.dumps({"metrics": {"nll": metric}, "figures": []})
        )
        (tmp_path / "models" / name / "config.json").write_text(json.dumps({"model": f"the_{name}"}))
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "gan.json").write_text(json.dumps({"seeds": 3, "nll": 2.75, "nll_sd": 0.5}))
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "graph.json").write_text(json.dumps(results.graph(tmp_path)))
    page = rendered(tmp_path)
    assert "| flow | `the_flow` | nll | 2.500 ± 0.010 | 2 | split test, n 360; ± standard error |" in page
    assert "| gan | `the_gan` | nll | 2.75 ± 0.50 | 2 | split test, n 360; mean ± sd of 3 seeds |" in page


def test_every_row_of_the_repository_can_be_found_and_shown() -> None:
    rows = results.all_rows()
    assert "ppca_logit_mnist" in rows
    for name, one in rows.items():
        assert one.name == name
        told = [figure.bound or figure.published for figure in one.figures.values()]
        assert any(told), f"{name} has nothing to fail on, and nothing published to be read beside"
