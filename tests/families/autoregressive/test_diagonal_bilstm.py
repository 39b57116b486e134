"""Diagonal BiLSTM: its full reach and the order of channels by Jacobian; the rest is in test_raster, test_recurrent."""

import itertools

import pytest
import torch

from dgm_core.contract import DataSpec
from dgm_core.models.autoregressive.diagonal_bilstm import DiagonalBiLSTM
from tests.families.autoregressive.pixel_rnn import influence, unreached


@pytest.mark.parametrize("config", [{"depth": 1}, {"depth": 3}, {"depth": 2, "skips": False}], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 12), (3, 2, 9), (1, 7, 2), (1, 1, 6)], ids=str)
def test_every_coordinate_sees_all_that_precede_it_and_nothing_else(shape, config):
    found = influence(DiagonalBiLSTM, shape, first_kernel=3, **config)
    n = found[..., 0, 0, 0].numel()
    found = found.permute(1, 2, 0, 4, 5, 3).reshape(n, n)  # channels innermost
    assert torch.equal(found, torch.ones(n, n).tril(-1).bool())


def test_without_the_pixels_a_row_would_not_see_the_last_one_of_the_row_above():
    height, width, side = 3, 9, 1

    def forget(network):
        layer = network.layers[0]
        layer.into[1, layer.features :] = 0

    found = influence(DiagonalBiLSTM, (1, height, width), first_kernel=3, depth=3, change=forget)[0, :, :, 0]
    for (r, c), (i, j) in itertools.product(itertools.product(range(height), range(width)), repeat=2):
        hidden = j == width - 1 and i == r - 1 and c < width - 1 - side
        assert found[r, c, i, j] == ((i, j) < (r, c) and not hidden)


@pytest.mark.parametrize("colours", [1, 3])
def test_gradients_reach_every_weight_that_is_not_masked(colours):
    assert not unreached(DiagonalBiLSTM, (colours, 5, 6))


def test_a_diagonal_is_one_step():
    data = DataSpec("image", (1, 28, 28), 2)
    model = DiagonalBiLSTM(DiagonalBiLSTM.defaults(data)[0], data)
    assert all(len(layer.plan.steps) == 55 for layer in model.network.layers)


def test_two_levels_are_said_by_the_log_odds_of_the_second():
    data = DataSpec("image", (1, 4, 4), 2)
    model = DiagonalBiLSTM(DiagonalBiLSTM.tiny(data)[0], data)
    logits = model.network(torch.randint(2, (3, 1, 4, 4)), None)
    assert model.network.out.weight.shape[0] == 1
    assert logits.shape == (3, 1, 4, 4, 2)
    assert not logits[..., 0].any()
    assert logits[..., 1].any()
