"""Equalised learning rates and pixel norm by formula."""

import pytest
import torch
import torch.nn.functional as F

from dgm_core.nn.equalised import EqualisedConv2d, EqualisedLinear, PixelNorm

# The same float64 operations in another order.
EXACT = {"rtol": 0, "atol": 1e-12}


def test_linear_is_its_formula() -> None:
    layer, x = EqualisedLinear(7, 5, gain=1.5).double(), torch.randn(4, 7, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.normal_()
    wanted = x @ layer.weight.T * 1.5 / 7**0.5 + layer.bias
    torch.testing.assert_close(layer(x), wanted, **EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_convolution_is_its_formula(bias: bool) -> None:
    layer, x = EqualisedConv2d(4, 5, 3, bias=bias).double(), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    plain = F.conv2d(x, layer.weight, padding=1) * (2 / (4 * 9)) ** 0.5
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.normal_()
        plain = plain + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), plain, **EXACT)
    assert (layer.bias is not None) == bias


def test_layers_start_with_unit_weights_and_keep_the_scale() -> None:
    layer = EqualisedLinear(400, 400)
    # 160,000 draws: their deviation is known to 0.2 %.
    assert layer.weight.std().item() == pytest.approx(1, abs=0.01)
    assert not layer.bias.any()
    y = F.relu(layer(torch.randn(500, 400)))
    # He's gain: the mean square behind a rectifier is the input's; 200,000 dependent draws, 400 weights a unit.
    assert y.square().mean().item() == pytest.approx(1, abs=0.05)


def test_a_rate_leaves_the_function_and_scales_the_step() -> None:
    """The same weights in effect, of which a step of Adam moves a hundredth; with an SGD step it would be squared."""
    plain, slow = EqualisedLinear(6, 3).double(), EqualisedLinear(6, 3, rate=0.01).double()
    with torch.no_grad():
        plain.bias.normal_()
        slow.weight.copy_(plain.weight / 0.01)
        slow.bias.copy_(plain.bias / 0.01)
    x = torch.randn(5, 6, dtype=torch.float64)
    before = plain(x).detach()
    torch.testing.assert_close(slow(x), before, **EXACT)
    moved = []
    for layer in (plain, slow):
        adam = torch.optim.Adam(layer.parameters(), lr=1e-3, eps=0.0)
        layer(x).square().sum().backward()
        adam.step()
        moved.append(layer(x).detach() - before)
    # Adam's first step is lr · sign of the gradient, of every parameter: sums of 7 such terms, exact to rounding.
    torch.testing.assert_close(moved[1], 0.01 * moved[0], rtol=1e-9, atol=1e-14)
    assert moved[0].abs().min() > 1e-6


def test_a_rate_starts_with_weights_divided_by_it() -> None:
    # 40,000 draws: their deviation is known to 0.4 %.
    assert EqualisedLinear(200, 200, rate=0.01).weight.std().item() == pytest.approx(100, rel=0.02)


def test_pixel_norm_is_its_formula() -> None:
    norm = PixelNorm()
    x = 3 * torch.randn(2, 5, 3, 4, dtype=torch.float64)
    y = norm(x)
    for b, i, j in ((0, 0, 0), (1, 2, 3)):
        a = x[b, :, i, j]
        torch.testing.assert_close(y[b, :, i, j], a / ((a * a).sum() / 5 + 1e-8).sqrt(), **EXACT)
    # Of unit mean square at every pixel, but for ε beside squares of order one.
    torch.testing.assert_close(y.square().mean(1), torch.ones(2, 3, 4, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(norm(7 * x), y, rtol=0, atol=1e-6)


def test_pixel_norm_of_vectors_and_of_nothing() -> None:
    z = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(PixelNorm()(z).norm(dim=1), torch.full((4,), 6**0.5).double(), rtol=0, atol=1e-6)
    zero = torch.zeros(1, 3, requires_grad=True)
    PixelNorm()(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_pixel_norm_computes_in_single_precision_at_least() -> None:
    x = torch.full((1, 4, 1, 1), 300.0, dtype=torch.float16)  # its square is beyond half precision
    y = PixelNorm()(x)
    assert y.dtype == torch.float16
    assert y.flatten().tolist() == [1.0] * 4
