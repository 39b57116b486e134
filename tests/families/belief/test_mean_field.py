"""The mean-field bound and its E-step: below the truth, never falling, at a fixed point."""

from __future__ import annotations

import pytest
import torch

from dgm_core.models.belief import mean_field
from dgm_core.models.belief.mean_field import Field
from tests.families.belief.enumeration import given, log_p, net, states

SIZES = [(6, 4), (6, 4, 3)]


def anywhere(sizes, rows: int) -> Field:
    """Some means and some ξ."""
    logits = [2 * torch.randn(rows, n, dtype=torch.float64) for n in sizes[1:]]
    return Field(logits, [torch.rand(rows, n, dtype=torch.float64) for n in sizes[:-1]])


def written_out(generative, x, field: Field, row: int):
    """The bound of one example, expectations of e^{tz} by enumeration; and the same with E ln(1 + e^z) itself."""
    hidden = states(*generative.sizes[1:])
    q = torch.ones(len(hidden[0]), dtype=torch.float64)
    for h, m in zip(hidden, field.logits, strict=True):
        p = torch.sigmoid(m[row])
        q = q * torch.where(h == 1, p, 1 - p).prod(1)
    layers = given(x[row], hidden)
    entropy = -(q * q.log()).sum()
    energy = q @ log_p(generative, layers)
    bound = entropy + energy
    for level, tilt in enumerate(field.tilts):
        weight, bias = generative.affine(level)
        z = layers[level + 1] @ weight.T + bias
        t = tilt[row]
        exact = q @ torch.nn.functional.softplus(z)
        upper = t * (q @ z) + (q @ (torch.exp(-t * z) + torch.exp((1 - t) * z))).log()
        bound = bound + (exact - upper).sum()
    return bound, entropy + energy


@pytest.mark.parametrize("sizes", SIZES)
def test_the_bound_is_the_papers_and_lies_below_log_p(sizes):
    generative = net(*sizes)
    (x,) = states(sizes[0])
    x = x[::13]
    field = anywhere(sizes, len(x))
    with torch.no_grad():
        found = mean_field.bound(generative, x, field)
        for row in range(len(x)):
            expected, elbo = written_out(generative, x, field, row)
            assert torch.allclose(found[row], expected, atol=1e-11)
            assert found[row] <= elbo  # which is what its importance weights average, in logarithms
        assert (found <= generative.log_prob(x)).all()


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_no_sweep_lowers_the_bound(sizes, scale):
    """From the usual start and from anywhere, at weights where Newton's steps in ξ overshoot."""
    generative = net(*sizes, scale=scale)
    (x,) = states(sizes[0])
    with torch.no_grad():
        truth = generative.log_prob(x)
        for field in (mean_field.start(generative, x), anywhere(sizes, len(x))):
            before = mean_field.bound(generative, x, field)
            first = before
            for _ in range(12):
                field = mean_field.sweep(generative, x, field)
                after = mean_field.bound(generative, x, field)
                assert (after >= before - 1e-9 * (1 + before.abs())).all()  # rounding of sums over some ten terms
                before = after
            assert (before <= truth + 1e-10).all()
            assert (before > first + 1e-3).any()


def test_both_kinds_of_step_in_xi_are_taken():
    generative = net(6, 4, scale=8.0)
    (x,) = states(6)
    weight, bias = (t.detach() for t in generative.affine(0))
    field = anywhere((6, 4), len(x))
    stepped = mean_field._update_tilts(weight, bias, field.logits[0], field.tilts[0])
    inputs = torch.sigmoid(field.logits[0]) @ weight.T + bias
    before = mean_field._phi(weight, bias, field.logits[0], field.tilts[0], inputs)
    after = mean_field._phi(weight, bias, field.logits[0], stepped, inputs)
    assert (after <= before + 1e-10).all()
    v = weight.square().sum(1) / 4
    tilt = field.tilts[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(mean_field._phi(weight, bias, field.logits[0], tilt, inputs).sum(), tilt)
    careful = (field.tilts[0] - slope / (v + v.square() / 4)).clamp(0, 1)
    is_careful = torch.isclose(stepped, careful, atol=1e-12)
    assert is_careful.any()
    assert not is_careful.all()


@pytest.mark.parametrize("sizes", SIZES)
def test_the_e_step_ends_where_the_bound_stands_still(sizes):
    generative = net(*sizes)
    (x,) = states(sizes[0])
    field = mean_field.e_step(generative, x, 2000, 1e-11)
    free = Field(*([t.clone().requires_grad_() for t in part] for part in field))
    slopes = torch.autograd.grad(mean_field.bound(generative, x, free).sum(), [*free.logits, *free.tilts])
    for slope, t in zip(slopes, [*free.logits, *free.tilts], strict=True):
        inside = (t > 0) & (t < 1) if any(t is tilt for tilt in free.tilts) else torch.ones_like(t, dtype=torch.bool)
        # Means moved by less than 1e-11 in the last sweep; convergence is linear, at rates far from one here.
        assert slope[inside].abs().max() < 1e-6


def test_an_examples_field_does_not_depend_on_its_neighbours():
    generative = net(6, 4, 3)
    (x,) = states(6)
    together = mean_field.e_step(generative, x, 30, 1e-3)
    alone = [mean_field.e_step(generative, row[None], 30, 1e-3) for row in x]
    for i in range(2):
        assert torch.allclose(together.logits[i], torch.cat([f.logits[i] for f in alone]), atol=1e-10)
        assert torch.allclose(together.tilts[i], torch.cat([f.tilts[i] for f in alone]), atol=1e-10)
    # Some stop before others: the tolerance is each example's own.
    longer = mean_field.e_step(generative, x, 31, 1e-3)
    moved = (longer.logits[0] != together.logits[0]).any(1)
    shorter = mean_field.e_step(generative, x, 3, 1e-3)
    assert (shorter.logits[0] != together.logits[0]).any()
    assert not moved.all()


def test_means_that_are_certain_are_no_division_by_zero():
    generative = net(6, 4, scale=60.0)
    (x,) = states(6)
    field = mean_field.e_step(generative.float(), x.float(), 20, 1e-3)
    bound = mean_field.bound(generative, x.float(), field)
    assert bound.isfinite().all()
    exact = generative.double().log_prob(x)
    assert (bound <= exact + 1e-4 * (1 + exact.abs())).all()  # float32 of numbers in the hundreds
