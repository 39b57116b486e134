"""A flow fitted to an energy is a run like any other: prepared, trained, evaluated and reported by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines import evaluate, judge, prepare, train
from pipelines.report import ReportInputs, RunFacts, build_report

PARAMS = {
    "datasets": {"u4": {"source": "density", "density": "u4", "train": 1000, "val": 100, "test": 200}},
    "runs": {
        "fit": {
            "model": "planar_flow",
            "family": "flow",
            "data": "u4",
            "judge": "u4",
            "preset": "tiny",
            "config": {"depth": 4},
            "recipe": {"steps": 30},
        }
    },
    "cluster": {"workers": 0, "log_every": 10},
    "tracking": {"log_model": False, "system_metrics": False},
    "evaluate": {"samples": 100, "examples": 100, "energy_draws": 2000},
}


@pytest.mark.slow
def test_an_energy_from_the_source_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    YAML().dump(PARAMS, tmp_path / "params.yaml")
    assert prepare.main(["u4"]) == 0
    assert judge.main(["u4"]) == 0
    assert train.main(["fit"]) == 0
    assert evaluate.main(["fit"]) == 0

    metrics = json.loads(Path("metrics/fit.json").read_text())
    assert {"reverse_kl_nats", "log_z_is_nats", "effective_sample_size", "inverse_error", "nll_nats"} <= set(metrics)
    assert 0 < metrics["effective_sample_size"] <= 1
    assert metrics["reverse_kl_nats"] > 0
    assert metrics["inverse_error"] < 1e-4  # float32, data of about 4
    header = Path("plots/fit/curves.csv").read_text().splitlines()[0]
    assert "train/model/reverse_kl_nats" in header.split(",")

    facts = RunFacts("fit", "planar_flow", "u4", "flow")
    page = build_report(ReportInputs(tmp_path, [facts], ["train@fit"], []))
    about = json.loads(Path("evaluations/fit/evaluation.json").read_text())
    assert {Path(figure["file"]).name for figure in about["figures"]} == {"density.png", "temperatures.png"}
    for figure in about["figures"]:
        assert figure["caption"].replace("'", "&#39;") in page
