"""Causal layers: their reach by Jacobian, their steps against their forward pass, and draws against their law."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from dgm_core.nn.attention import CausalAttention
from dgm_core.nn.causal import (
    HorizontalConv,
    Pointwise,
    VerticalConv,
    channel_groups,
    channel_mask,
    shift_down,
    shift_right,
)
from dgm_core.nn.gated import GatedResidual
from dgm_core.nn.incremental import draw_categorical

H, W = 5, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def reach(layer: nn.Module, inputs: int, r: int, c: int) -> set[tuple[int, int]]:
    """Positions whose features have any influence on the output at (r, c)."""
    x = torch.randn(1, inputs, H, W, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, :, r, c].sum(), x)
    return {tuple(p) for p in gradient[0].abs().sum(0).nonzero().tolist()}


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_vertical_layer_reaches_the_rows_above_and_its_own(kernel):
    layer = VerticalConv(2, 3, kernel).double()
    for r, c in [(0, 0), (2, 3), (4, 5)]:
        rows = range(max(0, r - (kernel + 1) // 2 + 1), r + 1)
        cols = range(max(0, c - kernel // 2), min(W, c + kernel // 2 + 1))
        assert reach(layer, 2, r, c) == {(i, j) for i in rows for j in cols}


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_a_horizontal_layer_reaches_left_along_its_row(taps):
    layer = HorizontalConv(2, 3, taps).double()
    for r, c in [(0, 0), (2, 3), (4, 5)]:
        assert reach(layer, 2, r, c) == {(r, j) for j in range(max(0, c - taps + 1), c + 1)}


def test_shifts_leave_out_the_position_itself():
    x = torch.randn(1, 2, H, W)
    assert torch.equal(shift_down(x)[:, :, 1:], x[:, :, :-1])
    assert torch.equal(shift_right(x)[..., 1:], x[..., :-1])
    assert not shift_down(x)[:, :, 0].any()
    assert not shift_right(x)[..., 0].any()


def test_masks_order_the_channels_of_the_current_pixel_only():
    groups = channel_groups(6, 3)
    assert groups == [0, 0, 1, 1, 2, 2]
    assert channel_mask([0, 0], [0, 0, 0]) is None
    for strict in (False, True):
        layer = HorizontalConv(6, 6, 2, channel_mask(groups, groups, strict=strict)).double()
        x = torch.randn(1, 6, 1, 4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(layer, x)[0, :, 0, 2, 0, :, 0]  # (outputs, inputs, columns)
        seen = [[i < o if strict else i <= o for i in groups] for o in groups]
        assert torch.equal(jacobian[:, :, 2] != 0, torch.tensor(seen))
        assert (jacobian[:, :, 1] != 0).all()
        assert (jacobian[:, :, 0] == 0).all()


def stepped_rows(layer, x):
    memory = layer.start(x.shape[0], W)
    return torch.cat([layer.step(x[:, :, r : r + 1], memory) for r in range(H)], 2)


def stepped_columns(layer, x):
    memory = layer.start(x.shape[0], W)
    rows = []
    for r in range(H):
        columns = []
        for c in range(W):
            layer.step(torch.randn_like(x[:, :, r, c]), memory, c)  # an earlier guess leaves no trace
            columns.append(layer.step(x[:, :, r, c], memory, c))
        rows.append(torch.stack(columns, 2))
    return torch.stack(rows, 2)


# Steps add in another order than whole convolutions: float64 rounding of sums of about 50 terms, hence 1e-12.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_steps_of_a_vertical_layer_equal_its_forward_pass(kernel):
    layer, x = VerticalConv(3, 4, kernel).double(), torch.randn(2, 3, H, W, dtype=torch.float64)
    close(stepped_rows(layer, x), layer(x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_steps_of_a_horizontal_layer_equal_its_forward_pass(taps, masked):
    groups = channel_groups(3, 3)
    layer = HorizontalConv(3, 3, taps, channel_mask(groups, groups) if masked else None).double()
    x = torch.randn(2, 3, H, W, dtype=torch.float64)
    close(stepped_columns(layer, x), layer(x))


def test_a_pointwise_layer_maps_columns_as_it_maps_grids():
    layer, x = Pointwise(3, 4).double(), torch.randn(2, 3, H, W, dtype=torch.float64)
    close(layer(x[:, :, 1, 2]), layer(x)[:, :, 1, 2])


def test_steps_of_gated_residual_blocks_equal_their_forward_pass():
    x, aux, cond = (torch.randn(2, n, H, W, dtype=torch.float64) for n in (4, 3, 5))
    vertical = GatedResidual(4, 6, partial(VerticalConv, kernel=3), condition=5).double()
    memory = vertical.start(2, W)
    rows = [slice(r, r + 1) for r in range(H)]
    stepped = [vertical.step(x[:, :, r], memory, sides=vertical.sides(None, cond[:, :, r])) for r in rows]
    close(torch.cat(stepped, 2), vertical(x, None, cond))

    horizontal = GatedResidual(4, 6, partial(HorizontalConv, taps=2), auxiliary=3, condition=5).double()
    memory, whole = horizontal.start(2, W), horizontal(x, aux, cond)
    for r in range(H):
        for c in range(W):
            sides = horizontal.sides(aux[:, :, r, c], cond[:, :, r, c])
            close(horizontal.step(x[:, :, r, c], memory, c, sides=sides), whole[:, :, r, c])


def test_attention_is_the_softmax_over_strictly_earlier_positions():
    layer = CausalAttention(3, 4, 6, heads=2).double()
    query, memory = (torch.randn(2, n, 2, 3, dtype=torch.float64) for n in (3, 4))
    out = layer(query, memory).flatten(2)
    q, k, v = (
        f(t).flatten(2).unflatten(1, (2, 3))
        for f, t in ((layer.query, query), (layer.key, memory), (layer.value, memory))
    )
    past = layer.start(2, 6)
    for i in range(6):
        if i == 0:
            expected = torch.zeros(2, 6, dtype=torch.float64)
        else:
            scores = (q[..., i, None] * k[..., :i]).sum(2) / math.sqrt(3)
            expected = (scores.softmax(-1)[:, :, None] * v[..., :i]).sum(-1).flatten(1)
            layer.remember(memory.flatten(2)[..., i - 1], past, i - 1)
        close(out[..., i], expected)
        close(layer.step(query.flatten(2)[..., i], past, i), expected)


def test_attention_over_one_position_is_zero():
    layer = CausalAttention(3, 4, 6, heads=2)
    assert torch.equal(layer(torch.randn(2, 3, 1, 1), torch.randn(2, 4, 1, 1)), torch.zeros(2, 6, 1, 1))


def shares(logits, **options):
    """The law of the draws, read off a fine grid of uniform numbers."""
    n = 100_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = draw_categorical(logits.expand(n, -1), uniform, **options)
    return torch.bincount(drawn, minlength=logits.shape[0]).double() / n


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.randn(7, dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        # Each level's share of a grid of n points is off by at most one point at each end.
        error = (shares(logits, temperature=temperature) - (logits / temperature).softmax(0)).abs().max()
        assert error <= 2e-5


def test_the_nucleus_is_the_fewest_levels_that_reach_the_mass():
    probs = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1], dtype=torch.float64)
    for top_p, kept in [(0.3, [1]), (0.5, [1, 3]), (0.75, [1, 3, 0]), (0.99, [0, 1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4])]:
        expected = torch.zeros_like(probs)
        expected[kept] = probs[kept] / probs[kept].sum()
        assert (shares(probs.log(), top_p=top_p) - expected).abs().max() <= 2e-5


def test_the_largest_uniform_number_draws_a_level_that_has_mass():
    logits = torch.tensor([[0.0, 1.0, 0.5, -200.0, -200.0]])
    last = torch.tensor([1 - 2**-24])
    for temperature in torch.linspace(0.3, 3, 200).tolist():
        assert draw_categorical(logits, last, temperature).item() < 3
