"""Row LSTM: its triangular reach and the order of channels by Jacobian; the rest is in test_raster, test_recurrent."""

import itertools

import pytest

from dgm_core.contract import DataSpec
from dgm_core.models.autoregressive.row_lstm import RowLSTM
from tests.families.autoregressive.pixel_rnn import influence, unreached


@pytest.mark.parametrize(("first", "kernel", "depth"), [(3, 3, 1), (7, 3, 1), (5, 3, 3), (7, 5, 2)])
def test_a_pixel_sees_a_triangle_above_and_a_stretch_to_its_left(first, kernel, depth):
    height, width = 4, 12
    found = influence(RowLSTM, (1, height, width), first_kernel=first, kernel=kernel, depth=depth)[0, :, :, 0]
    into, side = first // 2, kernel // 2
    for (r, c), (i, j) in itertools.product(itertools.product(range(height), range(width)), repeat=2):
        up, right = r - i, j - c
        # To the left each layer's K^is adds `side` and each row its K^ss; to the right only K^ss does, and the first
        # layer, which has to look at least one row up for it.
        left = (depth + up) * side + into
        furthest = -1 if up == 0 else (up - 1) * side + into
        assert found[r, c, i, j] == (up >= 0 and -left <= right <= furthest), f"{(r, c)} and {(i, j)}"


def test_nothing_further_right_than_two_more_columns_than_rows_up_is_seen_whatever_the_depth():
    height, width = 4, 12
    found = influence(RowLSTM, (1, height, width), first_kernel=7, depth=6)[0, :, :, 0]
    for (r, c), (i, j) in itertools.product(itertools.product(range(height), range(width)), repeat=2):
        blind = j - c > r - i + 2  # as the docstring says
        assert not (found[r, c, i, j] and blind)
        if i < r and j >= c:
            assert found[r, c, i, j] != blind


def test_channels_of_a_pixel_see_the_earlier_ones_and_all_channels_of_the_pixels_before():
    height, width = 3, 4  # narrow enough for there to be no blind spot
    found = influence(RowLSTM, (3, height, width), first_kernel=7, depth=2)
    for k, r, c in itertools.product(range(3), range(height), range(width)):
        for i, j in itertools.product(range(height), range(width)):
            expected = [q < k for q in range(3)] if (i, j) == (r, c) else [(i, j) < (r, c)] * 3
            assert found[k, r, c, :, i, j].tolist() == expected


@pytest.mark.parametrize("colours", [1, 3])
def test_gradients_reach_every_weight_that_is_not_masked(colours):
    assert not unreached(RowLSTM, (colours, 5, 6))


def test_a_row_is_one_step():
    data = DataSpec("image", (1, 28, 28), 2)
    model = RowLSTM(RowLSTM.defaults(data)[0], data)
    assert all(len(layer.plan.steps) == 28 for layer in model.network.layers)
