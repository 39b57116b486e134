"""Latents on the plane, exchanged, and against known factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from dgm_core.capabilities import HasDecoder, HasPosterior
from dgm_core.contract import Batch, DataSpec
from dgm_core.data.sprites import Sprites
from dgm_core.evaluation import disentanglement, latent_maps
from dgm_core.evaluation.evaluate import evaluate
from dgm_core.evaluation.reconstructions import reconstruct_exchanged
from dgm_core.evaluation.record import Evaluation, EvaluationConfig
from tests.evaluation.handmade import IMAGES, Blank, Everything, factory, images

SPRITES = {"size": 8, "scales": 2, "rotations": 2, "positions": 3}
FACTORS = {"shape": 3, "scale": 2, "rotation": 2, "x": 3, "y": 3}
INFO: dict[str, Any] = {"config": SPRITES, "factors": FACTORS, "transforms": [], "seed": 0}


def test_the_plane_is_of_the_greatest_kl_and_of_the_first_principal_components():
    torch.manual_seed(0)
    means = torch.randn(200, 4, dtype=torch.float64) @ torch.diag(torch.tensor([0.1, 3.0, 0.5, 2.0]).double())
    units, principal = latent_maps.panels(means, torch.tensor([5.0, 0.0, 1.0, 0.5]))
    assert (units.across, units.up) == ("dimension 0", "dimension 2")
    assert torch.equal(units.points, means[:, [0, 2]])
    values, vectors = np.linalg.eigh(np.cov(means.numpy().T))
    expected = (means - means.mean(0)).numpy() @ vectors[:, ::-1][:, :2]
    signs = np.sign((expected * principal.points.numpy()).sum(0))
    assert np.allclose(principal.points.numpy(), expected * signs, atol=1e-9)
    assert principal.across == f"component 1 ({100 * values[-1] / values.sum():.0f} % of the variance)"


def test_of_two_latents_there_is_one_plane():
    assert len(latent_maps.panels(torch.randn(9, 2).double(), None)) == 1


class Numbered(Blank, HasPosterior, HasDecoder):
    """The latent is the first pixel's value, twice; the picture is of that value everywhere, or, deaf, of 100."""

    def __init__(self, deaf: bool = False) -> None:
        super().__init__(IMAGES)
        self.deaf = deaf

    def posterior(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Distribution:
        mean = x[:, 0, 0, :1].double().expand(-1, 2)
        return Independent(Normal(mean, torch.ones_like(mean)), 1)

    def kl(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        return torch.ones(len(x), 2)

    def draw_latent(self, n: int) -> Tensor:
        return torch.randn(n, 2)

    def decode(self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        value = torch.full_like(z[:, 0], 100.0) if self.deaf else z[:, 0]
        return value[:, None, None, None].expand(-1, 1, 4, 4)


def run(model: Any, batch: Batch, out: Path, info: Mapping[str, Any] = {}) -> Evaluation:
    options = EvaluationConfig(samples=20, figures=False)
    splits = {name: factory(batch) for name in ("train", "val", "test")}
    return evaluate(model, spec=model.data, info=info, judge=None, options=options, out=out, seed=0, **splits)


def flat(n: int) -> Batch:
    """Pictures of one value each, all different."""
    return Batch(torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 4, 4).contiguous())


@pytest.mark.parametrize("model", [Numbered(), Everything()])
def test_nobody_keeps_its_own_latent_and_every_latent_is_used(model: Numbered | Everything):
    batch = flat(100) if isinstance(model, Numbered) else images(100)
    exchanged = reconstruct_exchanged(model, batch, 32)
    assert exchanged.shape == batch.x.shape
    if isinstance(model, Numbered):
        found = exchanged[:, 0, 0, 0].long()
        assert (found != torch.arange(100)).all()
        assert sorted(found.tolist()) == list(range(100))


def test_the_rise_is_that_of_the_squared_error(tmp_path: Path):
    batch = flat(100)
    noisy = Batch(batch.x.clone())
    noisy.x[:, :, 3] += 3  # a quarter of the pixels is off by three levels in every reconstruction
    metric = run(Numbered(), noisy, tmp_path).metrics["exchanged_latent_rise"]
    own = 0.25 * 9 / 255**2
    assert metric.value == pytest.approx(metric.context["exchanged_mse"] / own - 1, rel=1e-5)  # float32 pixels
    assert metric.value > 10


def test_a_decoder_that_does_not_listen_is_told_of(tmp_path: Path):
    found = run(Numbered(deaf=True), flat(50), tmp_path)
    assert found.metrics["exchanged_latent_rise"].value == 0
    assert any("hardly listens" in w for w in found.warnings)
    assert not any("hardly listens" in w for w in run(Everything(), images(50), tmp_path).warnings)


class Knows(Numbered):
    """Its latents are the factors themselves, looked up by the picture; or all of them the first."""

    def __init__(self, columns: tuple[int, ...]) -> None:
        super().__init__()
        self.data = DataSpec("image", (1, 8, 8), 256, classes=3)
        x, factors, _ = disentanglement.every_combination(INFO)
        self.known = {picture.numpy().tobytes(): row for picture, row in zip(x, factors, strict=True)}
        self.columns = columns

    def posterior(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Distribution:
        rows = torch.stack([self.known[picture.numpy().tobytes()] for picture in x])
        mean = rows[:, list(self.columns)].double()
        return Independent(Normal(mean, torch.full_like(mean, 0.01)), 1)

    def decode(self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        return z[:, :1, None, None].expand(-1, 1, 8, 8)


def test_every_combination_is_drawn_in_order():
    x, factors, counts = disentanglement.every_combination(INFO)
    assert counts == tuple(FACTORS.values())
    assert len(x) == len(factors.unique(dim=0)) == math.prod(counts)
    again = Sprites(**SPRITES).draw(factors.numpy()[17:18])
    assert np.array_equal(x[17:18].numpy(), again)
    assert len(x.unique(dim=0)) == len(x)  # or the model below could not look factors up


def test_latents_that_are_the_factors_have_the_best_scores(tmp_path: Path):
    x, factors, _ = disentanglement.every_combination(INFO)
    batch = Batch(x, factors[:, 0])
    best = run(Knows((0, 1, 2, 3, 4)), batch, tmp_path, INFO).metrics
    assert best["mutual_information_gap"].value == pytest.approx(1, abs=1e-6)
    assert best["beta_vae_metric"].value == 1
    assert best["beta_vae_metric"].floor == pytest.approx(1 / 5)
    assert best["mutual_information_gap"].context["factors"] == FACTORS
    # Two latents that say the same of one factor, and none of the others.
    worst = run(Knows((0, 0)), batch, tmp_path, INFO).metrics
    assert worst["mutual_information_gap"].value == pytest.approx(0, abs=1e-6)
    assert worst["beta_vae_metric"].value < 0.6


def test_without_known_factors_nothing_is_said_of_them(tmp_path: Path):
    assert "mutual_information_gap" not in run(Everything(), images(50), tmp_path).metrics
