"""Dilated convolutions: reach by Jacobian, steps and prefixes against the forward pass, and what a step costs."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dgm_core.nn.dilated import BLOCK, DilatedConv, DilatedStack

# Steps add in another order than whole convolutions: float64 rounding of sums of about 100 terms, hence 1e-12.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def reach(layer, x, t):
    """Columns that have any influence on column t of the output."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 0, t].sum(), x)
    return set(gradient[0].abs().sum((0, 1)).nonzero().flatten().tolist())


@pytest.mark.parametrize(("kernel", "dilation"), [(2, 1), (2, 4), (3, 3)])
def test_a_convolution_reaches_its_taps_and_nothing_else(kernel, dilation):
    layer = DilatedConv(2, 3, kernel, dilation).double()
    x = torch.randn(1, 2, 1, 20, dtype=torch.float64)
    for t in (0, 5, 19):
        assert reach(layer, x, t) == {t - j * dilation for j in range(kernel) if t >= j * dilation}


@pytest.mark.parametrize(("kernel", "dilations"), [(2, [1, 2, 4, 8]), (2, [1, 2, 4, 1, 2, 4]), (3, [1, 3])])
def test_a_stack_reaches_every_column_of_its_past_and_no_other(kernel, dilations):
    stack = DilatedStack(3, 4, 5, kernel=kernel, dilations=dilations).double()
    assert stack.past == (kernel - 1) * sum(dilations)
    x = torch.randn(1, 3, 1, 40, dtype=torch.float64)
    for t in (0, 7, 39):
        assert reach(partial(stack, condition=None), x, t) == set(range(max(0, t - stack.past), t + 1))


def test_gradients_reach_every_parameter():
    stack = DilatedStack(3, 4, 5, kernel=2, dilations=[1, 2, 4], condition=2).double()
    x, y = torch.randn(2, 3, 1, 12, dtype=torch.float64), torch.randn(2, 2, 1, 12, dtype=torch.float64)
    stack(x, y).square().sum().backward()
    assert not [name for name, p in stack.named_parameters() if p.grad is None or not p.grad.all()]


# Dilations below a block, equal to one, above it, and that do not divide it; lengths leave blocks unfinished.
STACKS = {
    "paper": (2, [1, 2, 4, 8, 16, 32, 64, 128], 300),
    "repeated": (2, [1, 2, 4, 1, 2, 4], 50),
    "three taps": (3, [1, 3, 6], 50),
    "one layer": (2, [2 * BLOCK], 3 * BLOCK + 5),
}
CONDITIONS = ["none", "global", "local"]


def built(name, condition):
    """A stack, its input, and its condition."""
    kernel, dilations, length = STACKS[name]
    stack = DilatedStack(3, 4, 5, kernel=kernel, dilations=dilations, condition=0 if condition == "none" else 2)
    y = {"none": None, "global": torch.randn(2, 2, 1, 1), "local": torch.randn(2, 2, 1, length)}[condition]
    return stack.double(), torch.randn(2, 3, 1, length).double(), None if y is None else y.double()


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", STACKS)
@torch.no_grad()
def test_steps_equal_the_forward_pass(name, condition):
    stack, x, y = built(name, condition)
    memory = stack.start(2, y)
    stepped = torch.stack([stack.step(memory, x[:, :, 0, t], t).clone() for t in range(x.shape[3])], 2)
    close(stepped[:, :, None], stack(x, y))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", STACKS)
@torch.no_grad()
def test_steps_after_a_prefix_equal_the_forward_pass(name, condition):
    stack, x, y = built(name, condition)
    whole, length = stack(x, y), x.shape[3]
    for columns in (1, 2, 7, BLOCK, BLOCK + 3, length - 1):
        if columns >= length:
            continue
        seen = slice(max(0, columns - stack.past), columns)  # no more of a long prefix is needed
        memory = stack.start(2, y)
        stack.fill(memory, x[..., seen], y[..., seen] if condition == "local" else y, columns)
        for t in range(columns, length):
            close(stack.step(memory, x[:, :, 0, t], t), whole[:, :, 0, t])


def test_a_convolution_steps_like_its_forward_pass():
    conv, x = DilatedConv(3, 4, 2).double(), torch.randn(2, 3, 1, 9).double()
    ring, out = conv.start(2), torch.empty(2, 4, dtype=torch.float64)
    close(torch.stack([ring.step(x[:, :, 0, t], t, out).clone() for t in range(9)], 2), conv(x)[:, :, 0])


def test_the_work_of_a_step_does_not_depend_on_the_reach():
    def flops(dilations):
        stack = DilatedStack(3, 4, 5, kernel=2, dilations=dilations)
        memory = stack.start(2, None)
        with FlopCounterMode(display=False) as counter:
            for t in range(BLOCK):
                stack.step(memory, torch.randn(2, 3), t)
        return counter.get_total_flops()

    near, far = flops([1] * 3), flops([1, 16, 2 * BLOCK])
    assert near == far > 0
