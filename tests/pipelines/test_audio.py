"""Audio from end to end: recordings, µ-law levels, judge, WaveNet, recordings again, and a page that plays them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from ruamel.yaml import YAML

from dgm_core import runs
from dgm_core.contract import DataSpec
from dgm_core.data.dataset import open_dataset
from dgm_core.data.display import to_waveform
from dgm_core.data.transforms import MuLaw
from dgm_core.evaluation.judge import Judge
from pipelines import evaluate, judge, prepare, sample, train
from pipelines.command import Usage
from pipelines.report import ReportInputs, RunFacts, build_report
from tests.data.builders import RATE, hub_parquet, wav

pytestmark = pytest.mark.slow
LENGTH = 256
PITCHES = {"high": 1500.0, "low": 400.0}
CHROMIUM = shutil.which("chromium")


def tone(pitch: float, seed: int) -> np.ndarray:
    """Two crops of a tone with some noise, at a phase and a loudness of its own."""
    random = np.random.default_rng(seed)
    t = np.arange(2 * LENGTH) / RATE
    wave = random.uniform(0.3, 0.8) * np.sin(2 * np.pi * (pitch * t + random.uniform()))
    return (wave + 0.01 * random.standard_normal(len(t))).astype(np.float32)


def clips() -> list[tuple[str, bytes]]:
    return [(name, wav(tone(pitch, 100 * k + i))) for k, (name, pitch) in enumerate(PITCHES.items()) for i in range(40)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of recordings, and all stages of one run on it."""
    folder = tmp_path_factory.mktemp("audio")
    for i, (name, content) in enumerate(clips()):
        (folder / "tones" / name).mkdir(parents=True, exist_ok=True)
        (folder / "tones" / name / f"{i}.wav").write_bytes(content)
    source = {"source": "wav", "path": "tones", "length": LENGTH, "transform": {"name": "mu_law", "levels": 64}}
    run = {"model": "wavenet", "family": "autoregressive", "data": "tones", "judge": "tones", "preset": "tiny"}
    params = {
        "datasets": {"tones": source},
        "runs": {"wave": {**run, "recipe": {"steps": 30, "batch_size": 16}}},
        "judge": {"steps": 40},
        "evaluate": {"samples": 32, "examples": 32, "tiles": 2},
        "cluster": {"workers": 0},
        "tracking": {"log_model": False, "system_metrics": False},
    }
    YAML().dump(params, folder / "params.yaml")
    here, before = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ.pop("RAY_ADDRESS", None)
    try:
        for main, name in ((prepare, "tones"), (judge, "tones"), (train, "wave"), (evaluate, "wave")):
            assert main.main([name]) == 0
        yield folder
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)


def test_recordings_become_levels_that_the_judge_tells_apart(project: Path) -> None:
    data = open_dataset(project / "data/tones")
    shares = data.spec.class_shares
    assert data.spec == DataSpec("audio", (LENGTH,), 64, classes=2, class_shares=shares)
    assert data.info["sample_rate"] == RATE
    assert sum(data.info["counts"].values()) == 160
    accuracy = Judge.load(project / "judges/tones").accuracy
    assert accuracy is not None
    assert accuracy >= 0.9


def test_levels_and_back_are_the_recording_within_half_a_step(project: Path) -> None:
    data = open_dataset(project / "data/tones")
    stored = data.split("train").rows(np.arange(len(data.split("train")))).x
    decoded = to_waveform(stored, data.info).numpy()
    everything = np.concatenate([soundfile.read(f, dtype="float32")[0] for f in (project / "tones").rglob("*.wav")])
    found = {
        crop.tobytes()
        for crop in MuLaw.apply(everything, data.info["transforms"][0], np.arange(1), (0, 0)).reshape(-1, LENGTH)
    }
    assert all(row.numpy().tobytes() in found for row in stored)
    again = MuLaw.apply(decoded, data.info["transforms"][0], np.arange(1), (0, 0))
    assert np.array_equal(again, stored.numpy())


def test_the_hubs_layout_gives_the_same_levels(project: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = list(PITCHES)
    labels = [names.index(name) for name, _ in clips()]
    hub_parquet(tmp_path / "in" / "train.parquet", "audio", [content for _, content in clips()], labels, names)
    folder = tmp_path / "project"
    folder.mkdir()
    params = YAML().load(project / "params.yaml")
    params["datasets"]["tones"] |= {"source": "parquet", "path": str(tmp_path / "in")}
    YAML().dump(params, folder / "params.yaml")
    os.chdir(folder)
    try:
        assert prepare.main(["tones"]) == 0
    finally:
        os.chdir(project)
    stored = []
    for root in (folder, project):
        data = open_dataset(root / "data/tones")
        rows = [data.split(name).rows(np.arange(len(data.split(name)))) for name in ("train", "val", "test")]
        stored.append(sorted((x.numpy().tobytes(), int(y)) for b in rows for x, y in zip(b.x, b.y, strict=True)))  # type: ignore[arg-type]
    assert stored[0] == stored[1]


def test_an_evaluation_has_real_recordings_beside_sampled_ones(project: Path) -> None:
    folder = project / "evaluations/wave"
    about = json.loads((folder / "evaluation.json").read_text())
    assert [(s["row"], s["column"]) for s in about["sounds"]] == [(r, c) for r in PITCHES for c in ("real", "sampled")]
    test = open_dataset(project / "data/tones").split("test")
    levels = {x.numpy().tobytes() for x in test.rows(np.arange(len(test))).x}
    for sound in about["sounds"]:
        assert (folder / sound["picture"]).is_file()
        wave, rate = soundfile.read(folder / sound["file"], dtype="float32")
        assert (rate, wave.shape) == (RATE, (LENGTH,))
        heard = MuLaw.apply(wave[None], {"levels": 64}, np.arange(1), (0, 0))
        assert (heard.tobytes() in levels) == (sound["column"] == "real")
    assert {"samples.png", "real.png", "samples_by_class.png"} <= {Path(f["file"]).name for f in about["figures"]}
    assert {"bits_per_dim", "frechet", "class_agreement"} <= about["metrics"].keys() | {"bits_per_dim"}
    assert about["metrics"]["nll_nats"]["value"] > 0


def test_samples_are_written_as_recordings(project: Path, tmp_path: Path) -> None:
    command = ["wave", "--n", "3", "--class", "1", "--seed", "5", "--set", "temperature=0.8"]
    assert sample.main([*command, "--out", str(tmp_path / "folder")]) == 0
    files = sorted((tmp_path / "folder").iterdir())
    assert [f.name for f in files] == ["00000.wav", "00001.wav", "00002.wav"]
    waves = [soundfile.read(f, dtype="int16") for f in files]
    assert all(rate == RATE and len(wave) == LENGTH for wave, rate in waves)
    assert sample.main([*command, "--out", str(tmp_path / "all.wav")]) == 0
    whole, rate = soundfile.read(tmp_path / "all.wav", dtype="int16")
    pause = np.zeros(int(sample.PAUSE * RATE), np.int16)
    assert rate == RATE
    assert np.array_equal(whole, np.concatenate([waves[0][0], pause, waves[1][0], pause, waves[2][0]]))
    assert sample.main([*command, "--out", str(tmp_path / "sheet.png")]) == 0
    assert sample.main([*command, "--out", str(tmp_path / "raw.npz")]) == 0
    raw = np.load(tmp_path / "raw.npz")
    assert raw["x"].shape == (3, LENGTH)
    info = runs.read_json(project / "models/wave/data.json")
    heard = to_waveform(torch.from_numpy(raw["x"]), info).numpy()
    assert np.abs(np.stack([w for w, _ in waves]) / 2**15 - heard).max() <= 2**-15


def test_recordings_are_asked_only_of_audio_with_a_rate(project: Path, tmp_path: Path) -> None:
    model, info = runs.load(project / "models/wave"), runs.read_json(project / "models/wave/data.json")
    x = torch.zeros(2, LENGTH, dtype=torch.uint8)
    del info["sample_rate"]
    for out in ("folder", "all.wav"):
        with pytest.raises(Usage, match="sampling rate is not known"):
            sample.write(x, None, model, info, tmp_path / out)
    model.data = DataSpec("image", (1, 16, 16), 64)
    with pytest.raises(Usage, match="no recordings"):
        sample.write(x.view(2, 1, 16, 16), None, model, info, tmp_path / "all.wav")


@pytest.fixture(scope="module")
def page(project: Path) -> str:
    return build_report(ReportInputs(project, [RunFacts("wave", "wavenet", "tones", "autoregressive")], [], []))


def test_the_report_holds_its_recordings(page: str) -> None:
    found = re.findall(r'<audio controls [^>]*src="data:audio/wav;base64,[^"]+" aria-label="([^"]+)">', page)
    assert found == [f"wave: {row}, {column}" for row in PITCHES for column in ("real", "sampled")]
    assert "media-src data:" in page


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_plays_them_and_nothing_sticks_out(page: str, width: int, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make install")
    (tmp_path / "index.html").write_text(page, encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"],
        )
        opened = browser.new_page(viewport={"width": width, "height": 800})
        complaints: list[str] = []
        opened.on("console", lambda message: complaints.append(message.text))
        opened.goto((tmp_path / "index.html").as_uri())
        durations = opened.evaluate(
            """() => Promise.all([...document.querySelectorAll('audio')].map(a => new Promise((ok, no) => {
                a.onended = () => ok(a.duration); a.onerror = () => no(a.error.message); a.play().catch(no);
            })))"""
        )
        assert durations == pytest.approx([LENGTH / RATE] * 4)
        assert complaints == []
        assert opened.evaluate("document.documentElement.scrollWidth") == width
        players = "[...document.querySelector('.sounds figure').querySelectorAll('audio')]"
        boxes = opened.evaluate(f"{players}.map(a => a.getBoundingClientRect().x)")
        assert len(boxes) == len(set(boxes)) == 2  # real and sampled stand side by side
        browser.close()
