"""Rejection by a classifier: how many are drawn, which are kept, what that makes of their law, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_core.config import Recipe, Strict
from dgm_core.contract import Clock, DataMismatch, DataSpec, GenerativeModel, Loss
from dgm_core.models.rejection import candidates, most_trusted, sample_trusted
from dgm_core.models.two_stage import TwoStage
from tests.families.latent.test_two_stage import GREY, code_model, priors

CLASSES = 3
DATA = DataSpec("vector", (2,), None, classes=CLASSES, class_shares=(0.5, 0.25, 0.25))


class Labelled(GenerativeModel):
    """A uniform number in [0, 1), and the label."""

    Config = Strict

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Strict, Recipe]:
        return Strict(), Recipe(steps=1)

    tiny = defaults

    def __init__(self, data: DataSpec = DATA) -> None:
        super().__init__(Strict(), data)
        self.asked: list[Tensor] = []

    def loss(self, batch, turn: str, clock: Clock) -> Loss:
        return Loss(torch.zeros(()))

    def sample(self, n: int, y=None, context={}, *, scale: float = 1.0) -> Tensor:
        self.asked.append(y)
        return torch.stack([scale * torch.rand(n), y.float()], 1)


def by_size(x: Tensor) -> Tensor:
    """Trusts a sample's own class with a probability that rises with its first number, and no other class."""
    p = 0.1 + 0.8 * x[:, 0].clamp(0, 1)
    rest = ((1 - p) / (CLASSES - 1))[:, None].repeat(1, CLASSES)
    return rest.scatter(1, x[:, 1:].long(), p[:, None]).log() + 7  # logits: a constant says nothing


def test_of_each_class_the_most_trusted_share_is_kept_in_the_order_asked_for():
    model = Labelled()
    y = torch.tensor([2, 0, 0, 2, 1, 0])
    kept = sample_trusted(model, 6, y, classifier=by_size, keep=0.25)
    (asked,) = model.asked
    assert asked.bincount().tolist() == [12, 4, 8]
    assert kept.drawn == 24
    assert torch.equal(kept.y, y)
    assert torch.equal(kept.x[:, 1].long(), y)
    torch.manual_seed(0)  # as before every test
    drawn = torch.rand(24)
    for label, n in ((0, 3), (1, 1), (2, 2)):
        best = drawn[asked == label].sort(descending=True).values[:n]
        assert sorted(kept.x[y == label, 0].tolist(), reverse=True) == best.tolist()
    expected = (0.1 + 0.8 * kept.x[:, 0]).log()  # the classifier's own p(y | x)
    torch.testing.assert_close(kept.log_prob, expected)


def test_kept_samples_follow_the_law_of_the_upper_share():
    """The best quarter of uniform numbers are uniform on [3/4, 1), however many classes there are."""
    n = 3000
    kept = sample_trusted(Labelled(), n, classifier=by_size, keep=0.25).x
    # The quantile of 4n draws strays by √(3/16 / 4n), some 0.004, for the rarest class by twice that: five of them.
    assert kept[:, 0].min().item() == pytest.approx(0.75, abs=0.04)
    assert kept[:, 0].mean().item() == pytest.approx(0.875, abs=0.01)
    share = (kept[:, 1] == 0).double().mean().item()  # labels keep their marginals: rejection is within a class
    assert share == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(n))


def test_keeping_all_is_sampling():
    model, y = Labelled(), torch.tensor([0, 0, 1, 2])
    kept = sample_trusted(model, 4, y, classifier=by_size, keep=1.0)
    torch.manual_seed(0)
    assert torch.equal(kept.x, model.sample(4, y))
    assert kept.drawn == 4


@pytest.mark.parametrize(
    ("n", "keep", "drawn"), [(3, 0.1, 30), (3, 0.3, 10), (1, 0.99, 2), (7, 0.5, 14), (5, 0.4, 13), (6, 0.6, 10)]
)
def test_how_many_are_drawn(n, keep, drawn):
    asked = candidates(torch.tensor([1] * n + [4]), keep)
    assert asked.tolist() == [1] * drawn + [4] * math.ceil(1 / keep)


def test_samples_that_are_no_numbers_are_trusted_least():
    log_prob = torch.tensor([math.nan, -5.0, math.nan, -1.0])
    assert most_trusted(torch.zeros(4, dtype=torch.long), log_prob, torch.zeros(2, dtype=torch.long)).tolist() == [1, 3]


def test_options_reach_the_model_and_draws_can_be_made_in_batches():
    y = torch.tensor([0, 1])
    kept = sample_trusted(Labelled(), 2, y, classifier=by_size, keep=0.5, scale=0.01)
    assert kept.x[:, 0].max().item() < 0.01
    batches = []

    def draw(labels: Tensor) -> Tensor:
        batches.extend(labels.split(3))
        return torch.cat([Labelled().sample(len(part), part) for part in labels.split(3)])

    kept = sample_trusted(Labelled(), 2, y, classifier=by_size, keep=0.25, draw=draw)
    assert [len(part) for part in batches] == [3, 3, 2]
    assert torch.equal(kept.y, y)


def test_a_two_stage_model_is_sampled_so_too():
    """Its priors draw the class as code: a classifier by brightness tells the classes from the decoded pictures."""
    whole = TwoStage(code_model(), priors(code_model()))
    y = torch.tensor([1, 0, 1])

    def classifier(x: Tensor) -> Tensor:
        bright = x.double().flatten(1).mean(1)
        return torch.stack([-bright, bright], 1)

    kept = sample_trusted(whole, 3, y, classifier=classifier, keep=0.5)
    assert kept.x.shape == (3, *GREY.shape)
    assert kept.x.dtype == torch.uint8
    assert kept.drawn == 6
    assert torch.equal(kept.x[0], kept.x[2])
    assert not torch.equal(kept.x[0], kept.x[1])


def test_what_cannot_be_kept_by_class_is_refused_in_words():
    with pytest.raises(ValueError, match="a share above 0, up to 1"):
        sample_trusted(Labelled(), 2, classifier=by_size, keep=0.0)
    with pytest.raises(ValueError, match="a share above 0, up to 1"):
        sample_trusted(Labelled(), 2, classifier=by_size, keep=1.5)
    with pytest.raises(DataMismatch, match="no classes"):
        sample_trusted(Labelled(DataSpec("vector", (2,), None)), 2, classifier=by_size, keep=0.5)
    with pytest.raises(DataMismatch, match="labels lie in 0 … 2"):
        sample_trusted(Labelled(), 1, torch.tensor([3]), classifier=by_size, keep=0.5)
    with pytest.raises(DataMismatch, match="4 samples of 3 classes need"):
        sample_trusted(Labelled(), 2, torch.tensor([0, 0]), classifier=lambda x: x, keep=0.5)
