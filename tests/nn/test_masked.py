"""Masked perceptrons: what depends on what, by Jacobian; and that told one at a time they say the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_core.nn.masked import MADE, MaskedLinear, Unrolled

# The same sums of some hundred terms in float64, in another order.
ROUNDING = {"rtol": 0, "atol": 1e-11}

# Units saturate smoothly, so that a dependence that is there shows in the Jacobian: a rectifier may be off.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one_layer": (5, 2, {"features": 7}),
    "as_many_units_as_degrees": (6, 1, {"features": 5, "hidden": 3}),
    "reversed": (5, 2, {"features": 11, "hidden": 2, "order": [4, 3, 2, 1, 0]}),
    "permuted": (5, 3, {"features": 8, "hidden": 3, "order": [3, 1, 0, 4, 2]}),
    "too_few_units": (6, 2, {"features": 3, "hidden": 2}),
    "residual": (5, 2, {"features": 9, "hidden": 2, "residual": True}),
    "residual_with_context": (
        5,
        1,
        {"features": 9, "hidden": 2, "residual": True, "context": 3, "context_in": "every"},
    ),
    "context_first": (4, 2, {"features": 12, "hidden": 2, "context": 3}),
    "too_few_units_with_context": (6, 2, {"features": 3, "hidden": 2, "context": 2}),
    "one_coordinate_with_context": (1, 2, {"features": 4, "context": 2}),
    "several_blocks": (70, 2, {"features": 600, "hidden": 2, "order": list(range(69, -1, -1))}),
    "several_blocks_with_context": (9, 60, {"features": 520, "hidden": 2, "context": 2}),
}


def made(name: str, activation: Any = "tanh") -> MADE:
    """Away from its start, at which every conditional is alike."""
    torch.manual_seed(0)
    dims, outputs, options = CASES[name]
    net = MADE(dims, outputs, activation=activation, **options).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def inputs(name: str, n: int) -> tuple[Tensor, Tensor | None]:
    dims, _, options = CASES[name]
    size = options.get("context", 0)
    return torch.randn(n, dims).double(), torch.randn(n, size).double() if size else None


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found = torch.autograd.functional.jacobian(f, x)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", CASES)
def test_causal_with_the_full_receptive_field(name: str) -> None:
    """Every output of coordinate order[t] depends on order[0] … order[t − 1], on each of them, and on nothing else."""
    net = made(name)
    x, context = inputs(name, 1)
    seen = jacobian(lambda v: net(v, context), x)[0, :, 0].reshape(net.outputs, net.dims, net.dims)[:, net.order][
        ..., net.order
    ]
    before = torch.ones(net.dims, net.dims).tril(-1).bool()
    assert (seen[:, ~before] == 0).all()
    assert (seen[:, before] != 0).all()
    if context is not None:
        assert (jacobian(lambda c: net(x, c), context) != 0).all()  # of the first coordinate too


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("name", CASES)
def test_told_one_at_a_time_it_says_the_same(name: str, activation: str) -> None:
    net = made(name, activation)
    x, context = inputs(name, 3)
    with torch.no_grad():
        expected = net(x, context)
    each = expected.unflatten(1, (net.outputs, net.dims))
    for block in (1, 3, 64):
        unrolled = Unrolled(net, 3, context, block=block)
        for i in unrolled.order:
            torch.testing.assert_close(unrolled.step(), each[..., i], **ROUNDING)
            unrolled.put(x[:, i])
        torch.testing.assert_close(unrolled.all_said(), expected, **ROUNDING)
        assert torch.equal(unrolled.told(), x)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_parameter(name: str) -> None:
    net = made(name)
    net(*inputs(name, 8)).square().sum().backward()
    for parameter_name, p in net.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize(
    ("reach", "heads"),
    [([0, 0, 1, 3], 1), ([1, 2], 1000), ([2, 2, 2], 2), ([r * 90 // 1200 for r in range(1200)], 1), ([0] * 600, 1)],
)
def test_masked_linear_is_a_linear_map_that_sees_its_reach(reach: list[int], heads: int) -> None:
    torch.manual_seed(0)
    layer = MaskedLinear(90, reach, heads).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))  # also where the mask is zero
    weight, bias = layer.dense()
    hidden = torch.arange(90)[None] >= torch.tensor(reach)[:, None]
    assert (weight.transpose(0, 1)[:, hidden] == 0).all()
    x = torch.randn(4, 90).double()
    expected = torch.einsum("rhi,bi->bhr", weight, x) + bias.t()
    torch.testing.assert_close(layer(x), expected.flatten(1), **ROUNDING)


def test_masked_linear_starts_as_linear_layers_do_and_stores_less() -> None:
    torch.manual_seed(0)
    reach = [(r + 1) * 512 // 1024 for r in range(1024)]
    layer = MaskedLinear(512, reach)
    weight, bias = layer.dense()
    bound = torch.tensor(reach).clamp_min(1).rsqrt()
    for values in (weight[:, 0], bias):
        scaled = values.abs() / bound.reshape(-1, 1)
        assert scaled.max() <= 1
    # Uniform on ±1/√reach: the variance is a third of the bound's square; a row of 512 scatters by 4 % around it.
    torch.testing.assert_close(weight[-1].square().mean() * 512, torch.tensor(1 / 3), rtol=0.2, atol=0)
    # Four blocks of a triangle: (1 + 2 + 3 + 4) / 16 of the square.
    assert sum(p.numel() for p in layer.parameters()) == 512 * 1024 * 10 // 16 + 1024


def test_starts_at_zero_whatever_it_sees() -> None:
    net = MADE(5, 2, features=8, hidden=2, context=3)
    assert not net(torch.randn(4, 5), torch.randn(4, 3)).any()


def test_refuses_an_order_that_is_none_and_a_coordinate_alone() -> None:
    with pytest.raises(ValueError, match="each of 0 … 2 once"):
        MADE(3, features=4, order=[0, 2, 2])
    with pytest.raises(ValueError, match="nothing to depend on"):
        MADE(1, features=4)
