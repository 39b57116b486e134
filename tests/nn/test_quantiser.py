"""The quantiser against brute force, its formulas written out, and Lloyd's algorithm."""

from __future__ import annotations

import math

import pytest
import torch

from dgm_core.nn import quantiser as module
from dgm_core.nn.quantiser import VectorQuantiser, kmeans, nearest, pick_rows, rotation, straight_through

K, D = 6, 3


def make(**options) -> VectorQuantiser:
    torch.manual_seed(0)
    q = VectorQuantiser(K, D, **options).double()
    q.codebook.data.normal_()
    if q.learn == "ema":
        q.code_sum.copy_(q.codebook / K)
    return q


def state(q: VectorQuantiser) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in (*q.named_parameters(), *q.named_buffers())}


def grids(*shape: int) -> torch.Tensor:
    return torch.randn(shape[0], D, *shape[1:], dtype=torch.float64)


def test_nearest_is_the_brute_force_minimum_in_any_chunking(monkeypatch):
    rows, codebook = torch.randn(101, D, dtype=torch.float64), torch.randn(K, D, dtype=torch.float64)
    brute = (rows[:, None] - codebook[None]).square().sum(2).argmin(1)
    for held in (1, 7 * K, 2**22):
        monkeypatch.setattr(module, "CHUNK", held)
        assert torch.equal(nearest(rows, codebook), brute)


def test_distances_are_held_in_one_small_buffer(monkeypatch):
    """Not in a new one for each part: those left holes in the heap, until all N × K distances were held after all."""
    held, original = [], torch.addmm

    def watch(*args, out, **options):
        held.append((out.untyped_storage().data_ptr(), out.untyped_storage().nbytes()))
        return original(*args, out=out, **options)

    monkeypatch.setattr(module, "CHUNK", 8 * K)
    monkeypatch.setattr(torch, "addmm", watch)
    nearest(torch.randn(101, D), torch.randn(K, D))
    assert len(held) == 13
    assert set(held) == {(held[0][0], 4 * 8 * K)}


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 7)])
def test_value_codes_and_losses(shape):
    q, z = make(), grids(*shape)
    out = q(z)
    e = q.look_up(out.codes)
    assert out.codes.shape == (shape[0], *shape[1:])
    torch.testing.assert_close(out.value, e)
    assert out.commitment.item() == pytest.approx((z - e).square().mean().item())
    assert out.codebook.item() == pytest.approx((z - e).square().mean().item())
    flat = z.movedim(1, -1).reshape(-1, D)
    assert torch.equal(out.codes.flatten(), nearest(flat, q.codebook))


def test_losses_reach_the_side_that_they_are_for():
    q = make(learn="loss")
    z = grids(4, 2, 2).requires_grad_()
    out = q(z)
    on_z, on_e = torch.autograd.grad(out.commitment, (z, q.codebook), allow_unused=True)
    assert on_e is None
    torch.testing.assert_close(on_z, 2 * (z - q.look_up(out.codes)).detach() / z.numel())
    on_z, on_e = torch.autograd.grad(out.codebook, (z, q.codebook), allow_unused=True)
    assert on_z is None
    rows = z.detach().movedim(1, -1).reshape(-1, D)
    expected = torch.zeros(K, D, dtype=torch.float64)
    for row, code in zip(rows, out.codes.flatten(), strict=True):
        expected[code] += 2 * (q.codebook[code].detach() - row) / z.numel()
    torch.testing.assert_close(on_e, expected)


def test_straight_through_has_the_gradient_of_the_identity():
    z, e = torch.randn(2, 9, D, dtype=torch.float64)
    z.requires_grad_()
    g = torch.randn(9, D, dtype=torch.float64)
    value = straight_through(z, e)
    torch.testing.assert_close(value, e)
    assert torch.equal(torch.autograd.grad(value, z, g)[0], g)


def test_rotation_turns_and_scales_the_gradient():
    z, e = torch.randn(2, 9, D, dtype=torch.float64)
    z.requires_grad_()
    g = torch.randn(9, D, dtype=torch.float64)
    value = rotation(z, e)
    torch.testing.assert_close(value, e)
    (found,) = torch.autograd.grad(value, z, g)
    for i in range(9):
        a, b = z[i].detach() / z[i].detach().norm(), e[i] / e[i].norm()
        r = (a + b) / (a + b).norm()
        R = torch.eye(D, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
        torch.testing.assert_close(R @ a, b)  # it is the rotation of z onto e …
        torch.testing.assert_close(R @ R.T, torch.eye(D, dtype=torch.float64))
        torch.testing.assert_close(found[i], e[i].norm() / z[i].detach().norm() * R.T @ g[i])
        # … so that the gradient has to z the angle that it had to e.
        torch.testing.assert_close(found[i] @ a / found[i].norm(), g[i] @ b / g[i].norm())


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_estimators_survive_degenerate_directions(estimator):
    q = make(estimator=estimator)
    q.codebook.data[:2] = torch.tensor([[1.0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    z = torch.zeros(1, D, 1, dtype=torch.float64).requires_grad_()  # no direction, and a code with none
    out = q(z)
    out.value.sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_moving_averages_follow_the_papers_recursion():
    """A.1 in counts, as printed, on a fixed encoder: N ← γN + (1 − γ)n, m ← γm + (1 − γ)Σz, e = m / N."""
    q = make(decay=0.9)
    rows = 4 * 5 * 5
    N = torch.full((K,), rows / K, dtype=torch.float64)
    m = q.codebook * N[:, None]
    for _ in range(5):
        z = grids(4, 5, 5)
        flat = z.movedim(1, -1).reshape(-1, D)
        codes = nearest(flat, m / N[:, None])
        one_hot = torch.nn.functional.one_hot(codes, K).double()
        N = 0.9 * N + 0.1 * one_hot.sum(0)
        m = 0.9 * m + 0.1 * one_hot.T @ flat
        q(z, observe=True)
        q.settle()
        torch.testing.assert_close(q.codebook, m / N[:, None])
        torch.testing.assert_close(q.usage, N / rows)


def test_without_memory_a_settling_is_a_step_of_k_means():
    q, z = make(decay=0.0), grids(8, 4, 4)
    flat = z.movedim(1, -1).reshape(-1, D)
    for _ in range(30):
        codes = nearest(flat, q.codebook)
        before = q.codebook.clone()
        q(z, observe=True)
        q.settle()
        for k in range(K):
            mine = flat[codes == k]
            # A code that nothing chose keeps its place: there is no 0 / 0.
            torch.testing.assert_close(q.codebook[k], mine.mean(0) if len(mine) else before[k])
    assert torch.equal(nearest(flat, q.codebook), codes)  # and it has converged to a fixed point of Lloyd's


def test_an_unused_code_keeps_its_place_for_ever():
    q = VectorQuantiser(2, 1, decay=0.5)  # float32, where 0.5^1000 is 0
    q.codebook.copy_(torch.tensor([[0.0], [100.0]]))
    q.code_sum.copy_(q.codebook / 2)
    for _ in range(1000):
        q(torch.randn(2, 1, 3), observe=True)
        q.settle()
    assert q.codebook[1].item() == pytest.approx(100, rel=1e-5)
    assert q.usage.isfinite().all()


@pytest.mark.parametrize("learn", ["ema", "loss"])
def test_revival_moves_dead_codes_onto_the_batch_and_resets_their_state(learn):
    q = make(learn=learn, decay=0.9, revive_below=0.5)
    q.codebook.data[3:] = 1e3  # never the nearest
    if learn == "ema":
        q.code_sum.copy_(q.codebook / K)
    silent = make(learn=learn, decay=0.9, revive_below=0.0)
    silent.load_state_dict(q.state_dict())
    z = grids(4, 2, 2)
    flat = z.movedim(1, -1).reshape(-1, D)
    plays = math.ceil(math.log(0.5) / math.log(0.9))  # until the use of a code out of use falls below half its share
    for i in range(plays):
        torch.testing.assert_close(q.codebook.detach()[3:], torch.full((3, D), 1e3, dtype=torch.float64))
        assert (q.usage[3:] < 1 / K).all() == (i > 0)
        for quantiser in (q, silent):
            quantiser(z, observe=True)
            quantiser.settle()
    assert (silent.codebook.data[3:] > 900).all()
    torch.testing.assert_close(q.codebook[:3], silent.codebook[:3])  # codes in use do not notice
    torch.testing.assert_close(q.usage[3:], torch.full((3,), 1 / K, dtype=torch.float64))
    for k in range(3, K):
        assert (flat == q.codebook[k].detach()).all(1).any()  # on one of the batch's rows
    if learn == "ema":
        torch.testing.assert_close(q.code_sum[3:], q.codebook[3:] / K)
        kept = q.codebook.clone()
        q(1e-9 * z, observe=True)  # nothing reaches the revived codes: were m and N not reset, they would jump
        q.settle()
        torch.testing.assert_close(q.codebook[3:], kept[3:])


@pytest.mark.parametrize("learn", ["ema", "loss"])
def test_nothing_moves_without_observing(learn):
    q = make(learn=learn, revive_below=0.5)
    before = state(q)
    q(grids(4, 2, 2))
    q.settle()
    assert all(torch.equal(t, before[name]) for name, t in state(q).items())


def test_observing_adds_and_settling_zeroes():
    q, z = make(revive_below=0.1), grids(4, 2, 2)
    before = {k: v for k, v in state(q).items() if not k.startswith("batch")}
    q(z, observe=True)
    assert q.batch_count.sum() == 16
    assert all(torch.equal(state(q)[name], t) for name, t in before.items())
    q.settle()
    assert not q.batch_count.any()
    assert not q.batch_sum.any()
    assert not torch.equal(q.codebook, before["codebook"])


def test_microbatches_settle_as_one_batch():
    z = grids(9, 2, 2)
    ends = []
    for pieces in (1, 3):
        q = make(decay=0.5, revive_below=0.9)
        for _ in range(3):
            for part in z.chunk(pieces):
                q(part, observe=True)
            q.settle()
        ends.append(state(q))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name])


def test_perplexity_and_use_of_the_batch():
    q = make()
    z = q.codebook[[0, 0, 1, 2]].T[None]  # one example, four positions
    q(z, observe=True)
    q.settle()
    assert q.used.item() == pytest.approx(3 / K)
    assert q.perplexity.item() == pytest.approx(math.exp(0.5 * math.log(2) + 2 * 0.25 * math.log(4)))


def test_kmeans_finds_separated_clusters_and_survives_few_distinct_rows():
    centres = 100 * torch.randn(K, D, dtype=torch.float64)
    rows = centres.repeat_interleave(20, 0) + torch.randn(20 * K, D, dtype=torch.float64)
    found, counts = kmeans(rows, K, 10)
    assert counts.tolist() == [20] * K
    means = rows.view(K, 20, D).mean(1)
    torch.testing.assert_close(found[nearest(means, found)], means)
    few, counts = kmeans(torch.ones(50, D), K, 5)  # all rows coincide
    assert few.isfinite().all()
    assert counts.sum() == 50


def test_kmeans_start_sets_use_and_sums():
    q = make()
    rows = torch.randn(200, D, dtype=torch.float64)
    q.start_from(rows)
    share = torch.bincount(nearest(rows, q.codebook), minlength=K) / 200
    assert (q.usage - share).abs().max() < 0.05  # counted before the last move of the centres
    torch.testing.assert_close(q.code_sum / q.usage[:, None], q.codebook)


def test_pick_rows_takes_distinct_rows_of_every_example():
    rows = torch.arange(3 * 40.0).view(3, 8, 5, 1)
    picked = pick_rows(rows, 16).view(3, 16)
    for example, mine in zip(rows.flatten(1), picked, strict=True):
        assert len(mine.unique()) == 16
        assert torch.isin(mine, example).all()
    assert torch.equal(pick_rows(rows, 40).flatten(), rows.flatten())


def test_bf16_autocast_does_not_reach_the_distances():
    """Codes that differ by less than bf16 can tell apart are still told apart."""
    q = VectorQuantiser(2, 1)
    q.codebook.copy_(torch.tensor([[100.0], [100.1]]))
    with torch.autocast("cpu", torch.bfloat16):
        out = q(torch.tensor([[[100.01, 100.09]]]))
    assert out.codes.tolist() == [[0, 1]]
    assert out.value.dtype == torch.float32
