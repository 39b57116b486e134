"""Which examples are looked at, and that looking leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dgm_core.contract import Batch, DataMismatch
from dgm_core.evaluation.examples import quiet, seeded, take
from tests.evaluation.handmade import factory


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
@pytest.mark.parametrize("n", [2, 10, 33, 100])
def test_examples_are_spread_over_a_sorted_split(size: int, n: int):
    """Five classes stored one after the other: every one is among the examples, in equal shares."""
    total = 500
    split = Batch(torch.arange(total)[:, None], torch.arange(total) // 100, {"top": torch.arange(total)[:, None]})
    got = take(factory(split, size)(), n)
    assert got.x.shape[0] == n
    assert torch.equal(got.x[:, 0] // 100, got.y)  # rows stay together
    assert torch.equal(got.x, got.context["top"])
    gaps = got.x[:, 0].diff()
    # The stride doubles until fewer than 2n are held, and of those n are picked evenly: gaps are of one or two strides.
    assert gaps.min() > 0
    assert gaps.max() <= 2 * gaps.min() or n == 2
    if n >= 10:
        assert torch.bincount(got.y).tolist() == pytest.approx([n / 5] * 5, abs=max(2, 0.3 * n / 5))


def test_few_examples_come_whole_and_in_order():
    split = Batch(torch.arange(9)[:, None])
    assert torch.equal(take(factory(split, 2)(), 100).x, split.x)


def test_an_empty_split_is_refused():
    with pytest.raises(DataMismatch, match="no example"):
        take(iter([]), 3)


def test_seeded_leaves_the_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        inside = torch.rand(3)
    with seeded(1):
        assert torch.equal(torch.rand(3), inside)
    assert torch.equal(torch.rand(3), expected)


def test_quiet_puts_every_modes_back_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model.train()
    model[1].eval()  # a part that is frozen stays frozen

    def look() -> None:
        with quiet(model, 0):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        look()
    assert [m.training for m in model.modules()] == [True, True, False, False]
    assert torch.is_grad_enabled()
