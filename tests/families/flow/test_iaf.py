"""Inverse autoregressive flow: both directions agree, both objectives reach every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dgm_core.bijections import Autoregressive, Chain, Invert
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.data import densities
from dgm_core.models.flow.iaf import IAF
from tests.families.flow.oracles import EXACT, data, has_the_density_of_its_jacobian, inverts

U2 = {"name": "u2"}
SPECS: dict[str, tuple[DataSpec, dict[str, Any]]] = {
    "plane": (DataSpec("vector", (2,), None), {}),
    "energy": (DataSpec("vector", (2,), None, density=U2), {}),
    "vector": (DataSpec("vector", (5,), None), {"residual": True, "activation": "relu"}),
    "integers": (DataSpec("vector", (3,), 4), {}),
    "grey": (DataSpec("image", (1, 3, 4), 256), {"depth": 2}),
}


def perturbed(name: str, **overrides: Any) -> IAF:
    torch.manual_seed(0)
    spec, given = SPECS[name]
    config, _ = IAF.tiny(spec)
    model = IAF(config.merged({**given, **overrides}), spec).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", SPECS)
def test_inverse(name: str) -> None:
    inverts(perturbed(name))


@pytest.mark.parametrize("name", SPECS)
def test_log_prob_is_the_density_of_the_jacobian(name: str) -> None:
    model = perturbed(name)
    has_the_density_of_its_jacobian(model, data(model.data, 2))


@pytest.mark.parametrize("name", SPECS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = perturbed(name).train()
    model.loss(Batch(data(model.data, 16)), "model", Clock(0, 10)).value.backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        assert p.grad.abs().max() > 0, parameter_name


def test_a_draw_knows_its_density() -> None:
    """log q of the one pass that draws is what the other direction finds there (eq. 11)."""
    model = perturbed("energy")
    with torch.no_grad():
        x, log_q = model.rsample_with_log_prob(50)
        torch.testing.assert_close(model.log_prob(x), log_q, **EXACT)


def test_layers_are_the_papers_gates() -> None:
    """z_t = σ ⊙ z_{t−1} + (1 − σ) ⊙ m with σ = sigmoid(s + 2), one pass from noise to data (eqs. 13–15)."""
    model = perturbed("plane", depth=1)
    assert isinstance(model.flow, Chain)
    layer = model.flow.parts[0]
    assert isinstance(layer, Invert)
    assert isinstance(layer.bijection, Autoregressive)
    z = torch.randn(6, 2).double()
    with torch.no_grad():
        m, s = layer.bijection.net(z).chunk(2, 1)
        gate = torch.sigmoid(7 * torch.tanh(s / 7) + 2)
        x, log_det = layer.inverse(z)
        torch.testing.assert_close(x, gate * z + (1 - gate) * m, **EXACT)
        torch.testing.assert_close(log_det, gate.log().sum(1), **EXACT)


def test_reverse_kl_at_the_start_and_its_objective_by_default() -> None:
    """E_q [log q + U] of the draws themselves; the metric adds log Z, so that it is the divergence."""
    spec = SPECS["energy"][0]
    config, _ = IAF.defaults(spec)
    assert config.objective == "reverse_kl"
    assert IAF.defaults(SPECS["plane"][0])[0].objective == "likelihood"
    checkerboard = DataSpec("vector", (2,), None, density={"name": "checkerboard"})
    assert IAF.defaults(checkerboard)[0].objective == "likelihood"  # zero on parts of the plane
    model = perturbed("energy")
    torch.manual_seed(1)
    loss = model.loss(Batch(torch.zeros(64, 2)), "model", Clock(0, 10))
    torch.manual_seed(1)
    x, log_q = model.rsample_with_log_prob(64)
    target = densities.named("u2")
    expected = (log_q + target.energy(x)).mean()
    torch.testing.assert_close(loss.value, expected, **EXACT)
    torch.testing.assert_close(loss.metrics["reverse_kl_nats"], (expected + target.log_z()).detach(), **EXACT)


def test_saturating_units_keep_the_noise_of_far_data_finite() -> None:
    """What a layer says is bounded, so that its noise cannot grow from coordinate to coordinate."""
    spec = DataSpec("vector", (40,), None)
    torch.manual_seed(0)
    model = IAF(IAF.Config(depth=3), spec).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        assert model.log_prob(100 * torch.randn(20, 40)).isfinite().all()


def test_refuses_what_it_cannot_model() -> None:
    reverse = IAF.Config(objective="reverse_kl")
    with pytest.raises(DataMismatch, match="none is known"):
        IAF(reverse, DataSpec("vector", (2,), None))
    with pytest.raises(DataMismatch, match="zero on parts of the plane"):
        IAF(reverse, DataSpec("vector", (2,), None, density={"name": "checkerboard"}))
    with pytest.raises(DataMismatch, match="at least 2 coordinates"):
        IAF(IAF.Config(), DataSpec("vector", (1,), None))
    IAF(reverse, SPECS["energy"][0])
