"""Batch statistics: torch's own as oracle on one rank, one rank as oracle for two."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.nn.norm import BatchNorm, LayerNorm, Moments, batch_moments, channel_moments, settle, standing_statistics
from tests.support import TwoRanks

# Same formula, other order of summation, in float64.
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 4, 5)])
def test_equals_torch_buffers_included(shape: tuple[int, ...]) -> None:
    ours = BatchNorm(3)
    theirs: nn.Module = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.copy_(q.copy_(torch.randn(3)))
    x = torch.zeros(shape)
    for _ in range(3):
        x = 2 + 3 * torch.randn(shape)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), theirs(b)
        torch.testing.assert_close(y, z, **EXACT)
        weights = torch.randn(shape)
        (y * weights).sum().backward()
        (z * weights).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, **EXACT)
        settle(ours)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **EXACT)
    torch.testing.assert_close(ours.moments.running_mean, theirs.running_mean, **EXACT)
    torch.testing.assert_close(ours.moments.running_var, theirs.running_var, **EXACT)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)


def test_moments_survive_a_large_mean() -> None:
    """E x² − (E x)² at a mean of 4096 would be off by 4096² · 2⁻²⁴ = 1 in float32: by as much as the variance."""
    shifted = 4096 + torch.randn(1000, 2, dtype=torch.float32)
    _, var, _ = batch_moments(shifted)
    assert var.dtype == torch.float32
    # The mean is right to 4096 · 2⁻²³ ≈ 5 · 10⁻⁴, which adds its square.
    torch.testing.assert_close(var.double(), shifted.double().var(0, correction=0), rtol=1e-5, atol=0)


def test_buffers_move_once_a_play_and_only_in_training() -> None:
    layer = BatchNorm(2)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(8, 2)
    layer(x[:4])
    layer(x[4:])
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    settle(layer)
    halves = (x[:4].mean(0) + x[4:].mean(0)) / 2
    torch.testing.assert_close(layer.moments.running_mean, 0.1 * halves, **EXACT)
    settled = layer.moments.running_mean.clone()
    settle(layer)  # nothing was noted since
    assert torch.equal(layer.moments.running_mean, settled)
    layer.eval()
    layer(x)
    settle(layer)
    assert torch.equal(layer.moments.running_mean, settled)


def test_activations_computed_twice_count_once() -> None:
    once, twice = Moments(2), Moments(2)
    x = torch.randn(5, 2)
    once(x)
    twice(x)
    twice(x)
    settle(once)
    settle(twice)
    torch.testing.assert_close(once.running_mean, twice.running_mean, **EXACT)
    torch.testing.assert_close(once.running_var, twice.running_var, **EXACT)


def test_standing_statistics_are_the_plain_average() -> None:
    layer = BatchNorm(2).eval()
    batches = iter([torch.tensor([[0.0, 1.0], [2.0, 5.0]]), torch.tensor([[4.0, 0.0], [6.0, 0.0]])])
    standing_statistics(layer, lambda: layer(next(batches)), passes=2)
    torch.testing.assert_close(layer.moments.running_mean, torch.tensor([3.0, 1.5]), **EXACT)
    torch.testing.assert_close(layer.moments.running_var, torch.tensor([2.0, 4.0]), **EXACT)
    assert not layer.training


def test_layer_norm_keeps_examples_apart_and_normalises_each() -> None:
    layer = LayerNorm(3)
    x = torch.randn(2, 3, 4, 4)
    y = layer(x)
    torch.testing.assert_close(y.flatten(1).mean(1), torch.zeros(2), **EXACT)
    torch.testing.assert_close(layer(x[:1]), y[:1], **EXACT)
    # The gradient penalty differentiates its gradient.
    assert torch.autograd.gradgradcheck(layer, x[:, :, :2, :2].clone().requires_grad_())


def test_channel_moments_of_a_stream() -> None:
    x = 1e6 + torch.randn(101, 3, 2, 2)
    mean, var = channel_moments(x.split([50, 1, 50]), torch.zeros(3))
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-14, atol=0)
    # Deviations of size 1 from values of size 10⁶ carry a relative error of 10⁶ · 2⁻⁵³ ≈ 10⁻¹⁰ each.
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0), rtol=1e-9, atol=0)


def rank_results(
    x: Tensor, weights: Tensor, state: dict[str, Tensor], sizes: list[int]
) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
    """What a rank computes on its rows; ranks hold unequal shares."""
    first = sum(sizes[: distributed.rank()])
    rows = slice(first, first + sizes[distributed.rank()])
    layer = BatchNorm(2).double()
    layer.load_state_dict(state)
    mine = x[rows].clone().requires_grad_()
    y = layer(mine)
    (y * weights[rows]).sum().backward()
    distributed.sum_gradients(layer.parameters())
    settle(layer)
    zeros = torch.zeros(2, dtype=torch.float64)
    mean, var = channel_moments(x[rows].split(2), zeros)
    # A rank may have no example at all.
    late, _ = channel_moments(x[rows].split(2) if distributed.rank() else [], zeros)
    assert mine.grad is not None
    found = {"y": y.detach(), "x.grad": mine.grad, "mean": mean, "var": var, "late": late}
    return found, [p.grad for p in layer.parameters() if p.grad is not None], dict(layer.state_dict())


def test_two_ranks_with_uneven_shares_equal_one(two_ranks: TwoRanks) -> None:
    layer = BatchNorm(2)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x, weights = 5 + torch.randn(7, 2, 3), torch.randn(7, 2, 3)
    ranks = two_ranks.run(rank_results, x, weights, dict(layer.state_dict()), [3, 4])

    whole = x.clone().requires_grad_()
    y = layer(whole)
    (y * weights).sum().backward()
    settle(layer)
    for name, expected in {"y": y.detach(), "x.grad": whole.grad}.items():
        torch.testing.assert_close(torch.cat([found[name] for found, _, _ in ranks]), expected, **EXACT)
    for found, grads, state in ranks:
        for p, grad in zip(layer.parameters(), grads, strict=True):
            torch.testing.assert_close(grad, p.grad, **EXACT)
        for name, tensor in layer.state_dict().items():
            torch.testing.assert_close(state[name], tensor, **EXACT)
        torch.testing.assert_close(found["mean"], x.mean((0, 2)), **EXACT)
        torch.testing.assert_close(found["var"], x.var((0, 2), correction=0), **EXACT)
        torch.testing.assert_close(found["late"], x[3:].mean((0, 2)), **EXACT)
