"""NICE: additive couplings keep volume, one scaling has all of the determinant, integers arrive in [0, 1]."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_core.bijections import Chain, DiagonalAffine, SplitCoupling
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.flow.nice import NICE
from tests.families.flow.oracles import EXACT, data, has_the_density_of_its_jacobian, inverts, standard_normal

SPECS: dict[str, tuple[DataSpec, dict[str, Any]]] = {
    "plane": (DataSpec("vector", (2,), None), {"prior": "logistic"}),
    "vector": (DataSpec("vector", (5,), None), {"prior": "normal", "depth": 3}),
    "integers": (DataSpec("vector", (3,), 4), {}),
    "grey": (DataSpec("image", (1, 3, 4), 256), {}),
}


def perturbed(name: str) -> NICE:
    torch.manual_seed(0)
    spec, given = SPECS[name]
    model = NICE(NICE.tiny(spec)[0].merged(given), spec).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", SPECS)
def test_inverse(name: str) -> None:
    inverts(perturbed(name))


@pytest.mark.parametrize("name", SPECS)
def test_log_prob_is_the_density_of_the_jacobian(name: str) -> None:
    """With the prior written out: log σ(h) + log σ(−h) for the logistic, eq. 3.4; else a standard Gaussian."""
    model = perturbed(name)

    def logistic(h: Tensor) -> Tensor:
        return (h.sigmoid().log() + (-h).sigmoid().log()).sum()

    prior = logistic if model.config.prior == "logistic" else standard_normal
    has_the_density_of_its_jacobian(model, data(model.data, 2), prior)


@pytest.mark.parametrize("name", SPECS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = perturbed(name).train()
    model.loss(Batch(data(model.data, 16)), "model", Clock(0, 10)).value.backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        assert p.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", SPECS)
def test_only_the_scaling_changes_volume(name: str) -> None:
    """log |det| is Σ s everywhere, and what the units contribute (eq. 4)."""
    model = perturbed(name)
    assert isinstance(model.flow, Chain)
    scaling = model.flow.parts[-1]
    assert isinstance(scaling, DiagonalAffine)
    assert scaling.shift is None
    x = torch.rand(6, *model.data.shape).double()
    _, log_det = model._normalize(x)
    units = -model.data.dims * math.log(model.data.levels or 1)
    torch.testing.assert_close(log_det, (scaling.log_scale.sum() + units).expand(6), **EXACT)


def test_the_density_of_the_plane_is_one() -> None:
    """By the trapezoid; the logistic's tails fall as exp(−|h|), so that ±60 leaves out less than 1e-10."""
    model = perturbed("plane")
    axis = torch.linspace(-60, 60, 601, dtype=torch.float64)
    with torch.no_grad():
        total = model.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total.item() - 1) < 1e-3


def test_even_and_odd_components_take_turns() -> None:
    model = perturbed("vector")
    assert isinstance(model.flow, Chain)
    x = torch.randn(2, 5).double()
    for i, coupling in enumerate(list(model.flow.parts)[:-1]):
        assert isinstance(coupling, SplitCoupling)
        moved = (coupling(x)[0] != x).all(0)
        assert moved.tolist() == [(k + i) % 2 == 0 for k in range(5)]


def test_integers_are_scaled_to_the_unit_interval() -> None:
    model = perturbed("grey")
    ends = torch.tensor([0.0, 256.0]).double()[:, None].expand(2, 12).reshape(2, 1, 3, 4)
    real, log_det = model.to_real(ends)
    assert real.flatten(1)[:, 0].tolist() == [0.0, 1.0]
    torch.testing.assert_close(log_det, torch.full((2,), -12 * math.log(256), dtype=torch.float64), **EXACT)
    with torch.no_grad():
        drawn = model.sample(20)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (20, 1, 3, 4)


def test_defaults_are_the_papers_for_images() -> None:
    config, recipe = NICE.defaults(DataSpec("image", (1, 28, 28), 256))
    assert (config.depth, config.features, config.hidden, config.prior) == (4, 1000, 5, "logistic")
    adam = recipe.optimizers["model"]
    assert (adam.lr, adam.betas, adam.eps) == (1e-3, (0.9, 0.999), 1e-4)


def test_refuses_what_it_cannot_model() -> None:
    with pytest.raises(DataMismatch, match="at least 2 coordinates"):
        NICE(NICE.Config(), DataSpec("vector", (1,), None))
    with pytest.raises(DataMismatch, match="kind 'audio'"):
        NICE(NICE.Config(), DataSpec("audio", (16,), None))
