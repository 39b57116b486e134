"""Layers of the perceptrons, and DCGAN's networks, against the paper's sizes."""

import pytest
import torch
from torch import nn

from dgm_core.nn.dcgan import DCGANFeatures, DCGANGenerator, dcgan_discriminator, grids, widths
from dgm_core.nn.gan_blocks import Maxout, hidden, maxout_layers, one_hot, start_uniform
from dgm_core.nn.norm import BatchNorm
from dgm_core.nn.virtual_batch_norm import VirtualBatchNorm


def test_maxout_is_the_greatest_of_its_pieces() -> None:
    layer, x = Maxout(3, 4, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    pieces = layer.linear(x)
    expected = torch.stack([torch.maximum(pieces[:, 2 * u], pieces[:, 2 * u + 1]) for u in range(4)], 1)
    assert torch.equal(layer(x), expected)


def test_maxout_of_opposite_pieces_is_the_absolute_value() -> None:
    layer = Maxout(1, 1, 2)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.linear.bias.zero_()
    assert layer(torch.tensor([[-2.0], [3.0]])).tolist() == [[2.0], [3.0]]


def test_one_piece_is_a_rectifier() -> None:
    assert hidden(3, 4, 1)(torch.randn(50, 3)).min() == 0.0
    assert isinstance(hidden(3, 4, 2), Maxout)


def test_dropout_stands_in_front_of_every_layer_and_behind_the_last() -> None:
    layers = maxout_layers(3, 4, 2, 5, input_dropout=0.2, dropout=0.5)
    assert [m.p for m in layers if isinstance(m, nn.Dropout)] == [0.2, 0.5, 0.5]
    assert [type(m) for m in layers] == [nn.Dropout, Maxout, nn.Dropout, Maxout, nn.Dropout]
    assert layers(torch.randn(6, 3)).shape == (6, 4)


def test_start_uniform() -> None:
    layers = maxout_layers(30, 40, 2, 2)
    start_uniform(layers, 0.05)
    weights = torch.cat([m.linear.weight.flatten() for m in layers if isinstance(m, Maxout)])
    # 5600 draws: the greatest is within 1 % of the end but for a chance of 0.99^5600.
    assert 0.0495 < weights.abs().max() <= 0.05
    assert all(m.linear.bias.abs().max() == 0 for m in layers if isinstance(m, Maxout))


def test_one_hot() -> None:
    assert one_hot(torch.tensor([2, 0]), 3, torch.float64).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_grids_halve_and_round_up() -> None:
    assert grids(64, 64) == [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4)]
    assert grids(28, 28) == [(28, 28), (14, 14), (7, 7), (4, 4)]
    assert grids(36, 8) == [(36, 8), (18, 4)]
    assert widths(128, 4) == [128, 256, 512, 1024]
    assert widths(128, 6) == [128, 256, 512, 1024, 1024, 1024]


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 12, 20), (1, 36, 8), (3, 52, 52), (3, 64, 64), (1, 256, 252)]
)
def test_networks_for_every_size(shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        x = DCGANGenerator(7, shape, 4)(torch.randn(3, 7))
        assert x.shape == (3, *shape)
        assert dcgan_discriminator(shape, 4)(x).shape == (3,)


def test_64_pixels_are_the_papers_networks() -> None:
    """Figure 1: 100 latents onto 4 × 4 × 1024, then 512, 256, 128 and 3 channels; the discriminator goes back."""
    with torch.device("meta"):
        generator, features = DCGANGenerator(100, (3, 64, 64), 128), DCGANFeatures((3, 64, 64), 128)
    convolutions = 25 * (1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3)
    norms = 2 * (1024 + 512 + 256 + 128)
    assert sum(p.numel() for p in generator.parameters()) == 100 * 16 * 1024 + convolutions + norms
    norms = 2 * (1024 + 512 + 256)  # none on the first layer, which has a bias instead
    assert sum(p.numel() for p in features.parameters()) == convolutions + norms + 128
    assert features.size == 16 * 1024
    assert sum(isinstance(m, BatchNorm) for m in generator.modules()) == 4
    assert sum(isinstance(m, BatchNorm) for m in features.modules()) == 3


def test_weights_start_from_a_narrow_gaussian() -> None:
    network = DCGANGenerator(100, (3, 16, 16), 32, norm=lambda c: VirtualBatchNorm(c, 8))
    gains = torch.cat([m.weight for m in network.modules() if isinstance(m, VirtualBatchNorm)])
    kernel = network.project.weight
    # 102,400 weights: their deviation is known to 0.22 %; 96 gains: to 7 %, their mean to 0.002.
    assert kernel.std().item() == pytest.approx(0.02, rel=0.01)
    assert gains.mean().item() == pytest.approx(1.0, abs=0.01)
    assert gains.std().item() == pytest.approx(0.02, rel=0.3)


def test_bounded_images_end_in_tanh() -> None:
    z = 30 * torch.randn(20, 5)
    network = DCGANGenerator(5, (1, 8, 8), 4)
    with torch.no_grad():
        for p in network.up.parameters():
            p.mul_(1000)
        bounded = network(z)
        network.bounded = False
        assert bounded.abs().max() <= 1 < network(z).abs().max()
        torch.testing.assert_close(network(z).tanh(), bounded, rtol=0, atol=0)
