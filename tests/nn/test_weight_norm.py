"""Weight normalisation: the weight's norm, the start from data, and the layers against plain convolutions."""

import pytest
import torch
import torch.nn.functional as F

from dgm_core.nn.weight_norm import ShiftedConv, ShiftedDeconv, WeightNormPointwise, starting

LAYERS = {
    "pointwise": lambda: WeightNormPointwise(3, 5, scale=0.1),
    "shifted": lambda: ShiftedConv(3, 5, columns=3, right=1, scale=0.1),
    "strided": lambda: ShiftedConv(3, 5, columns=2, right=0, stride=2),
    "transposed": lambda: ShiftedDeconv(3, 5, columns=2),
    "transposed, three columns": lambda: ShiftedDeconv(3, 5, columns=3),
}
layers = pytest.mark.parametrize("layer", LAYERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@layers
def test_the_norm_of_each_outputs_weight_is_its_gain(layer):
    layer = LAYERS[layer]().double()
    torch.nn.init.normal_(layer.gain)
    weight = layer.weight().movedim(layer.axis, 0).flatten(1)
    torch.testing.assert_close(weight.norm(dim=1), layer.gain.abs())
    direction = layer.direction.movedim(layer.axis, 0).flatten(1)
    cosine = F.cosine_similarity(weight, direction, dim=1)
    torch.testing.assert_close(cosine, layer.gain.sign())


@layers
def test_the_first_batch_makes_outputs_of_mean_zero_and_the_layers_deviation(layer):
    layer = LAYERS[layer]().double()
    x = 3 + 2 * torch.randn(7, 3, 6, 6, dtype=torch.float64)
    with starting(layer):
        y = layer(x)
    mean, deviation = y.mean((0, 2, 3)), y.std((0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)  # float64 rounding
    # What is added to the variance, 1e-8, shortens the deviation by at most 5e-9 over variances above a half.
    torch.testing.assert_close(deviation, torch.full_like(deviation, layer.scale), rtol=1e-7, atol=0)


def test_a_layer_is_started_once():
    layer = WeightNormPointwise(3, 5).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    layer(x)
    assert not layer.started
    with starting(layer):
        layer(x)
    assert layer.started
    once = layer(x)
    with starting(layer):
        again = layer(5 * x + 1)
    assert torch.equal(layer(x), once)
    assert torch.equal(again, layer(5 * x + 1))


def test_layers_start_one_after_the_other():
    """The second is started by what the first, once started, puts out."""
    first, second = WeightNormPointwise(3, 4).double(), WeightNormPointwise(4, 5).double()
    x = 10 + torch.randn(50, 3, dtype=torch.float64)
    both = torch.nn.Sequential(first, torch.nn.ELU(), second)
    with starting(both):
        y = both(x)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_an_output_that_never_varies_stays_finite():
    layer = WeightNormPointwise(3, 5)
    with starting(layer):
        y = layer(torch.ones(4, 3))
    assert y.abs().max() < 0.01  # single precision's rounding, 1e-7, over √1e-8


@pytest.mark.parametrize("columns", [2, 3])
def test_a_pixel_becomes_four_and_with_three_columns_reaches_the_two_to_their_left(columns):
    layer = ShiftedDeconv(1, 1, columns=columns).double()
    jacobian = torch.autograd.functional.jacobian(layer, torch.randn(1, 1, 3, 4, dtype=torch.float64))
    reached = jacobian[0, 0, :, :, 0, 0, 1, 2].nonzero().tolist()
    left = 4 if columns == 2 else 3
    assert reached == [[r, c] for r in (2, 3) for c in range(left, 6)]
