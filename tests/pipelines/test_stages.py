"""Stages as a user runs them: outs, tracking, resuming after SIGKILL, two workers, what is refused and how fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

import dgm_core
from pipelines import encode, evaluate, judge, prepare, sample, train
from pipelines.command import Usage
from tests.support import ROOT

TINY = {"preset": "tiny", "config": {}}


def write_params(folder: Path, **changes: Any) -> None:
    """The shipped file with tiny runs, in this process, without the slow parts of tracking."""
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    for name, run in params["runs"].items():
        run.update({**TINY, "recipe": {"steps": 20, **changes.get("recipes", {}).get(name, {})}})
        run.update(changes.get("runs", {}).get(name, {}))
    params["cluster"] = {"workers": 0, "log_every": 5, "checkpoint_every": 5, **changes.get("cluster", {})}
    params["tracking"] = {"log_model": False, "system_metrics": False, **changes.get("tracking", {})}
    params["judge"] = {"steps": 30}
    params["evaluate"] = {"samples": 32, "examples": 32, "importance_samples": 0, "tiles": 2, "ais_temperatures": 20}
    yaml.dump(params, folder / "params.yaml")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits prepared and judged, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("prepared")
    write_params(folder)
    here = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("digits", "digits_binary"):
            assert prepare.main([name]) == 0
            assert judge.main([name]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("data", "judges"):
        (tmp_path / name).mkdir()
        for entry in (prepared / name).iterdir():
            (tmp_path / name / entry.name).symlink_to(entry)
    write_params(tmp_path)
    return tmp_path


def mlflow_runs(project: Path) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    return [client.get_run(r.info.run_id) for r in client.search_runs(experiments)]


def logged_steps(project: Path, run_id: str) -> list[int]:
    from mlflow.tracking import MlflowClient

    return [m.step for m in MlflowClient(f"sqlite:///{project / 'mlflow.db'}").get_metric_history(run_id, "round")]


def stage(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_stage_leaves_a_finished_run_curves_and_one_tracked_run(project: Path) -> None:
    assert train.main(["vae"]) == 0
    assert {p.name for p in (project / "models/vae").iterdir()} >= {
        "config.json", "recipe.json", "spec.json", "weights.safetensors", "metrics.json",
    }  # fmt: skip
    assert dgm_core.load(project / "models/vae").sample(3).shape == (3, 1, 16, 16)
    header = (project / "plots/vae/curves.csv").read_text().splitlines()[0].split(",")
    assert {"step", "train/model/loss", "val/elbo_nats"} <= set(header)
    assert not list((project / ".dgm/state").iterdir())
    assert evaluate.main(["vae"]) == 0
    (run,) = mlflow_runs(project)
    assert run.info.status == "FINISHED"
    assert logged_steps(project, run.info.run_id) == [5, 10, 15, 20]
    metrics = json.loads((project / "metrics/vae.json").read_text())
    assert metrics["frechet"] == pytest.approx(run.data.metrics["frechet"])
    about = json.loads((project / "evaluations/vae/evaluation.json").read_text())
    assert all((project / "evaluations/vae" / figure["file"]).is_file() for figure in about["figures"])


def test_codes_become_data_and_priors_a_two_stage_model(project: Path) -> None:
    write_params(project, runs={"vqvae": {"config": {"codes": 8}}})
    assert train.main(["vqvae"]) == 0
    assert encode.main(["vqvae"]) == 0
    for prior in ("prior_top", "prior_bottom"):
        assert train.main([prior]) == 0
    assert evaluate.main(["vqvae_prior"]) == 0
    whole = dgm_core.load(project / "models/vqvae_prior")
    y = torch.tensor([3, 3, 7])
    assert whole.sample(3, y, temperature=0.5).shape == (3, 1, 16, 16)
    with pytest.raises(TypeError, match="not known at the levels"):
        whole.sample(1, truncation=0.5)


def test_several_seeds_give_mean_and_sd(project: Path) -> None:
    write_params(project, runs={"vae": {"seeds": 2}})
    assert train.main(["vae"]) == 0
    assert evaluate.main(["vae"]) == 0
    metrics = json.loads((project / "metrics/vae.json").read_text())
    assert metrics["seeds"] == 2
    assert metrics["elbo_nats_sd"] > 0
    (run,) = mlflow_runs(project)
    assert {"train/model/loss", "seed1/train/model/loss"} <= set(run.data.metrics)


def test_init_from_starts_from_another_runs_weights(project: Path) -> None:
    assert train.main(["vqvae"]) == 0
    before = load_file(project / "models/vqvae/weights.safetensors")
    settings = {"init_from": "vqvae", "data": "digits", "judge": "digits"}
    small = {"steps": 1, "optimizers": {"model": {"lr": 1e-9}}}
    write_params(project, runs={"vqvae": {**settings, "seed": 5}}, recipes={"vqvae": small})
    assert train.main(["vqvae"]) == 0
    after = load_file(project / "models/vqvae/weights.safetensors")
    networks = [k for k in before if not k.startswith("quantisers")]  # codebooks move by averages, not by the rate
    moved = max(float((after[k] - before[k]).abs().max()) for k in networks)
    assert moved < 1e-6  # one round at a learning rate of 1e-9, and no second k-means start


def test_overfitting_is_a_trial_without_outs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["vae", "--overfit-batches", "1", "--set", "recipe.steps=30"]) == 0
    assert "train/model/loss:" in capsys.readouterr().out
    assert not (project / "models").exists()
    assert not (project / "mlflow.db").exists()


def test_samples_are_written_by_the_name_of_the_file(project: Path) -> None:
    assert train.main(["vae"]) == 0
    assert sample.main(["vae", "--n", "5", "--out", "x.npz", "--set", "temperature=0.5"]) == 0
    assert np.load("x.npz")["x"].shape == (5, 1, 16, 16)
    assert sample.main(["vae", "--n", "5", "--out", "grid.png"]) == 0
    assert sample.main(["vae", "--n", "5", "--out", "folder"]) == 0
    assert len(list(Path("folder").iterdir())) == 5
    for arguments, message in (
        (["vae", "--out", "x.npz", "--set", "temprature=1"], "this model's options: temperature"),
        (["vea", "--out", "x.npz"], "is not a finished run"),
        (["vae", "--out", "x.gif"], "FILE.png, FILE.npz, FILE.wav of audio, or a folder"),
    ):
        with pytest.raises(Usage, match=message):
            sample.main(arguments)


def test_check_says_what_a_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats/a.png").write_bytes(b"no picture")
    assert prepare.main(["--check", str(tmp_path)]) == 1
    assert "a.png" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_in_mid_training_a_stage_goes_on_and_ends_bitwise_equal(project: Path) -> None:
    """SIGKILL of the stage's process under Ray: one run, FINISHED, no step twice, the undisturbed run's weights."""
    cluster = {"workers": 1, "cpus_per_worker": 1, "report_seconds": 0.2, "log_every": 20, "checkpoint_every": 40}
    write_params(project, cluster=cluster, recipes={"vae": {"steps": 2000, "evaluate_every": 500}})
    assert stage("pipelines.train", "vae").wait(300) == 0
    undisturbed = load_file(project / "models/vae/weights.safetensors")
    (first,) = mlflow_runs(project)

    process = stage("pipelines.train", "vae")
    wait_until(lambda: rounds_done(project) >= 200, 120)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (project / "models/vae.tmp").exists()
    again = stage("pipelines.train", "vae")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    resumed = load_file(project / "models/vae/weights.safetensors")
    assert all(torch.equal(undisturbed[k], resumed[k]) for k in undisturbed)
    (second,) = [r for r in mlflow_runs(project) if r.info.run_id != first.info.run_id]
    assert second.info.status == "FINISHED"
    assert logged_steps(project, second.info.run_id) == list(range(20, 2001, 20))
    assert not list((project / ".dgm/state").iterdir())


def rounds_done(project: Path) -> int:
    files = list((project / ".dgm/state").glob("*/seed0/history.jsonl"))
    lines = files[0].read_text().splitlines() if files else []
    return len(lines) * 20


def wait_until(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_two_workers_give_the_one_worker_result_through_the_pipeline(project: Path) -> None:
    weights = []
    for workers in (1, 2):
        write_params(
            project,
            cluster={"workers": workers, "cpus_per_worker": 1},
            runs={"vqvae": {"config": {"codes": 16, "downsample": 4}}},
            recipes={"vqvae": {"steps": 60, "batch_size": 24, "precision": "fp64"}},
        )
        process = stage("pipelines.train", "vqvae")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        weights.append(load_file(project / "models/vqvae/weights.safetensors"))
    one, two = weights
    for name, expected in one.items():
        # float64 sums in another order, after 60 rounds of Adam.
        assert torch.allclose(two[name].double(), expected.double(), rtol=1e-6, atol=1e-8), name


def refused(project: Path, message: str, **environment: str) -> None:
    started = time.monotonic()
    process = stage("pipelines.train", "vae", **environment)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert message in output
    assert "Traceback" not in output
    assert time.monotonic() - started < 60  # of which the imports, on a busy machine, take most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"workers": 64, "cpus_per_worker": 1}, "64 workers need 64 CPUs"),
        ({"workers": 1, "gpus_per_worker": 1}, "need 1 GPUs; there are 0"),
    ],
)
def test_infeasible_resources_are_refused_before_waiting(
    project: Path, cluster: Mapping[str, Any], message: str
) -> None:
    write_params(project, cluster=cluster)
    refused(project, message)


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "nothing answers at RAY_ADDRESS=127.0.0.1:1"), ("ray://head:10001", "is a client address")],
)
def test_a_dead_or_a_client_address_is_refused(project: Path, address: str, message: str) -> None:
    write_params(project, cluster={"workers": 1})
    refused(project, message, RAY_ADDRESS=address)


def test_a_failing_run_is_tracked_as_failed(project: Path) -> None:
    write_params(project, recipes={"vae": {"optimizers": {"model": {"lr": 1e30}}, "steps": 50}})
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        train.main(["vae"])
    (run,) = mlflow_runs(project)
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_the_logged_model_samples_the_same_for_the_same_seed(project: Path) -> None:
    import mlflow
    import pandas as pd

    write_params(project, tracking={"log_model": True})
    assert train.main(["vae"]) == 0
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    (logged,) = mlflow.search_logged_models(experiments, output_format="list")
    model = mlflow.pyfunc.load_model(f"models:/{logged.model_id}")
    rows = pd.DataFrame({"n": [2, 1]})
    first, second = (model.predict(rows, params={"seed": 3, "temperature": 0.5}) for _ in range(2))
    assert first.shape == (3, 1, 16, 16)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, model.predict(rows, params={"seed": 4, "temperature": 0.5}))
