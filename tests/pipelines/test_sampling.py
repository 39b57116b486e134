"""`pipelines.sample` of a two-stage model, and keeping the samples that a classifier trusts most."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from dgm_core import runs
from dgm_core.config import Recipe
from dgm_core.contract import DataMismatch, DataSpec, GenerativeModel
from dgm_core.evaluation.judge import Judge, fit_judge
from dgm_core.models.autoregressive.gated_pixel_cnn import GatedPixelCNN
from dgm_core.models.latent.vq_vae2 import VQVAE2
from pipelines import encode, evaluate, judge, prepare, sample, train
from pipelines.command import Usage
from tests.support import ROOT, Tensors, examples

GREY = DataSpec("image", (1, 8, 8), 256, classes=2)
PLAIN = DataSpec("image", (1, 8, 8), 256)


def finished(folder: Path, name: str, model: GenerativeModel, data: str, **info: Any) -> None:
    folder.mkdir(parents=True)
    runs.save_run(folder, name, model, Recipe(steps=1), model.state_dict(), {})
    about = {"name": data, "source": "npz", "transforms": [], "original": model.data.to_dict(), **info}
    runs.write_json(folder / "data.json", about)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A two-stage run whose priors were not trained, beside other runs, and a judge of its data set."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    codes = VQVAE2(VQVAE2.tiny(GREY)[0], GREY)
    codes.enter("model", Tensors(examples(GREY, 40)).one_pass(8))
    whole = tmp_path / "models/whole"
    finished(whole / "codes", "vq_vae2", codes, "grey")
    for level, spec in codes.code_specs().items():
        prior = GatedPixelCNN(GatedPixelCNN.tiny(spec)[0], spec)
        torch.nn.init.normal_(prior.conditioner.label.weight)
        finished(whole / "priors" / level, "gated_pixel_cnn", prior, f"whole/{level}", source="codes")
    priors = {level: f"priors/{level}" for level in codes.code_specs()}
    runs.write_json(whole / "config.json", {"model": runs.TWO_STAGE, "codes": "codes", "priors": priors})
    finished(tmp_path / "models/codes", "vq_vae2", codes, "grey")
    plain = GatedPixelCNN(GatedPixelCNN.tiny(PLAIN)[0], PLAIN)
    finished(tmp_path / "models/plain", "gated_pixel_cnn", plain, "plain")
    batches = partial(Tensors(examples(GREY, 200)).one_pass, 50)
    fit_judge(GREY, batches, seed=0, steps=20).save(tmp_path / "judges/grey")
    fit_judge(PLAIN, partial(Tensors(examples(PLAIN, 200)).one_pass, 50), seed=0).save(tmp_path / "judges/plain")
    return tmp_path


def test_a_two_stage_model_is_sampled_to_pictures(project: Path) -> None:
    """Its folder holds no data.json: its code model's says how to show its samples."""
    assert sample.main(["whole", "--n", "4", "--out", "grid.png"]) == 0
    assert Path("grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_most_trusted_are_kept(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["whole", "--class", "1", "--batch", "5", "--seed", "3"]
    assert sample.main([*drawn, "--n", "24", "--out", "all.npz"]) == 0
    assert sample.main([*drawn, "--n", "6", "--keep", "0.25", "--out", "kept.npz"]) == 0
    assert "6 samples of whole (the most trusted of 24): kept.npz" in capsys.readouterr().out
    x = torch.from_numpy(np.load("all.npz")["x"])
    trust = Judge.load(project / "judges/grey").logits(x).log_softmax(1)[:, 1]
    best = trust.topk(6).indices.sort().values
    kept = np.load("kept.npz")
    # The same stream: looking whether labels matter does not move it.
    assert np.array_equal(kept["x"], x[best].numpy())
    assert kept["y"].tolist() == [1] * 6


def test_without_a_class_labels_are_drawn_and_written(project: Path) -> None:
    assert sample.main(["whole", "--n", "12", "--keep", "0.5", "--out", "kept.npz"]) == 0
    kept = np.load("kept.npz")
    assert kept["x"].shape == (12, 1, 8, 8)
    assert set(kept["y"].tolist()) == {0, 1}


def test_another_judge_can_be_named(project: Path) -> None:
    (project / "judges/grey").rename(project / "elsewhere")
    for named in ("elsewhere", str(project / "elsewhere")):
        assert sample.main(["whole", "--n", "2", "--keep", "0.5", "--judge", named, "--out", "kept.npz"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["whole", "--keep", "0"], "a share above 0"),
        (["whole", "--keep", "1.5"], "a share above 0"),
        (["whole", "--keep", "0.5", "--judge", "gray"], r"none in judges/gray.*pipelines.judge gray"),
        (["plain", "--keep", "0.5"], "data has no classes"),
        (["codes", "--keep", "0.5"], "alike whatever the class"),
        (["models/whole/priors/top", "--keep", "0.5"], r"draws codes \(whole/top\): sample the two-stage"),
        (["whole", "--judge", "grey"], "needs --keep"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_words(project: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(Usage, match=said):
        sample.main([*arguments, "--n", "2", "--out", "kept.npz"])
    assert not Path("kept.npz").exists()


def test_a_judge_of_other_data_and_a_missing_one_are_refused(project: Path) -> None:
    with pytest.raises(DataMismatch, match="classes 0; this data has classes 2"):
        sample.main(["whole", "--n", "2", "--keep", "0.5", "--judge", "plain", "--out", "kept.npz"])
    (project / "judges/grey/judge.json").unlink()
    with pytest.raises(Usage, match=r"none in judges/grey.*pipelines\.judge grey"):
        sample.main(["whole", "--n", "2", "--keep", "0.5", "--out", "kept.npz"])


@pytest.mark.slow
def test_three_levels_go_through_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare, judge, train, encode, a prior a level, join and score, sample by class and keep the best."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    params = YAML().load(ROOT / "params.yaml")
    tiny = {"preset": "tiny", "recipe": {"steps": 20}}
    codes = {**params["runs"]["vqvae"], **tiny, "config": {"levels": 3, "downsample": 2}}
    prior = {**params["runs"]["prior_top"], **tiny, "config": {}}
    levels = ("top", "middle", "bottom")
    named = {f"prior_{level}": {**prior, "data": f"codes/vqvae/{level}"} for level in levels}
    params["datasets"] = {"digits": params["datasets"]["digits"]}
    params["runs"], params["tune"] = {"vqvae": codes, **named}, {}
    params["two_stage"]["vqvae_prior"]["priors"] = {level: f"prior_{level}" for level in levels}
    params["cluster"] = {"workers": 0}
    params["tracking"] = {"log_model": False, "system_metrics": False}
    params["judge"] = {"steps": 30}
    params["evaluate"] = {"samples": 16, "examples": 16, "tiles": 2}
    YAML().dump(params, tmp_path / "params.yaml")
    for stage in (prepare, judge):
        assert stage.main(["digits"]) == 0
    assert train.main(["vqvae"]) == 0
    assert encode.main(["vqvae"]) == 0
    for name in named:
        assert train.main([name]) == 0
    assert evaluate.main(["vqvae_prior"]) == 0
    command = ["vqvae_prior", "--n", "3", "--class", "7", "--keep", "0.5", "--set", "temperature={top: 0.8}"]
    assert sample.main([*command, "--out", "kept.npz"]) == 0
    kept = np.load("kept.npz")
    assert kept["x"].shape == (3, 1, 16, 16)
    assert kept["y"].tolist() == [7] * 3
