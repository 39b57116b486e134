"""Masked convolutions and their memories: what is seen by Jacobian, steps against the forward pass."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dgm_core.nn.causal import MaskedConv, RasterMemory, RowsMemory, channel_groups, channel_mask
from dgm_core.nn.weight_norm import ShiftedConv

H, W = 5, 6
GROUPS = channel_groups(6, 3)
MASKS = {
    "no channels": None,
    "A": channel_mask(range(3), GROUPS, strict=True),
    "B": channel_mask(GROUPS, GROUPS),
    "A, one colour": channel_mask([0, 0], [0, 0, 0], strict=True),
}
masks = pytest.mark.parametrize("mask", MASKS)
kernels = pytest.mark.parametrize("kernel", [3, 5, 7])
# Steps add in another order than whole convolutions: float64 rounding of sums of about 100 terms, hence 1e-12.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def build(mask, kernel):
    torch.manual_seed(0)
    seen = MASKS[mask]
    outputs, inputs = (4, 3) if seen is None else seen.shape
    layer = MaskedConv(inputs, outputs, kernel, seen).double()
    torch.nn.init.normal_(layer.bias)
    return layer, torch.randn(2, inputs, H, W, dtype=torch.float64)


@masks
@kernels
def test_rows_above_are_seen_whole_the_own_row_up_to_the_pixel_and_of_it_what_the_mask_lets_through(mask, kernel):
    layer, x = build(mask, kernel)
    side = kernel // 2
    for r, c in [(0, 0), (2, 3), (4, 5)]:
        jacobian = torch.autograd.functional.jacobian(lambda t, r=r, c=c: layer(t)[0, :, r, c], x)[:, 0]
        expected = torch.zeros_like(jacobian, dtype=torch.bool)
        left, right = max(0, c - side), min(W, c + side + 1)
        expected[:, :, max(0, r - side) : r, left:right] = True
        expected[:, :, r, left:c] = True
        expected[:, :, r, c] = True if MASKS[mask] is None else MASKS[mask].bool()
        assert torch.equal(jacobian != 0, expected)


@masks
@kernels
def test_it_is_the_convolution_whose_kernel_is_masked(mask, kernel):
    layer, x = build(mask, kernel)
    side = kernel // 2
    whole = torch.ones(*layer.weight.shape[:2], kernel, kernel, dtype=torch.float64)
    whole[:, :, side + 1 :] = 0
    whole[:, :, side, side + 1 :] = 0
    if MASKS[mask] is not None:
        whole[:, :, side, side] = MASKS[mask].double()
    weight = F.pad(layer.weight, (0, 0, 0, side)) * whole
    close(layer(x), F.conv2d(x, weight, layer.bias, padding=side))


@masks
def test_gradients_reach_every_weight_that_is_not_masked(mask):
    layer, x = build(mask, 3)
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad != 0, layer.mask.expand_as(layer.weight).bool())
    assert (layer.bias.grad != 0).all()


def stepped(memory, x, stride=1):
    """All outputs of a raster memory, in order; a first guess of each column leaves no trace."""
    rows = []
    for r in range(x.shape[2]):
        if r % stride == 0:
            memory.row()
        columns = []
        for c in range(x.shape[3]):
            if r % stride == c % stride == 0:
                memory.step(torch.randn_like(x[:, :, r, c]), c)
                columns.append(memory.step(x[:, :, r, c], c))
            else:
                memory.put(x[:, :, r, c], c)
        if columns:
            rows.append(torch.stack(columns, 2))
    return torch.stack(rows, 2)


@masks
@kernels
def test_steps_equal_the_forward_pass(mask, kernel):
    layer, x = build(mask, kernel)
    close(stepped(layer.start(2, W), x), layer(x))


def test_what_is_added_to_a_row_is_added_to_its_steps():
    layer, x = build("B", 3)
    memory, extra = layer.start(2, W), torch.randn(2, 6, 1, W, dtype=torch.float64)
    memory.row(extra)
    close(memory.step(x[:, :, 0, 0], 0), layer(x)[:, :, 0, 0] + extra[:, :, 0, 0])


# With a stride a raster memory is told of one row above: rows 2.
SHIFTED = [{"columns": n, "stride": s} for n in (1, 2, 3) for s in (1, 2)] + [{"columns": 2, "rows": 3, "stride": 1}]


@pytest.mark.parametrize("shape", SHIFTED)
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_columns_of_a_shifted_convolution_equal_its_forward_pass(shape, size):
    layer = ShiftedConv(3, 4, right=0, **shape).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    memory = layer.start_columns(2, size[1])
    assert isinstance(memory, RasterMemory)
    close(stepped(memory, x, shape["stride"]), layer(x))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [{"columns": 3}, {"columns": 5, "rows": 3}])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_rows_of_a_shifted_convolution_equal_its_forward_pass(shape, stride, size):
    layer = ShiftedConv(3, 4, right=shape["columns"] // 2, stride=stride, **shape).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    memory = layer.start_rows(2, size[1])
    assert isinstance(memory, RowsMemory)
    rows = []
    for r in range(size[0]):
        if r % stride == 0:
            rows.append(memory.step(x[:, :, r : r + 1]))
        else:
            memory.put(x[:, :, r : r + 1])
    close(torch.cat(rows, 2), layer(x))
