"""PixelCNN: what is seen and what is not, blind spot included, by Jacobian; the rest is in test_raster."""

import itertools

import pytest
import torch
from torch import nn

from dgm_core.contract import DataSpec
from dgm_core.models.autoregressive.pixel_cnn import PixelCNN


class Features(nn.Module):
    """Lets real-valued inputs through in place of the embedding, so that there is something to differentiate by."""

    def forward(self, x, like):
        return x


def influence(colours, height, width, **config):
    """Whether the logits of one coordinate depend on another: (channel, row, column) twice."""
    torch.manual_seed(0)
    data = DataSpec("image", (colours, height, width), 4)
    network = PixelCNN(PixelCNN.tiny(data)[0].merged(config), data).double().network
    for parameter in network.parameters():  # biases too, so that no unit is off for all inputs
        nn.init.normal_(parameter, std=0.3)
    network.embed = Features()
    found = torch.zeros(colours, height, width, colours, height, width, dtype=torch.bool)
    for _ in range(3):  # a ReLU that is off hides a path; not for every input
        x = torch.randn(1, colours, height, width, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda t: network(t, None).sum(-1), x)
        found |= jacobian[0, :, :, :, 0] != 0
    return found


def receptive_field(first, kernel, depth):
    """Offsets (rows up, columns to the right) of the pixels that a stack of masked convolutions reads."""
    side = first // 2
    field = {(u, d) for u in range(1, side + 1) for d in range(-side, side + 1)} | {(0, -d) for d in range(1, side + 1)}
    side = kernel // 2
    step = {(u, d) for u in range(1, side + 1) for d in range(-side, side + 1)} | {(0, -d) for d in range(side + 1)}
    for _ in range(depth):
        field = {(u + v, d + e) for (u, d), (v, e) in itertools.product(field, step)}
    return field


@pytest.mark.parametrize(("first", "kernel", "depth"), [(3, 3, 1), (3, 3, 4), (5, 3, 2), (7, 3, 3), (3, 5, 2)])
def test_the_receptive_field_is_that_of_masked_convolutions(first, kernel, depth):
    height, width = 6, 9
    found = influence(1, height, width, first_kernel=first, kernel=kernel, depth=depth)[0, :, :, 0]
    field = receptive_field(first, kernel, depth)
    for (r, c), (i, j) in itertools.product(itertools.product(range(height), range(width)), repeat=2):
        assert found[r, c, i, j] == ((r - i, j - c) in field), f"{(r, c)} and {(i, j)}"


@pytest.mark.parametrize("depth", [6, 12])
def test_the_blind_spot_is_what_lies_further_right_than_up_whatever_the_depth(depth):
    height, width = 6, 9
    found = influence(1, height, width, first_kernel=7, depth=depth)[0, :, :, 0]
    blind = 0
    for (r, c), (i, j) in itertools.product(itertools.product(range(height), range(width)), repeat=2):
        preceding = (i, j) < (r, c)
        spot = i < r and j - c > (r - i) + 2  # as the docstring says
        blind += spot
        assert found[r, c, i, j] == (preceding and not spot)
    assert blind > 0


def test_channels_of_a_pixel_see_the_earlier_ones_and_all_channels_of_the_pixels_before():
    height, width = 3, 4
    found = influence(3, height, width, first_kernel=7, depth=3)
    for k, r, c in itertools.product(range(3), range(height), range(width)):
        for i, j in itertools.product(range(height), range(width)):
            expected = [q < k for q in range(3)] if (i, j) == (r, c) else [(i, j) < (r, c)] * 3
            assert found[k, r, c, :, i, j].tolist() == expected


@pytest.mark.parametrize("colours", [1, 3])
def test_gradients_reach_every_weight_that_is_not_masked(colours):
    torch.manual_seed(0)
    data = DataSpec("image", (colours, 6, 6), 4, classes=2)
    model = PixelCNN(PixelCNN.tiny(data)[0], data).double()
    for name, parameter in model.network.named_parameters():  # small weights and large biases: every ReLU is on
        nn.init.normal_(parameter, mean=1.0 if name.endswith("bias") else 0.0, std=0.005)
    x = torch.randint(4, (16, colours, 6, 6), dtype=torch.uint8)
    model.log_prob(x, torch.arange(16) % 2).sum().backward()
    for name, layer in model.named_modules():
        for weight, parameter in layer.named_parameters(recurse=False):
            mask = getattr(layer, "mask", None) if weight == "weight" else None
            seen = torch.ones_like(parameter) if mask is None else mask.expand_as(parameter)
            assert torch.equal(parameter.grad != 0, seen.bool()), f"{name}.{weight}"


def test_layer_to_output_connections_carry_every_block():
    """With them the first 1×1 layer reads all blocks, without them the last one only."""
    data = DataSpec("image", (1, 4, 4), 2)
    widths = []
    for skips in (True, False):
        model = PixelCNN(PixelCNN.Config(hidden=3, depth=5, head=4, skips=skips), data)
        widths.append(model.network.collect.weight.shape[1])
    assert widths == [5 * 6, 6]
