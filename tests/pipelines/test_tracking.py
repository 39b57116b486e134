"""MLflow runs: one an entry, no step twice, no NaN, FINISHED or FAILED at the end."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.params import Tracking, Usage
from pipelines.tracking import Tracker
from pipelines.writer import Writer


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Tracker]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return lambda: Tracker(Tracking(system_metrics=False), "vae", tmp_path / "state")


def rows(*steps: int, **values: float) -> dict[str, Any]:
    return {"rows": [json.dumps({"step": s, "train/loss": 1.0 / s, **values}) for s in steps]}


def test_a_run_is_continued_and_no_step_is_logged_twice(make: Callable[[], Tracker]) -> None:
    first = make()
    with pytest.raises(KeyboardInterrupt), first.running(None, stage="train"):
        first.writer()(rows(50, 100))
        raise KeyboardInterrupt
    assert first.client.get_run(first.run_id).info.status == "FAILED"
    again = make()
    with again.running(first.run_id, stage="train"):
        assert again.run_id == first.run_id
        assert again.client.get_run(first.run_id).info.status == "RUNNING"
        pickle.loads(pickle.dumps(again.writer()))(rows(100, 150))
    history = again.client.get_metric_history(first.run_id, "train/loss")
    assert [m.step for m in history] == [50, 100, 150]
    assert again.client.get_run(first.run_id).info.status == "FINISHED"
    assert make().remembered() == first.run_id


def test_what_is_not_finite_is_kept_out_and_said(make: Callable[[], Tracker]) -> None:
    tracker = make()
    with tracker.running(None):
        tracker.writer()(rows(1, bad=float("nan"), worse=float("inf")))
    run = tracker.client.get_run(tracker.run_id)
    assert set(run.data.metrics) == {"round", "train/loss"}
    assert run.data.tags["dgm.not_finite"] == "bad, worse"


def test_an_id_that_the_server_does_not_know_starts_a_new_run_tagged(make: Callable[[], Tracker]) -> None:
    tracker = make()
    with tracker.running("0" * 32):
        pass
    assert tracker.run_id != "0" * 32
    assert tracker.client.get_run(tracker.run_id).data.tags["dgm.continues"] == "0" * 32


def test_sample_grids_stand_on_a_step_slider(make: Callable[[], Tracker]) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    tracker = make()
    with tracker.running(None):
        tracker.writer()({"images": {10: buffer.getvalue(), 20: buffer.getvalue()}})
    names = [f.path for f in tracker.client.list_artifacts(tracker.run_id, "images")]
    assert sum("+step+10+" in n or "+step+20+" in n for n in names) >= 2


def test_configuration_is_logged_flat_and_survives_a_second_attempt(make: Callable[[], Tracker]) -> None:
    tracker = make()
    with tracker.running(None):
        tracker.log_config({"recipe": {"steps": 3, "optimizers": {"model": {"lr": 0.1}}}})
    with tracker.running(tracker.run_id):
        tracker.log_config({"recipe": {"steps": 3, "optimizers": {"model": {"lr": 0.1}}}})
    params = tracker.client.get_run(tracker.run_id).data.params
    assert params == {"recipe.steps": "3", "recipe.optimizers.model.lr": "0.1"}


def test_dvc_and_git_are_tagged(make: Callable[[], Tracker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "train@vae")
    monkeypatch.setenv("DVC_EXP_NAME", "muted-crow")
    tracker = make()
    with tracker.running(None):
        pass
    tags = tracker.client.get_run(tracker.run_id).data.tags
    assert tags["dvc.stage"] == "train@vae"
    assert tags["dvc.exp_name"] == "muted-crow"


@pytest.mark.parametrize("uri", ["file:./mlruns", "ftp://x", "mlruns"])
def test_a_store_that_mlflow_does_not_have_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(Usage, match="sqlite:///FILE"):
        Tracker(Tracking(uri=uri), "vae", Path())


def test_a_writer_pickles_without_its_connection() -> None:
    writer = Writer("sqlite:///x.db", "id", "seed1/")
    copy = pickle.loads(pickle.dumps(writer))
    assert (copy.uri, copy.run_id, copy.prefix) == ("sqlite:///x.db", "id", "seed1/")
