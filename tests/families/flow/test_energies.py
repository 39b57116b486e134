"""Planar and radial flows on an energy: what they minimise, that it is a density, and that data plays no part."""

import math

import pytest
import torch
from torch import Tensor

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.data import densities
from dgm_core.evaluation.energies import energy_metrics
from dgm_core.models.flow.base import FlowModel
from dgm_core.models.flow.planar_flow import PlanarFlow
from dgm_core.models.flow.radial_flow import RadialFlow
from dgm_core.training.trainer import Schedule, Trainer
from tests.support import Tensors, examples

MODELS = {"planar": PlanarFlow, "radial": RadialFlow}
# float64 through eight maps, one direction of the planar ones by Newton's method to rounding.
EXACT = {"rtol": 0, "atol": 1e-8}


def energy(name: str) -> DataSpec:
    return DataSpec("vector", (2,), None, density={"name": name})


def perturbed(kind: str, name: str = "u3", scale: float = 0.5) -> FlowModel:
    """Away from the near-identity that training starts at, in float64."""
    torch.manual_seed(0)
    spec = energy(name)
    model = MODELS[kind](MODELS[kind].tiny(spec)[0], spec).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model


def some(n: int) -> Batch:
    return Batch(torch.full((n, 2), math.nan, dtype=torch.float64))


@pytest.mark.parametrize("kind", MODELS)
def test_inverse_and_density_agree_with_the_sampler(kind: str) -> None:
    """log q of the draws, closed, is `log_prob` there, which goes the other way."""
    model = perturbed(kind)
    with torch.no_grad():
        x, log_q = model.rsample_with_log_prob(200)
        torch.testing.assert_close(model.log_prob(x), log_q, **EXACT)
        assert model.inverse_error(x).max() < EXACT["atol"]
        torch.testing.assert_close(model.decode(model.to_latent(x)), x, **EXACT)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v: model.to_latent(v[None])[0], x[i])
        base = torch.distributions.Normal(0.0, 1.0).log_prob(model.to_latent(x[i : i + 1])).sum()
        torch.testing.assert_close(base + torch.linalg.slogdet(jacobian)[1], log_q[i], **EXACT)


@pytest.mark.parametrize("kind", MODELS)
def test_density_integrates_to_one_and_its_gap_is_that_of_quadrature(kind: str) -> None:
    model = perturbed(kind, "u2", scale=0.2)
    target = densities.named("u2")
    axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_q = model.log_prob(x)
        found = energy_metrics(model, model.data, 100_000)["reverse_kl_nats"]
        torch.manual_seed(1)
        loss = model.loss(some(100_000), "model", Clock(99, 100))
    mass = log_q.exp() * (axis[1] - axis[0]).item() ** 2
    # The trapezoid on a grid of 0.04: kinks of the density at a radial map's centre leave 1e-4.
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)
    gap = (mass * (log_q + target.energy(x))).sum().item() + target.log_z()
    assert found.value is not None
    assert found.error is not None
    assert found.value == pytest.approx(gap, abs=4 * found.error)
    assert loss.metrics["reverse_kl_nats"].item() == pytest.approx(gap, abs=4 * found.error)
    assert loss.value.item() == pytest.approx(gap - target.log_z(), abs=4 * found.error)
    assert found.error < 0.05 * gap


@pytest.mark.parametrize("kind", MODELS)
def test_loss_is_the_annealed_bound_of_the_models_own_draws(kind: str) -> None:
    """Eq. 20: E[log q + β U] with β = min(1, 0.01 + t / T), T half of the training; examples are only counted."""
    model = perturbed(kind).train()
    target = densities.named("u3")
    for step, beta in ((0, 0.01), (10, 0.21), (49, 0.99), (50, 1.0), (99, 1.0)):
        torch.manual_seed(step)
        loss = model.loss(some(64), "model", Clock(step, 100))
        torch.manual_seed(step)
        x, log_q = model.rsample_with_log_prob(64)
        torch.testing.assert_close(loss.value, (log_q + beta * target.energy(x)).mean(), **EXACT)
        gap = (log_q + target.energy(x)).mean() + target.log_z()
        torch.testing.assert_close(loss.metrics["reverse_kl_nats"], gap.detach(), **EXACT)
    plain = MODELS[kind](model.config.merged({"anneal": 0.0}), model.data)
    assert plain.inverse_temperature(Clock(0, 100)) == 1.0


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    spec = energy("u1")
    torch.manual_seed(0)
    model = MODELS[kind](MODELS[kind].tiny(spec)[0], spec).double()  # as training finds it
    model.loss(some(256), "model", Clock(50, 100)).value.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert (p.grad.abs() > 0).all(), name


def test_planar_training_starts_near_a_standard_normal() -> None:
    spec = energy("u1")
    torch.manual_seed(0)
    model = PlanarFlow(PlanarFlow.defaults(spec)[0], spec).double()
    x = torch.randn(500, 2, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    # 32 bends, each of a hundredth: independent, they add up to some 0.06 of a nat.
    assert 0 < (model.log_prob(x) - normal).abs().mean() < 0.3


@pytest.mark.parametrize(
    ("density", "message"),
    [
        ({}, "of this data none is known"),
        ({"name": "checkerboard"}, "zero on parts of the plane"),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_refuses_data_without_a_positive_density(kind: str, density: dict[str, str], message: str) -> None:
    spec = DataSpec("vector", (2,), None, density=density)
    with pytest.raises(DataMismatch, match=message):
        MODELS[kind](MODELS[kind].Config(), spec)


def fit(kind: str, name: str, x: Tensor) -> FlowModel:
    spec = energy(name)
    config, recipe = MODELS[kind].tiny(spec)
    torch.manual_seed(0)
    model = MODELS[kind](config, spec)
    Trainer(model, recipe, Tensors(Batch(x)), schedule=Schedule(checkpoint_seconds=None)).fit()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_fits_an_energy_whatever_the_examples_are(kind: str) -> None:
    """The gap closes from that of a standard normal, to within what eight maps can do; examples decide nothing."""
    spec = energy("u1")
    torch.manual_seed(0)
    before = energy_metrics(MODELS[kind](MODELS[kind].tiny(spec)[0], spec), spec, 20_000)["reverse_kl_nats"].value
    fitted = fit(kind, "u1", examples(spec, 400).x)
    after = energy_metrics(fitted, spec, 20_000)
    assert before is not None
    assert before > 2
    assert (after["reverse_kl_nats"].value or 0) < 0.4
    assert after["log_z_is_nats"].value == pytest.approx(densities.named("u1").log_z(), abs=0.05)
    others = fit(kind, "u1", torch.zeros(400, 2))
    for p, q in zip(fitted.parameters(), others.parameters(), strict=True):
        assert torch.equal(p, q)
