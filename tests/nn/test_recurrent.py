"""Convolutional LSTMs: a loop over positions, their reach by Jacobian, their steps against their forward pass."""

from functools import partial

import pytest
import torch

from dgm_core.nn.causal import channel_groups
from dgm_core.nn.recurrent import DiagonalBiLSTM, RowLSTM
from dgm_core.nn.scan import diagonal_plan, row_plan, scan, skew, unskew

GRIDS = [(4, 5), (5, 3), (1, 4), (4, 1)]

# Sums of some 30 terms in another order, through at most 9 steps of a recurrence: float64 rounding, hence 1e-12.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rnd(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def randomised(layer):
    """In double precision; biases and initial states too differ from what they start at."""
    with torch.no_grad():
        for p in layer.double().parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return layer


@pytest.mark.parametrize("grid", GRIDS)
def test_plans_visit_every_position_once_and_only_after_what_it_sees(grid):
    height, width = grid
    taps = {"row": [(-1, -1), (-1, 0), (-1, 1)], "diagonal": [(0, -1), (-1, 0)]}
    for name, plan in {"row": row_plan(*grid, 3), "diagonal": diagonal_plan(*grid)}.items():
        assert sorted(plan.order) == list(range(height * width))
        position = {divmod(at, width): i for i, at in enumerate(plan.order)}
        done = 0
        for step in plan.steps:
            assert step.block.start == done
            done = step.block.stop
            for (down, right), (here, there), bare in zip(taps[name], step.reads, step.bare, strict=True):
                sees = dict.fromkeys(range(bare.start, bare.stop))
                sees |= dict(zip(range(here.start, here.stop), range(there.start, there.stop), strict=True))
                for i in range(step.block.start, step.block.stop):
                    r, c = divmod(plan.order[i], width)
                    assert sees[i] == position.get((r + down, c + right))
                assert there.stop <= step.block.start
        assert done == height * width


def test_a_plan_has_as_many_steps_as_there_are_rows_or_diagonals():
    assert len(row_plan(28, 28, 3).steps) == 28
    assert len(diagonal_plan(28, 28).steps) == 55


@pytest.mark.parametrize("grid", GRIDS)
def test_skewing_lays_diagonals_together_and_is_undone(grid):
    height, width = grid
    plan = diagonal_plan(*grid)
    order = torch.tensor(plan.order)
    x = rnd(2, 3, *grid)
    skewed = skew(x, order)
    assert torch.equal(unskew(skewed, order, width), x)
    for t, step in enumerate(plan.steps):
        diagonal = [x[:, :, r, t - r] for r in range(height) if 0 <= t - r < width]
        assert torch.equal(skewed[step.block], torch.stack(diagonal))


def cell_update(gates, cell):
    o, f, i, g = gates.chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def row_by_loop(layer, x, sides):
    """Equation 3, one position after the other: x (B, features, H, W) -> (B, hidden, H, W)."""
    height, width = layer.grid
    kernel = layer.kernel()[0]
    h0, c0 = (first[0].expand(x.shape[0], -1) for first in (layer.first_hidden, layer.first_cell))
    h, cells = {}, {}
    for r in range(height):
        for c in range(width):
            inputs = [
                x[:, :, r, j] if j >= 0 else torch.zeros_like(x[:, :, 0, 0]) for j in range(c - layer.left, c + 1)
            ]
            gates = torch.cat([*inputs, sides[:, :, r, c]], 1) @ kernel + layer.bias[0]
            above = [h.get((r - 1, j), h0) for j in range(c - layer.left, c + layer.left + 1)]
            h[r, c], cells[r, c] = cell_update(gates + torch.cat(above, 1) @ layer.state[0], cells.get((r - 1, c), c0))
    return torch.stack([torch.stack([h[r, c] for c in range(width)], 2) for r in range(height)], 2)


def diagonal_by_loop(layer, x, sides, pixels):
    height, width = layer.grid
    n = x.shape[0]
    parts = [x, sides] if pixels is None else [x, sides, pixels]
    both = []
    for way, columns in ((0, range(width)), (1, range(width - 1, -1, -1))):
        kernel, back = layer.kernel()[way], 1 if way else -1
        h0, c0 = (first[way].expand(n, -1) for first in (layer.first_hidden, layer.first_cell))
        h, cells = {}, {}
        for r in range(height):
            for c in columns:
                gates = torch.cat([part[:, :, r, c] for part in parts], 1) @ kernel + layer.bias[way]
                seen = torch.cat([h.get((r, c + back), h0), h.get((r - 1, c), h0)], 1)
                h[r, c], cells[r, c] = cell_update(gates + seen @ layer.state[way], cells.get((r, c + back), c0))
        both.append(h)
    zero = torch.zeros(n, layer.hidden, dtype=x.dtype)
    rows = [[both[0][r, c] + both[1].get((r - 1, c), zero) for c in range(width)] for r in range(height)]
    return torch.stack([torch.stack(row, 2) for row in rows], 2)


def whole(layer, x, *sides):
    order = torch.tensor(layer.plan.order)
    given = [None if side is None else skew(side, order) for side in sides]
    return unskew(layer(skew(x, order), *given), order, layer.grid[1])


CASES = [(grid, colours) for grid in GRIDS for colours in (1, 3)]


@pytest.mark.parametrize(("grid", "colours"), CASES)
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_row_lstm_and_its_gradients_are_those_of_a_loop_over_positions(grid, colours, kernel):
    layer = randomised(RowLSTM(6, 3, grid, kernel, colours, sides=2))
    compare(layer, row_by_loop, rnd(2, 6, *grid), rnd(2, 2, *grid))


@pytest.mark.parametrize(("grid", "colours"), CASES)
@pytest.mark.parametrize("pixels", [0, 3])
def test_a_diagonal_bilstm_and_its_gradients_are_those_of_a_loop_over_positions(grid, colours, pixels):
    layer = randomised(DiagonalBiLSTM(6, 3, grid, colours, sides=2, pixels=pixels))
    compare(layer, diagonal_by_loop, rnd(2, 6, *grid), rnd(2, 2, *grid), rnd(2, pixels, *grid) if pixels else None)


def compare(layer, loop, *inputs):
    given = [None if x is None else x.requires_grad_() for x in inputs]
    leaves = [x for x in given if x is not None] + list(layer.parameters())
    ours, theirs = whole(layer, *given), loop(layer, *given)
    close(ours, theirs)
    towards = torch.randn_like(ours)
    mine, expected = (torch.autograd.grad(out, leaves, towards) for out in (ours, theirs))
    for a, b in zip(mine, expected, strict=True):
        # A parameter's gradient adds up some 50 positions.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert a.any() or layer.grid[0] == 1, "one row has no way for what enters from above"


@pytest.mark.parametrize("plan", [row_plan(2, 3, 3), diagonal_plan(2, 3)], ids=["row", "diagonal"])
def test_the_written_out_derivative_is_that_of_the_recurrence(plan):
    taps = len(plan.steps[0].reads)
    gates, weight = rnd(2, 6, 2, 8), 0.5 * rnd(2, taps * 2, 8)
    leaves = [x.requires_grad_() for x in (gates, weight, rnd(2, 2), rnd(2, 2))]
    assert torch.autograd.gradcheck(lambda *x: scan(*x, plan), leaves)


def reach(layer, r, c, *others):
    """Positions whose features have any influence on the states at (r, c)."""
    x = rnd(1, layer.features, *layer.grid).requires_grad_()
    (gradient,) = torch.autograd.grad(whole(layer, x, *others)[0, :, r, c].sum(), x)
    return {tuple(p) for p in gradient[0].abs().sum(0).nonzero().tolist()}


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_row_lstm_reaches_a_triangle(kernel):
    height, width, side = 4, 9, kernel // 2
    layer = randomised(RowLSTM(2, 2, (height, width), kernel, 1))
    for r, c in [(0, 0), (2, 4), (3, 0), (3, 8)]:
        # Up u rows the states spread by `side` a row; the features enter with `side` more columns to the left.
        spread = {(r - u, j) for u in range(r + 1) for j in range(c - u * side - side, c + u * side + 1)}
        assert reach(layer, r, c) == {(i, j) for i, j in spread if 0 <= j < width}


def test_a_diagonal_bilstm_reaches_its_own_row_to_the_left_and_all_rows_above():
    height, width = 3, 7
    layer = randomised(DiagonalBiLSTM(2, 2, (height, width), 1))
    for r in range(height):
        for c in range(width):
            assert reach(layer, r, c) == {(i, j) for i in range(r + 1) for j in range(width) if i < r or j <= c}


def test_pixels_are_read_from_right_to_left_in_the_rows_above_and_whole():
    layer = randomised(DiagonalBiLSTM(3, 3, (3, 5), 3, pixels=3))
    pixels = rnd(1, 3, 3, 5).requires_grad_()
    for r in range(3):
        for feature in range(3):
            out = whole(layer, rnd(1, 3, 3, 5), None, pixels)[0, feature, r, 2]
            (gradient,) = torch.autograd.grad(out, pixels)
            expected = torch.zeros(3, 3, 5).bool()
            expected[:, :r, 2:] = True
            assert torch.equal(gradient[0] != 0, expected)


@pytest.mark.parametrize("make", [partial(RowLSTM, kernel=3), DiagonalBiLSTM], ids=["row", "diagonal"])
def test_masks_order_the_groups_of_the_position_itself_only(make):
    groups = channel_groups(6, 3)
    layer = randomised(make(6, 6, (2, 3), colours=3))
    x = rnd(1, 6, 2, 3)
    jacobian = torch.autograd.functional.jacobian(lambda t: whole(layer, t)[0, :, 1, 1], x)[:, 0]
    assert torch.equal(jacobian[:, :, 1, 1] != 0, torch.tensor([[i <= o for i in groups] for o in groups]))
    for r, c in [(1, 0), (0, 1), (0, 0)]:
        assert (jacobian[:, :, r, c] != 0).all()


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "make", [partial(RowLSTM, kernel=3), partial(RowLSTM, kernel=5), DiagonalBiLSTM, partial(DiagonalBiLSTM, pixels=2)]
)
def test_steps_equal_the_forward_pass(make, grid):
    layer = randomised(make(4, 3, grid, colours=1, sides=2))
    x, sides, pixels = (rnd(2, c, *grid) for c in (4, 2, 2))
    if not (isinstance(make, partial) and "pixels" in make.keywords):
        pixels = None
    expected = whole(layer, x, sides, pixels)
    memory = layer.start(2)
    for r in range(grid[0]):
        above = None if pixels is None or not r else pixels[:, :, r - 1].permute(2, 0, 1)
        layer.row(memory, r, sides[:, :, r].permute(2, 0, 1), above)
        for c in range(grid[1]):
            layer.step(torch.randn_like(x[:, :, r, c]), memory, c)  # an earlier guess leaves no trace
            close(layer.step(x[:, :, r, c], memory, c), expected[:, :, r, c])
