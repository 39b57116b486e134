"""What an opponent knows, against brute force and against what the game itself says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_core.capabilities import HasCritic
from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.evaluation.critics import above
from dgm_core.evaluation.evaluate import evaluate
from dgm_core.evaluation.record import Evaluation, EvaluationConfig
from dgm_core.models import CATALOG
from tests.evaluation.handmade import Blank, factory

POINTS = DataSpec("vector", (2,), None)
REAL = DataSpec("image", (1, 8, 8), None, classes=2)


class Game(Blank, HasCritic):
    """Scores are the first coordinate: what the tests put there."""

    def __init__(self, made: float, threshold: float | None = 0.0) -> None:
        super().__init__(POINTS)
        self.made, self.at = made, threshold

    @property
    def threshold(self) -> float | None:
        return self.at

    def data_scores(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x[:, 0]

    def sample_scores(self, n: int) -> Tensor:
        return self.made + torch.randn(n)


def run(model: Game, out: Path, train: float, test: float) -> Evaluation:
    generator = torch.Generator().manual_seed(0)

    def split(mean: float) -> Any:
        return factory(Batch(torch.randn(500, 2, generator=generator) + torch.tensor([mean, 0.0])))

    options = EvaluationConfig(figures=False, samples=20)
    splits = {"train": split(train), "val": split(test), "test": split(test)}
    return evaluate(model, spec=POINTS, info={}, judge=None, options=options, out=out, seed=0, **splits)


def test_pairs_are_counted_with_halves_for_ties():
    a, b = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 0.0])
    share, _ = above(a, b)
    assert share == pytest.approx((1 + 1.5 + 1.5) / 6)


def test_the_share_of_pairs_and_its_error():
    """Of N(1, 1) against N(0, 1) the share is Φ(1/√2); the error is that over repeated draws."""
    found = [above(torch.randn(200) + 1, torch.randn(300)) for _ in range(400)]
    shares = torch.tensor([share for share, _ in found])
    assert shares.mean().item() == pytest.approx(0.760, abs=0.005)  # four standard errors of 400 draws
    assert found[0][1] == pytest.approx(shares.std().item(), rel=0.3)


def test_accuracies_are_those_of_the_threshold(tmp_path: Path):
    found = run(Game(made=-1.0), tmp_path, train=1.0, test=1.0).metrics
    for name in ("accuracy_train", "accuracy_held_out", "accuracy_samples"):
        assert found[f"critic/{name}"].value == pytest.approx(0.841, abs=0.07)  # Φ(1), four standard errors of 500
    assert found["critic/train_from_held_out"].value == pytest.approx(0.5, abs=0.08)


def test_overfitting_is_said(tmp_path: Path):
    found = run(Game(made=0.0), tmp_path, train=1.0, test=0.0)
    assert found.metrics["critic/train_from_held_out"].value == pytest.approx(0.76, abs=0.08)
    assert any("training from held-out" in w for w in found.warnings)
    assert not any("training from held-out" in w for w in run(Game(made=0.0), tmp_path, 0.0, 0.0).warnings)


def test_winning_outright_is_said_of_discriminators_only(tmp_path: Path):
    assert any("wins outright" in w for w in run(Game(made=-9.0), tmp_path, 0.0, 0.0).warnings)
    critic = run(Game(made=-9.0, threshold=None), tmp_path, 0.0, 0.0)  # a Wasserstein critic is meant to
    assert not any("wins outright" in w for w in critic.warnings)
    assert "critic/accuracy_train" not in critic.metrics
    assert critic.metrics["critic/data_from_samples"].value == 1


@pytest.mark.parametrize("name", ["gan", "dcgan", "cgan", "ac_gan", "sagan", "biggan", "stylegan"])
def test_scores_are_those_of_the_game(name: str):
    """The share of data that the game itself says was recognised, on the same batch."""
    model_class = CATALOG[name]
    torch.manual_seed(0)
    model = model_class(model_class.tiny(REAL)[0], REAL).double().eval()
    assert isinstance(model, HasCritic)
    batch = Batch(torch.randn(64, *REAL.shape).double(), torch.arange(64) % 2)
    turn = next(t.name for t in model.turns() if t.name.startswith("discriminator"))
    with torch.no_grad():
        said = model.loss(batch, turn, Clock(0, 1)).metrics["accuracy_real"]
        scores, made = model.data_scores(batch.x, batch.y), model.sample_scores(5)
    assert made.shape == (5,)
    assert scores.shape == (64,)
    assert 0 < (scores > 0).double().mean().item() == pytest.approx(said.item())


@pytest.mark.parametrize("name", ["improved_gan", "wgan", "wgan_gp", "pro_gan", "vae_gan"])
def test_every_opponent_has_scores(name: str):
    model_class = CATALOG[name]
    model = model_class(model_class.tiny(REAL)[0], REAL).eval()
    assert isinstance(model, HasCritic)
    with torch.no_grad():
        assert model.data_scores(torch.randn(6, *REAL.shape)).shape == (6,)
        assert model.sample_scores(3).shape == (3,)
    assert (model.threshold is None) == (name in ("wgan", "wgan_gp", "pro_gan"))
