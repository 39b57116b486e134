from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.data import noise
from dgm_core.data.batches import Stream, one_pass
from dgm_core.data.shards import Dataset, write_dataset
from tests.data.builders import numbered, prepared


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepared(tmp_path_factory.mktemp("digits") / "d", source="digits", size=8, transform="dynamic")


def index(batch: Batch) -> list[int]:
    assert batch.index is not None
    return batch.index.tolist()


def equal(a: Batch, b: Batch) -> bool:
    assert a.y is not None
    assert b.y is not None
    same = torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and index(a) == index(b)
    return same and all(torch.equal(a.context[k], b.context[k]) for k in a.context)


@pytest.mark.parametrize("size", [1, 7, 50, 64, 130])  # within an epoch, all of it, across one end, across several
def test_every_epoch_visits_each_example_once(tmp_path: Path, size: int) -> None:
    stream = Stream(numbered(tmp_path / "d").split("train"), seed=3)
    seen = [i for position in range(0, 200, size) for i in index(stream.at(position, size))][:200]
    epochs = [seen[start : start + 50] for start in range(0, 200, 50)]
    assert all(Counter(epoch) == Counter(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # and in another order each time


def test_seeds_differ_and_orders_are_uniform(tmp_path: Path) -> None:
    split = numbered(tmp_path / "d").split("train")
    assert index(Stream(split, seed=0).at(0, 50)) != index(Stream(split, seed=1).at(0, 50))
    firsts = Counter(index(Stream(split, seed=seed).at(0, 1))[0] for seed in range(2000))
    chi2 = sum((firsts[k] - 40) ** 2 / 40 for k in range(50))
    assert chi2 < 49 + 5 * (2 * 49) ** 0.5  # five standard deviations of χ² with 49 degrees of freedom


def test_a_batch_is_a_function_of_its_position(digits: Dataset) -> None:
    split = digits.split("train")
    forward = Stream(split, seed=5, augment=["hflip"])
    batches = {p: forward.at(p, 100) for p in range(0, 4000, 100)}
    again = Stream(split, seed=5, augment=["hflip"])
    for p in (3900, 0, 1400, 1300, 2800):  # backwards, and across the ends of epochs (1,437 examples)
        assert equal(again.at(p, 100), batches[p])


def test_neighbouring_batches_continue_each_other(digits: Dataset) -> None:
    stream = Stream(digits.split("train"), seed=5, augment=["hflip"])
    whole = stream.at(1300, 300)
    parts = [stream.at(1300 + start, 60) for start in range(0, 300, 60)]
    assert torch.equal(whole.x, torch.cat([p.x for p in parts]))
    assert index(whole) == [i for p in parts for i in index(p)]


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("position", [0, 1400, 1437 * 3 - 1])
def test_rank_shares_concatenate_to_the_batch_noise_included(digits: Dataset, world: int, position: int) -> None:
    split = digits.split("train")
    whole = Stream(split, seed=2, augment=["hflip"]).at(position, 64)
    parts = [Stream(split, seed=2, augment=["hflip"]).at(position, 64, rank=r, world=world) for r in range(world)]
    assert torch.equal(whole.x, torch.cat([p.x for p in parts]))
    assert index(whole) == [i for p in parts for i in index(p)]


def test_a_rank_may_have_nothing(tmp_path: Path) -> None:
    stream = Stream(numbered(tmp_path / "d").split("train"), seed=0)
    parts = [stream.at(50, 2, rank=r, world=4) for r in range(4)]
    assert [len(p.x) for p in parts] == [0, 1, 0, 1]
    assert index(stream.at(50, 2)) == [i for p in parts for i in index(p)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_one_pass_is_in_order_and_shared(tmp_path: Path, world: int) -> None:
    split = numbered(tmp_path / "d").split("train")
    ranks = [list(one_pass(split, 7, rank=r, world=world)) for r in range(world)]
    assert Counter(i for rank in ranks for b in rank for i in index(b)) == Counter(range(50))
    if world == 1:
        assert [i for b in ranks[0] for i in index(b)] == list(range(50))
    if world == 4:  # the last batch holds one example: three ranks skip it
        assert sorted(len(rank) for rank in ranks) == [7, 7, 7, 8]


def test_dynamic_binarisation_draws_anew_every_epoch_with_the_right_odds(digits: Dataset) -> None:
    split = digits.split("train")
    assert split.spec.levels == 2
    stream, n = Stream(split, seed=1), len(split)
    total = torch.zeros(n, 1, 8, 8)
    epochs = 60
    drawn = []
    for epoch in range(epochs):
        batch = stream.at(epoch * n, n)
        assert batch.x.dtype == torch.uint8
        total[batch.index] += batch.x
        drawn.append(batch.x[torch.argsort(torch.tensor(index(batch)))])
    assert not torch.equal(drawn[0], drawn[1])
    p = split.stored(np.arange(n)).x / 255
    z = (total / epochs - p) / (p * (1 - p) / epochs).sqrt().clamp_min(1e-9)
    assert ((total == 0) | (p > 0)).all()  # black stays black
    assert ((total == epochs) | (p < 1)).all()  # white stays white
    grey = (p > 0.1) & (p < 0.9)
    # mean and variance of standardised counts, within five standard errors (kurtosis of a binomial is below 3.2)
    count = int(grey.sum())
    assert abs(z[grey].mean()) < 5 / count**0.5
    assert abs(z[grey].square().mean() - 1) < 5 * (2.2 / count) ** 0.5


def test_draws_of_different_pixels_are_independent(digits: Dataset) -> None:
    """The two halves of each random number, neighbouring pixels and neighbouring examples do not correlate."""
    grey = np.full((4000, 64), 128, np.uint8)
    x = noise.bernoulli((noise.DYNAMIC, 0, 0), np.arange(4000), grey, 256) - 128 / 255
    covariance = x.T @ x / 4000 / (128 / 255 * 127 / 255)
    off = covariance[~np.eye(64, dtype=bool)]
    assert np.abs(off).max() < 6 / 4000**0.5  # 4,032 correlations: six standard errors
    assert abs((x[:-1] * x[1:]).mean() * 4) < 5 / (4000 * 64) ** 0.5


def test_one_pass_fixes_the_draw_whatever_the_batch_size(digits: Dataset) -> None:
    split = digits.split("test")

    def drawn(size: int, seed: int) -> torch.Tensor:
        return torch.cat([b.x for b in one_pass(split, size, seed=seed)])

    assert torch.equal(drawn(7, 0), drawn(64, 0))
    assert not torch.equal(drawn(64, 0), drawn(64, 1))
    assert not torch.equal(drawn(len(split), 0), Stream(split, seed=0).at(0, len(split)).x)


def test_flips_are_fair_mirror_images_and_drawn_per_epoch(tmp_path: Path) -> None:
    spec = DataSpec("image", (1, 1, 2), 256)
    x = torch.tensor([0, 9], dtype=torch.uint8).expand(2000, 1, 1, 2)
    split = write_dataset(tmp_path / "d", spec, {s: [Batch(x)] for s in ("train", "val", "test")}, {}).split("train")
    stream = Stream(split, seed=0, augment=["hflip"])
    epochs = []
    for epoch in range(2):
        batch = stream.at(2000 * epoch, 2000)
        assert (batch.x.sum(-1) == 9).all()
        flipped = torch.zeros(2000)
        flipped[batch.index] = (batch.x[:, 0, 0, 0] == 9).float()
        assert abs(flipped.mean() - 0.5) < 5 * 0.5 / 2000**0.5  # five standard errors
        epochs.append(flipped)
    assert abs((epochs[0] != epochs[1]).float().mean() - 0.5) < 5 * 0.5 / 2000**0.5
    assert torch.equal(next(one_pass(split, 2000)).x, x)  # a pass is not augmented


def test_flips_are_refused_where_they_make_no_sense(tmp_path: Path) -> None:
    split = numbered(tmp_path / "d").split("train")
    with pytest.raises(DataMismatch, match="hflip mirrors images"):
        Stream(split, seed=0, augment=["hflip"])
    with pytest.raises(DataMismatch, match="'vflip' is not known; accepted: hflip"):
        Stream(split, seed=0, augment=["vflip"])


def test_torchs_generator_is_not_touched(digits: Dataset) -> None:
    torch.manual_seed(1)
    Stream(digits.split("train"), seed=0, augment=["hflip"]).at(0, 64)
    list(one_pass(digits.split("val"), 64))
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
