"""params.yaml: what is refused, early and in words; what is merged; that the shipped file and dvc.yaml agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from dgm_core.contract import DataSpec
from dgm_core.models import CATALOG
from pipelines.command import Usage
from pipelines.params import EMBEDDED, Cluster, Run, Tracking, home, load_params, parse_source, resolve, yaml_load
from pipelines.tracking_store import store_uri
from tests.support import ROOT

SPEC = DataSpec("image", (1, 16, 16), 256, classes=10)


def shipped(tmp_path: Path, old: str, new: str) -> Path:
    text = (ROOT / "params.yaml").read_text()
    assert old in text
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  workers: 1", "  wokers: 1", "did you mean 'workers'"),
        ("  workers: 1", "  workers: -1", "cluster.workers: -1 workers are not accepted: 0 (this process), 1, 2"),
        ("    model: vq_vae2", "    model: vq_vae22", "did you mean 'vq_vae2'"),
        ("    family: flow", "    family: flows", "real_nvp belongs to family 'flow', but 'flows' was given"),
        ("    data: digits_binary", "    data: digits_binari", "did you mean 'digits_binary'"),
        ("    data: codes/vqvae/top", "    data: codes/vae/top", "'vae' is not an entry of encode"),
        ("    judge: digits\n", "    judge: digit\n", "did you mean 'digits'"),
        ("    source: digits", "    source: digit", "did you mean 'digits'"),
        ("    size: 16", "    sise: 16", "did you mean 'size'"),
        ("  storage: .dgm", "  storage: gopher://x", "storage 'gopher://x' is not accepted"),
        ("    codes: vqvae", "    codes: vqvea", "did you mean 'vqvae'"),
        ("runs:", "runs: [", "is not YAML"),
    ],
)
def test_what_is_not_accepted_is_said_with_the_mend(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(Usage) as refused:
        load_params(shipped(tmp_path, old, new))
    assert message in str(refused.value)
    assert refused.value.code == 2


def test_overrides_are_yaml_and_checked() -> None:
    path = ROOT / "params.yaml"
    params = load_params(path, ["runs.flow.recipe.steps=7", "runs.flow.recipe.optimizers={model: {lr: 1e-4}}"])
    assert params.runs["flow"].recipe["steps"] == 7
    assert params.runs["flow"].recipe["optimizers"]["model"]["lr"] == 1e-4
    with pytest.raises(Usage, match=r"write key\.of\.it=value"):
        load_params(path, ["runs.flow.recipe.steps"])


def test_paper_then_tuned_then_params(tmp_path: Path) -> None:
    (tmp_path / "flow.yaml").write_text("recipe: {steps: 11, batch_size: 13}\nconfig: {features: 17}\n")
    run = Run(model="real_nvp", family="flow", data="digits", judge="digits", recipe={"steps": 19})
    _, config, recipe = resolve("flow", run, SPEC, tuned=tmp_path)
    paper_config, paper = CATALOG["real_nvp"].defaults(SPEC)
    assert (recipe.steps, recipe.batch_size, config.features) == (19, 13, 17)
    assert recipe.optimizers == paper.optimizers
    assert config.blocks == paper_config.blocks


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"recipe": {"stepz": 1}}, "did you mean 'steps'"),
        ({"config": {"feature": 1}}, "did you mean 'features'"),
        ({"recipe": {"steps": 0}}, "greater than 0"),
        ({"recipe": {"optimizers": {"model": {"lr": -1}}}}, "greater than 0"),
    ],
)
def test_a_runs_overrides_are_checked_against_its_model(override: dict, message: str, tmp_path: Path) -> None:
    run = Run(model="real_nvp", family="flow", data="digits", judge="digits", **override)
    with pytest.raises(Usage) as refused:
        resolve("flow", run, SPEC, tuned=tmp_path)
    assert message in str(refused.value)


def test_a_model_refuses_data_it_cannot_model_before_anything_starts(tmp_path: Path) -> None:
    from pipelines.train import check

    run = Run(model="rbm", family="boltzmann", data="digits", judge="digits")
    model, config, recipe = resolve("rbm", run, SPEC, tuned=tmp_path)
    with pytest.raises(ValueError, match="256 levels"):
        check(model, config, recipe, SPEC)


def test_yaml_is_read_as_dvc_reads_it() -> None:
    assert yaml_load("{a: 1e-4, b: no, c: 0x10}") == {"a": 1e-4, "b": "no", "c": 16}


def test_embedded_sources_depend_on_their_code() -> None:
    assert (ROOT / EMBEDDED).is_dir()
    assert parse_source({"source": "digits", "path": EMBEDDED, "size": 16}).path == ""


def test_the_shipped_graph_fits_the_shipped_params() -> None:
    """Keys that dvc.yaml names stand in every entry, or the whole file fails to parse."""
    given = yaml_load((ROOT / "params.yaml").read_text())
    for run in given["runs"].values():
        assert {"model", "family", "data", "judge"} <= set(run)
        assert "steps" in run["recipe"]  # so that `dvc exp run -S runs.NAME.recipe.steps=…` finds it
    for entry in given["datasets"].values():
        assert "path" in entry
    for name in given["runs"]:
        assert (ROOT / "tuned" / f"{name}.yaml").is_file()
    assert not set(given["runs"]) & set(given["two_stage"])


def test_a_recipe_must_hold_together() -> None:
    from dgm_core.config import Recipe

    with pytest.raises(ValidationError, match="patience needs monitor"):
        Recipe(steps=1, patience=3)
    with pytest.raises(ValidationError, match="start at progress 0"):
        Recipe(steps=1, batch_size=((0.5, 3),))
    assert Recipe(steps=1, batch_size=((0.0, 8), (0.5, 4))).batch_size_at(0.6) == 4


def test_a_queued_experiment_keeps_its_state_and_runs_with_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC runs it in a copy, which it deletes afterwards."""
    copy = tmp_path / ".dvc/tmp/exps/tmp1/deeper"
    copy.mkdir(parents=True)
    for folder in (copy, copy.parent, tmp_path):
        monkeypatch.chdir(folder)
        assert home() == tmp_path
        assert Cluster().local == tmp_path / ".dgm"
        assert store_uri(Tracking()) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert Cluster(storage=str(tmp_path / "shared")).local == tmp_path / ".dgm"
