import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.data import noise
from dgm_core.data.display import bits_per_dim, log_det, to_display, to_waveform, undo
from dgm_core.data.sources import parse
from dgm_core.data.transforms import Moments, apply_all, follow, records, variant
from tests.data.builders import greys, prepared

GREY = DataSpec("image", (1, 6, 6), 256)


def made(x: np.ndarray, spec: DataSpec, *transforms: Any, moments: Moments | None = None) -> tuple[torch.Tensor, dict]:
    """Data in a variant, and the information that undoes it."""
    steps = parse({"source": "digits", "transform": list(transforms)}).transform
    kept = records(spec, steps, moments)
    follow(spec, steps)
    info = {"original": spec.to_dict(), "transforms": kept}
    return torch.from_numpy(apply_all(x, kept, np.arange(len(x)), (0, 0))), info


@pytest.mark.parametrize(
    "transform",
    [
        "dequantize",
        "logit",
        {"name": "logit", "lam": 0.05},
        {"name": "pad", "to": 9},
        [{"name": "pad", "to": [7, 10]}, "logit"],
    ],
)
def test_what_is_shown_is_what_was_given_exactly(transform: Any) -> None:
    """All levels, many draws of the noise, stored in float32: not one level is off."""
    x = np.tile(np.arange(256, dtype=np.uint8), 6 * 6 * 50).reshape(-1, 1, 6, 6)
    transforms = transform if isinstance(transform, list) else [transform]
    stored, info = made(x, GREY, *transforms)
    assert torch.equal(to_display(stored, info), torch.from_numpy(x))


def test_standardised_data_goes_back_through_dequantisation_too() -> None:
    x = greys(100)[:, None]
    between, _ = made(x, GREY, "dequantize")
    flat = between.double().numpy()
    moments = Moments(flat.mean(0), flat.var(0), 0, 1)
    stored, info = made(x, GREY, "dequantize", "standardize", moments=moments)
    assert stored.mean().abs() < 1e-6  # float32 rounding of 3,600 numbers
    assert abs(stored.double().var(unbiased=False) - 1) < 1e-6
    assert torch.equal(to_display(stored, info), torch.from_numpy(x))


def test_binary_variants() -> None:
    x = np.tile(np.array([0, 64, 127, 128, 255], np.uint8), (4000, 1)).reshape(-1, 1, 1, 5)
    spec = DataSpec("image", (1, 1, 5), 256)
    hard, info = made(x, spec, "threshold")
    assert hard[0].flatten().tolist() == [0, 0, 0, 1, 1]  # 127/255 < 0.5 < 128/255
    assert to_display(hard, info)[0].flatten().tolist() == [0, 0, 0, 255, 255]
    static, _ = made(x, spec, "static")
    p = torch.tensor([0, 64, 127, 128, 255]) / 255
    assert ((static.float().mean(0).flatten() - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt()).all()  # five s.e.
    dynamic, _ = made(x, spec, "dynamic")
    assert torch.equal(dynamic, torch.from_numpy(x))  # greys are stored
    assert to_display(torch.tensor([[[[0.5, 1.0]]]]), info).flatten().tolist() == [128, 255]  # a mean, in data units


def test_noise_is_redrawn_for_each_example_and_seed_only() -> None:
    key = (noise.DEQUANTIZE, 0, 0)
    whole = noise.dequantization(key, np.arange(10), (3,))
    assert np.array_equal(noise.dequantization(key, np.array([7, 2]), (3,)), whole[[7, 2]])
    assert not np.array_equal(noise.dequantization((noise.DEQUANTIZE, 1, 0), np.arange(10), (3,)), whole)
    u = noise.dequantization(key, np.arange(50_000), (2,)).flatten()
    assert 0 < u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * len(u))  # five standard errors
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / len(u))


@pytest.mark.parametrize("lam", [1e-6, 0.05])
def test_logit_is_the_papers(lam: float) -> None:
    x = greys(20)[:, None]
    stored, info = made(x, GREY, {"name": "logit", "lam": lam})
    u = noise.dequantization((noise.DEQUANTIZE, 0, 0), np.arange(20), (1, 6, 6))
    p = torch.from_numpy(lam + (1 - 2 * lam) * (x + u) / 256)
    torch.testing.assert_close(stored, torch.logit(p).float())
    torch.testing.assert_close(undo(stored, info), torch.from_numpy(x + u), atol=1e-3, rtol=0)  # float32, of 256


@pytest.mark.parametrize(
    "transforms",
    [
        ["dequantize"],
        ["logit"],
        [{"name": "logit", "lam": 0.05}],
        ["dequantize", "standardize"],
        ["logit", "standardize"],
        [{"name": "pad", "to": 8}, "threshold"],
    ],
)
def test_log_det_is_that_of_the_jacobian(transforms: list[Any]) -> None:
    x = greys(3, side=2)[:, None]
    moments = Moments(np.full((1, 2, 2), 0.3), np.full((1, 2, 2), 4.0), 0, 1)
    stored, info = made(x, DataSpec("image", (1, 2, 2), 256), *transforms, moments=moments)
    if stored.dtype == torch.uint8:
        assert (log_det(stored, info) == 0).all()
        return
    for row, value in zip(stored.double(), log_det(stored, info), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda z: undo(z[None], info)[0].flatten(), row)
        assert isinstance(jacobian, torch.Tensor)
        torch.testing.assert_close(-torch.linalg.slogdet(jacobian.reshape(4, 4))[1], value)


@pytest.mark.parametrize("lam", [1e-6, 0.05])
def test_bits_per_dim_are_the_papers_formula_and_the_original_density(lam: float) -> None:
    x = greys(5)[:, None]
    stored, info = made(x, GREY, {"name": "logit", "lam": lam})
    z = stored.double()
    log_prob = torch.distributions.Normal(0.0, 3.0).log_prob(z).flatten(1).sum(1)
    s = torch.sigmoid(z).flatten(1)
    papers = -log_prob / (36 * math.log(2)) - math.log2(1 - 2 * lam) + 8 + (s.log2() + (1 - s).log2()).mean(1)
    # 1 − σ cancels for z ≫ 0 in the formula as written; logsigmoid, used in ours, does not
    torch.testing.assert_close(bits_per_dim(log_prob, stored, info), papers, atol=1e-6, rtol=0)
    uniform = -36 * math.log(256) - log_det(stored, info)  # the density that gives each level 1 / 256: 8 bits
    torch.testing.assert_close(bits_per_dim(uniform, stored, info), torch.full((5,), 8.0, dtype=torch.float64))
    stored, info = made(x, GREY, "dequantize")
    nll = torch.tensor([-100.0] * 5)
    expected = torch.full((5,), (-100 / 36 + math.log(256)) / math.log(2), dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(-nll, stored, info), expected)
    binary, info = made(x, GREY, "threshold")
    assert bits_per_dim(torch.full((5,), -36 * math.log(2)), binary, info).tolist() == pytest.approx([1.0] * 5)


def test_mu_law_is_the_papers_and_comes_back_within_half_a_level() -> None:
    x = np.linspace(-1, 1, 2001, dtype=np.float32).reshape(1, -1)
    spec = DataSpec("audio", (2001,), None)
    stored, info = made(x, spec, "mu_law")
    assert stored.dtype == torch.uint8
    assert stored[0, [0, 1000, 2000]].tolist() == [0, 128, 255]
    back = to_waveform(stored, info)

    def f(v: torch.Tensor) -> torch.Tensor:
        return v.sign() * torch.log1p(255 * v.abs()) / math.log(256)

    half = 0.5 / 127.5 + 1e-6  # half a level, and float32 rounding
    assert (f(back[0].double()) - f(torch.from_numpy(x[0]).double())).abs().max() <= half
    assert (stored == made(back.numpy(), spec, "mu_law")[0]).all()


@pytest.mark.parametrize(
    ("spec", "transforms", "message"),
    [
        (DataSpec("vector", (2,), None), ["static"], "static binarises grey integers; real-valued vector"),
        (DataSpec("image", (1, 4, 4), 2), ["dynamic"], "image of 2 levels is not that; leave it out"),
        (DataSpec("vector", (2,), None), ["logit"], "logit takes up to 256 integer levels"),
        (GREY, ["standardize"], "put dequantize before it"),
        (GREY, ["mu_law"], "mu_law takes real-valued audio"),
        (GREY, [{"name": "pad", "to": 5}], "would cut images of 6×6"),
        (GREY, ["dequantize", "pad"], "put it before the others"),
        (GREY, ["dynamic", "pad"], "nothing can follow it; put pad before it"),
    ],
)
def test_transforms_that_do_not_fit_are_refused(spec: DataSpec, transforms: list[Any], message: str) -> None:
    steps = parse({"source": "digits", "transform": transforms}).transform
    with pytest.raises(DataMismatch, match=message):
        follow(spec, steps)


def test_the_variants_name_tells_all_that_changes_the_task() -> None:
    config = parse({"source": "digits", "transform": [{"name": "pad", "to": 32}, {"name": "logit", "lam": 0.05}]})
    assert variant(config.transform) == "pad(to=32, value=0)+logit(lam=0.05)"
    assert variant(parse({"source": "digits"}).transform) == "plain"
    assert variant(parse({"source": "digits", "transform": "dynamic"}).transform) == "dynamic"


def test_variants_are_written_and_recorded(tmp_path: Path) -> None:
    dataset = prepared(tmp_path / "d", source="digits", size=8, transform=["dequantize", "standardize"])
    assert dataset.spec.levels is None
    x = dataset.split("train").rows(np.arange(len(dataset.split("train")))).x.double()
    assert abs(x.mean()) < 1e-6  # float32 rounding
    assert abs(x.var(unbiased=False) - 1) < 1e-5
    plain = prepared(tmp_path / "p", source="digits", size=8)
    for split in ("train", "val", "test"):
        rows = np.arange(len(plain.split(split)))
        shown = to_display(dataset.split(split).rows(rows).x, dataset.info)
        assert torch.equal(shown, plain.split(split).rows(rows).x)


def test_bits_of_mu_law_audio_are_of_its_levels() -> None:
    spec = DataSpec("audio", (5,), None)
    steps = parse({"source": "wav", "transform": "mu_law"}).transform
    info = {"original": spec.to_dict(), "transforms": records(spec, steps, None)}
    log_prob = torch.tensor([-5 * math.log(256)], dtype=torch.float64)
    assert bits_per_dim(log_prob, torch.zeros(1, 5), info).tolist() == pytest.approx([8.0])


def test_data_that_is_no_picture_or_sound_is_not_shown() -> None:
    info = {"original": DataSpec("vector", (2,), None).to_dict(), "transforms": []}
    with pytest.raises(DataMismatch, match="is no picture"):
        to_display(torch.zeros(1, 2), info)
    with pytest.raises(DataMismatch, match="cannot be played"):
        to_waveform(torch.zeros(1, 2), info)
    with pytest.raises(DataMismatch, match="report nats"):
        bits_per_dim(torch.zeros(1), torch.zeros(1, 2), info)
