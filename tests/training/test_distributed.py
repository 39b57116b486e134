"""Collectives against what one process computes, and their gradients against autograd's on the whole."""

from __future__ import annotations

import torch

from dgm_core import distributed
from tests.support import TwoRanks

WHOLE = torch.arange(21, dtype=torch.float64).reshape(7, 3).sin()


def gather_and_differentiate() -> tuple[torch.Tensor, torch.Tensor]:
    x = WHOLE[distributed.share(7)].clone().requires_grad_()  # 3 rows here, 4 there
    rows = distributed.gather_rows(x)
    weight = x.shape[0] / 7
    # Each rank's loss couples its own rows to all rows; the global loss is their weighted sum.
    loss = ((x[:, None] - rows[None]).square().sum(-1) + 1).log().sum(1).mean() * weight
    (grad,) = torch.autograd.grad(loss, x)
    return rows.detach(), grad


def test_gathered_rows_carry_the_gradient_of_the_whole_batch(two_ranks: TwoRanks) -> None:
    x = WHOLE.clone().requires_grad_()
    loss = ((x[:, None] - x[None]).square().sum(-1) + 1).log().sum(1).mean()
    (expected,) = torch.autograd.grad(loss, x)
    results = two_ranks.run(gather_and_differentiate)
    for rows, _ in results:
        assert torch.equal(rows, WHOLE)
    assert torch.allclose(torch.cat([grad for _, grad in results]), expected, atol=1e-14)


def second_derivative() -> torch.Tensor:
    x = WHOLE[distributed.share(7)].clone().requires_grad_()
    total = distributed.all_reduce(x.sum(0))
    share = (x.shape[0] / 7) * total.pow(3).sum()
    (grad,) = torch.autograd.grad(share, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    return second


def test_all_reduce_is_twice_differentiable(two_ranks: TwoRanks) -> None:
    x = WHOLE.clone().requires_grad_()
    (grad,) = torch.autograd.grad(x.sum(0).pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), x)
    got = torch.cat(two_ranks.run(second_derivative))
    assert torch.allclose(got, expected, atol=1e-12)


def chosen_rows() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(distributed.rank())  # streams differ, the choice must not
    x = WHOLE[distributed.share(7)]
    return distributed.choose_rows(x, 4), distributed.choose_rows(x, 9)


def test_every_rank_chooses_the_same_rows_of_the_whole_batch(two_ranks: TwoRanks) -> None:
    (few, many), (few2, many2) = two_ranks.run(chosen_rows)
    assert torch.equal(few, few2)
    assert torch.equal(many, many2)
    assert all(any(torch.equal(row, other) for other in WHOLE) for row in few)
    assert len({tuple(row.tolist()) for row in few}) == 4  # without repeats where there are enough


def test_shares_cover_everything_once_and_differ_by_at_most_one() -> None:
    for total in range(1, 40):
        for world in range(1, 9):
            slices = [distributed.share(total, r, world) for r in range(world)]
            assert [i for s in slices for i in range(s.start, s.stop)] == list(range(total))
            sizes = [s.stop - s.start for s in slices]
            assert max(sizes) - min(sizes) <= 1
