"""The judge learns, is repeatable, survives a file, and refuses data that is not its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.evaluation.judge import COORDINATES, Judge, fit_judge
from tests.evaluation.handmade import IMAGES, factory, images


def made(spec: DataSpec, n: int = 480) -> Batch:
    """Two classes, stored one after the other, that differ in the mean of what is stored, or in loudness."""
    y = torch.arange(n) // (n // 2)
    shape = (n, *spec.shape)
    if spec.kind == "audio":  # a mean cannot be heard
        x = torch.randn(shape) * (1 + y[:, None])
        if spec.levels is not None:
            x = (spec.levels * (x / 16 + 0.5)).clamp(0, spec.levels - 1)
        return Batch(x.to(spec.dtype), y)
    if spec.levels is None:
        return Batch(torch.randn(shape) + 4.0 * y.view(-1, *[1] * len(spec.shape)), y)
    low, high = torch.randint(0, spec.levels // 2, shape), torch.randint(spec.levels // 2, spec.levels, shape)
    mostly = torch.rand(shape) < 0.9
    x = torch.where(mostly == (y.view(-1, *[1] * len(spec.shape)) == 0), low, high)
    return Batch(x.to(spec.dtype), y)


SPECS = {
    "grey": DataSpec("image", (1, 8, 8), 256, 2),
    "binary": DataSpec("image", (3, 8, 6), 2, 2),
    "real image": DataSpec("image", (1, 8, 8), None, 2),
    "code grid": DataSpec("codes", (4, 4), 16, 2),
    "code line": DataSpec("codes", (40,), 270, 2),
    "vector": DataSpec("vector", (5,), None, 2),
    "mu-law": DataSpec("audio", (500,), 256, 2),
    "audio": DataSpec("audio", (100,), None, 2),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_learns_every_kind_of_data(spec: DataSpec):
    train, test = made(spec), made(spec, 100)
    judge = fit_judge(spec, factory(train), seed=0, steps=60, batch_size=64, held_out=factory(test))
    assert judge.kind == "classes"
    assert judge.accuracy is not None
    assert judge.accuracy >= 0.95
    assert judge.accuracy == pytest.approx((judge.classify(test.x) == test.y).float().mean().item())
    features = judge.features(train.x)
    assert features.shape == (480, 64)
    # Scaled to the training examples' mean variance.
    assert features.var(0, correction=0).mean().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        DataSpec("vector", (3,), None),
        DataSpec("image", (1, 16, 16), 256),
        DataSpec("codes", (4, 6), 32),
        DataSpec("audio", (1000,), 256),
    ],
    ids=lambda s: s.kind,
)
def test_without_classes_features_are_coordinates(spec: DataSpec):
    x = made(replace(spec, classes=2)).x
    judge = fit_judge(spec, factory(Batch(x)), seed=0)
    assert judge.kind == "coordinates"
    features = judge.features(x)
    assert features.shape[1] <= COORDINATES
    assert features.var(0, correction=0).mean().item() == pytest.approx(1, rel=1e-4)
    with pytest.raises(DataMismatch, match="no classes"):
        judge.classify(x)


def test_coordinates_are_standardised_and_a_constant_one_is_tame():
    x = torch.stack([5 + 100 * torch.randn(500), torch.full((500,), 3.0)], 1)
    judge = fit_judge(DataSpec("vector", (2,), None), factory(Batch(x)), seed=0)
    features = judge.features(x)
    assert features.mean(0).abs().max() < 1e-4
    moved = judge.features(x + torch.tensor([0.0, 1.0])) - features
    # By 1 where the data as a whole spreads over about 70: far less than one standard deviation.
    assert 0 < moved[:, 1].max() < 0.1


def test_principal_directions_keep_distances():
    """200 coordinates of rank 3: the projection to 128 loses nothing."""
    x = torch.randn(300, 3) @ torch.randn(3, 200)
    spec = DataSpec("audio", (200,), None)
    judge = fit_judge(spec, factory(Batch(x)), seed=0)
    features = judge.features(x)
    assert features.shape == (300, COORDINATES)
    ratio = torch.pdist(features) / torch.pdist(x)
    assert ratio.std() / ratio.mean() < 1e-3


def test_directions_that_the_data_does_not_have_are_left_out():
    """50 examples span 49 directions about their mean: as many are orthonormal, the other columns are zero."""
    judge = fit_judge(DataSpec("audio", (200,), None), factory(Batch(torch.randn(50, 200))), seed=0)
    gram = judge.projection.T @ judge.projection
    assert torch.allclose(gram, torch.diag((torch.arange(COORDINATES) < 49).float()), atol=1e-5)


def test_same_seed_same_judge_and_the_random_stream_stays():
    batch = images(120)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = fit_judge(IMAGES, factory(batch), seed=7, steps=5)
    assert torch.equal(torch.rand(4), expected)
    again, other = (fit_judge(IMAGES, factory(batch), seed=s, steps=5) for s in (7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.features(batch.x), other.features(batch.x))


@pytest.mark.parametrize("spec", [IMAGES, DataSpec("codes", (3, 3), 8), DataSpec("audio", (300,), None)])
def test_survives_a_file(spec: DataSpec, tmp_path: Path):
    batch = made(replace(spec, classes=2))
    given = factory(batch if spec.classes else Batch(batch.x))
    judge = fit_judge(spec, given, seed=0, steps=5, held_out=given)
    judge.save(tmp_path / "judge")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loaded = Judge.load(tmp_path / "judge")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded.features(batch.x), judge.features(batch.x))
    assert (loaded.kind, loaded.accuracy, loaded.spec) == (judge.kind, judge.accuracy, judge.spec)
    assert sorted(p.name for p in (tmp_path / "judge").iterdir()) == ["judge.json", "judge.safetensors"]


def test_halves_of_two_judges_are_refused(tmp_path: Path):
    fit_judge(IMAGES, factory(images(60)), seed=0, steps=2).save(tmp_path)
    about = json.loads((tmp_path / "judge.json").read_text())
    fit_judge(IMAGES, factory(images(60)), seed=1, steps=2).save(tmp_path)
    (tmp_path / "judge.json").write_text(json.dumps(about))
    with pytest.raises(DataMismatch, match="fit the judge again"):
        Judge.load(tmp_path)


@pytest.mark.parametrize(
    "change", [{"levels": 2}, {"shape": (1, 8, 8)}, {"classes": 3}, {"kind": "codes", "shape": (4, 4)}]
)
def test_refuses_data_that_is_not_its_own(change: dict):
    judge = fit_judge(IMAGES, factory(images(60)), seed=0, steps=2)
    judge.check(IMAGES)
    with pytest.raises(DataMismatch, match="was trained on"):
        judge.check(replace(IMAGES, **change))
    with pytest.raises(DataMismatch, match="shape"):
        judge.features(torch.zeros(2, 1, 5, 5))


def test_labels_must_be_there():
    with pytest.raises(DataMismatch, match="no labels"):
        fit_judge(IMAGES, factory(Batch(images(60).x)), seed=0, steps=2)


def test_recognises_handwritten_digits():
    """scikit-learn's digits at 16 × 16: at least 95 % of held-out images, in seconds."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.nn.functional.interpolate(torch.tensor(digits.images).float()[:, None], size=(16, 16), mode="bilinear")
    x, y = (x * (255 / 16)).round().clamp(0, 255).to(torch.uint8), torch.tensor(digits.target).long()
    order = torch.randperm(len(x))
    train, test = (Batch(x[i], y[i]) for i in (order[:1400], order[1400:]))
    spec = DataSpec("image", (1, 16, 16), 256, 10)
    judge = fit_judge(spec, factory(train), seed=0, steps=100, held_out=factory(test))
    assert judge.accuracy is not None
    assert judge.accuracy >= 0.95
