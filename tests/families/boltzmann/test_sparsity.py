"""Weight cost and sparsity of an RBM against the penalties that they descend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.boltzmann.rbm import RBM

CLOCK = Clock(0, 10)
V, H = 4, 3


def model(real: bool = False, visible: int = V, hidden: int = H, **config: Any) -> RBM:
    data = DataSpec("vector", (visible,), None if real else 2)
    instance = RBM(RBM.Config(hidden=hidden, chains=6, **config), data).double()
    with torch.no_grad():
        for p in instance.layer.parameters():
            p.normal_()
        if instance.config.centred:
            instance.layer.visible_offset.uniform_()
            instance.layer.hidden_offset.uniform_()
    return instance


def gradients(instance: RBM, x: Tensor) -> dict[str, Tensor]:
    instance.zero_grad()
    torch.manual_seed(3)  # CD's samples
    instance.loss(Batch(x), "model", CLOCK).value.backward()
    return {name: p.grad.clone() for name, p in instance.layer.named_parameters() if p.grad is not None}


def added(instance: RBM, x: Tensor, **without: Any) -> dict[str, Tensor]:
    """What a term adds to the gradient: with it less without it, the samples alike."""
    found = gradients(instance, x)
    usual, instance.config = instance.config, instance.config.model_copy(update=without)
    sparse, instance.sparse = instance.sparse, instance.sparse and without.get("sparsity_cost", 1.0) > 0
    plain = gradients(instance, x)
    instance.config, instance.sparse = usual, sparse
    return {name: found[name] - plain[name] for name in found}


def examples(real: bool, n: int) -> Tensor:
    return torch.randn(n, V).double() if real else torch.randint(0, 2, (n, V), dtype=torch.uint8)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_sparsity_descends_the_cross_entropy_where_the_running_activity_is_the_present_one(real, centred):
    """One example again and again: its activity is the unit's probability, and autograd has the penalty's gradient."""
    instance = model(real, centred=centred, negative="cd", sparsity_cost=0.7, sparsity_target=0.2)
    x = examples(real, 1).repeat(5, 1)
    layer, v = instance.layer, instance._visible(x)
    a = layer.hidden_input(v)
    instance.activity.copy_(torch.sigmoid(a[0]))
    penalty = 0.7 * F.binary_cross_entropy_with_logits(a, torch.full_like(a, 0.2), reduction="none").sum(1).mean()
    moved = ("weight", "hidden_bias")
    expected = torch.autograd.grad(penalty, [layer.get_parameter(name) for name in moved])
    found = added(instance, x, sparsity_cost=0.0)
    for name, g in zip(moved, expected, strict=True):
        assert torch.allclose(found[name], g, atol=1e-12)
        assert g.abs().max() > 1e-2
    for name in set(found) - set(moved):  # the bias and the incoming weights, and nothing else
        assert torch.allclose(found[name], torch.zeros_like(found[name]), atol=1e-12)


def test_sparsity_gives_bias_and_weights_the_derivative_of_the_running_activity():
    instance = model(sparsity_cost=0.3, sparsity_target=0.1)
    instance.activity.uniform_()
    x = examples(False, 7)
    found = added(instance, x, sparsity_cost=0.0)
    derivative = 0.3 * (instance.activity - 0.1)
    u = x.double() - instance.layer.visible_offset
    assert torch.allclose(found["hidden_bias"], derivative, atol=1e-12)
    assert torch.allclose(found["weight"], torch.einsum("bi,j->ij", u, derivative) / 7, atol=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_the_running_activity_follows_the_whole_batch_once_a_play(centred):
    instance = model(centred=centred, sparsity_cost=0.3, sparsity_decay=0.9).train()
    x = examples(False, 6)
    before = instance.activity.clone()
    now = torch.sigmoid(instance.layer.hidden_input(x.double())).mean(0)
    for part in x.split(4):
        instance.loss(Batch(part), "model", CLOCK)
    assert torch.equal(instance.activity, before)
    instance.after("model", CLOCK)
    assert torch.allclose(instance.activity, 0.9 * before + 0.1 * now, atol=1e-12)
    assert "activity" in instance.state_dict()  # so that training goes on where it was


def test_sparsity_makes_units_as_active_as_asked():
    torch.manual_seed(0)
    shares = {}
    for cost in (0.0, 3.0):
        instance = RBM(RBM.Config(hidden=6, sparsity_cost=cost, sparsity_target=0.1), DataSpec("vector", (8,), 2))
        x = (torch.rand(200, 8) < 0.5).to(torch.uint8)
        instance.enter("model", iter([Batch(x)]))
        sgd = torch.optim.SGD(instance.train().parameters(), lr=0.1)
        for _ in range(300):
            sgd.zero_grad()
            instance.loss(Batch(x), "model", CLOCK).value.backward()
            sgd.step()
            instance.after("model", CLOCK)
        with torch.no_grad():
            shares[cost] = torch.sigmoid(instance.layer.hidden_input(x.float())).mean(0)
    assert (shares[3.0] < 0.2).all()
    assert (shares[0.0] > 0.3).any()


def test_weight_cost_pulls_weights_and_no_biases():
    instance = model(weight_cost=0.01, negative="cd")
    found = added(instance, examples(False, 5), weight_cost=0.0)
    assert torch.allclose(found["weight"], 0.01 * instance.layer.weight, atol=1e-12)
    for name in ("visible_bias", "hidden_bias"):
        assert torch.allclose(found[name], torch.zeros_like(found[name]), atol=1e-12)
