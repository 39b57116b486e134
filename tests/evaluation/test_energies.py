"""Against a known density: closed forms for a Gaussian model, quadrature for an energy; and the inverse's own error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_core.capabilities import HasInverse, HasReparametrizedSample
from dgm_core.contract import Batch, DataSpec
from dgm_core.data import densities
from dgm_core.evaluation import energies
from dgm_core.evaluation.energies import energy_metrics, importance_sampled, log_weights
from dgm_core.evaluation.evaluate import evaluate
from dgm_core.evaluation.inverses import inverse_metrics
from dgm_core.evaluation.record import EvaluationConfig
from dgm_core.models.flow.planar_flow import PlanarFlow
from tests.evaluation.handmade import Blank, factory, images

NORMAL = {"name": "ring", "modes": 1, "radius": 0.0, "sd": 1.0}  # N(0, I) by another name


def spec_of(**density: Any) -> DataSpec:
    return DataSpec("vector", (2,), None, density=density)


class Gaussian(Blank, HasReparametrizedSample):
    """N(0, sd² I)."""

    def __init__(self, data: DataSpec, sd: float) -> None:
        super().__init__(data)
        self.sd = sd

    def rsample_with_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        x = self.sd * torch.randn(n, 2, dtype=torch.float64)
        return x, self.log_density(x)

    def log_density(self, x: Tensor) -> Tensor:
        return torch.distributions.Normal(0.0, self.sd).log_prob(x).sum(1)


@pytest.mark.parametrize("sd", [0.9, 1.3])
def test_closed_forms_of_two_gaussians(sd: float):
    """KL(N(0, s² I) ‖ N(0, I)) = s² − 1 − 2 ln s on the plane; E[w]² / E[w²] = (2s² − 1) / s⁴."""
    torch.manual_seed(0)
    found = energy_metrics(Gaussian(spec_of(**NORMAL), sd), spec_of(**NORMAL), 100_000)
    gap, log_z = found["reverse_kl_nats"], found["log_z_is_nats"]
    assert gap.value is not None
    assert gap.error is not None
    assert log_z.value is not None
    assert log_z.error is not None
    # Four standard errors: one seed in 16,000 would miss them.
    assert gap.value == pytest.approx(sd**2 - 1 - 2 * math.log(sd), abs=4 * gap.error)
    assert 0 < gap.error < 0.005
    assert gap.floor == 0
    assert log_z.value == pytest.approx(0, abs=4 * log_z.error)
    assert log_z.floor == 0
    effective = (2 * sd**2 - 1) / sd**4
    # The weights have four moments at these widths, so that the share's own error is of order 1/√n.
    assert found["effective_sample_size"].value == pytest.approx(effective, abs=0.02)
    assert log_z.error == pytest.approx(math.sqrt((1 / effective - 1) / 100_000), rel=0.1)
    for metric in found.values():
        assert metric.context["n"] == 100_000
        assert metric.context["density"] == "ring"


def test_the_density_itself_leaves_no_gap():
    found = energy_metrics(Gaussian(spec_of(**NORMAL), 1.0), spec_of(**NORMAL), 1000)
    assert found["reverse_kl_nats"].value == pytest.approx(0, abs=1e-12)
    assert found["log_z_is_nats"].value == pytest.approx(0, abs=1e-12)
    assert found["effective_sample_size"].value == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["u1", "u2", "u3", "u4"])
def test_reverse_kl_to_an_energy_is_that_of_quadrature(name: str):
    """Σ q (log q + U) + log Z on a grid, unnormalised energies and all."""
    torch.manual_seed(1)
    model, target = Gaussian(spec_of(name=name), 1.5), densities.named(name)
    axis = torch.linspace(-12, 12, 1201, dtype=torch.float64)  # eight standard deviations
    x = torch.cartesian_prod(axis, axis)
    log_q, energy = model.log_density(x), target.energy(x)
    cell = (axis[1] - axis[0]).item() ** 2
    gap = (log_q.exp() * (log_q + energy)).sum().item() * cell + target.log_z()
    found = energy_metrics(model, spec_of(name=name), 200_000)
    value, error = found["reverse_kl_nats"].value, found["reverse_kl_nats"].error
    assert value is not None
    assert error is not None
    assert value == pytest.approx(gap, abs=4 * error)
    assert error < 0.02 * gap
    assert 0 < (found["effective_sample_size"].value or 0) <= 1
    assert found["log_z_is_nats"].floor == target.log_z()


def test_importance_sampling_is_unbiased_in_z(monkeypatch: pytest.MonkeyPatch):
    """The mean over many small estimates of Z, each of them scattered, is the truth; and so is their error."""
    torch.manual_seed(2)
    monkeypatch.setattr(energies, "AT_ONCE", 37)  # chunks that do not divide the number
    spec = spec_of(name="u2")
    model, truth = Gaussian(spec, 3.0), densities.named("u2").log_z()
    ratios, errors = [], []
    for _ in range(2000):
        metric = energy_metrics(model, spec, 100)["log_z_is_nats"]
        assert metric.value is not None
        assert metric.error is not None
        assert metric.context["n"] == 100
        ratios.append(math.exp(metric.value - truth))
        errors.append(metric.error)
    spread = float(np.std(ratios))
    assert spread > 0.05
    assert np.mean(ratios) == pytest.approx(1, abs=4 * spread / math.sqrt(len(ratios)))
    assert np.mean(errors) == pytest.approx(spread, rel=0.1)  # of ln Ẑ, which to first order is that of Ẑ / Z


def test_effective_sample_size_lies_between_one_draw_and_all():
    assert importance_sampled(torch.zeros(50, dtype=torch.float64))[1] == pytest.approx(1)
    one = torch.full((50,), -1e3, dtype=torch.float64)
    one[7] = 1e3
    log_z, share = importance_sampled(one)
    assert share == pytest.approx(1 / 50)
    assert log_z == pytest.approx(1e3 - math.log(50))
    half = torch.where(torch.arange(50) < 25, 0.0, -math.inf).double()
    assert importance_sampled(half) == (pytest.approx(math.log(0.5)), pytest.approx(0.5))


def test_weights_come_in_chunks_and_without_a_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(energies, "AT_ONCE", 100)
    weights = log_weights(Gaussian(spec_of(name="u1"), 2.0), densities.named("u1"), 250)
    assert weights.shape == (250,)
    assert weights.dtype == torch.float64
    flow = PlanarFlow(PlanarFlow.Config(depth=2), spec_of(name="u1"))
    assert not log_weights(flow, densities.named("u1"), 10).requires_grad


def test_a_density_with_holes_has_a_log_z_but_no_reverse_kl():
    spec = spec_of(name="checkerboard")
    found = energy_metrics(Gaussian(spec, 2.5), spec, 20_000)
    assert set(found) == {"log_z_is_nats", "effective_sample_size"}
    assert found["log_z_is_nats"].value == pytest.approx(0, abs=4 * (found["log_z_is_nats"].error or 0))


def test_nothing_is_said_without_draws_of_known_density_or_without_a_density():
    assert energy_metrics(Blank(spec_of(name="u1")), spec_of(name="u1"), 10) == {}
    assert energy_metrics(Gaussian(DataSpec("vector", (2,), None), 1.0), DataSpec("vector", (2,), None), 10) == {}


class Roundabout(Blank, HasInverse):
    """An inverse that is off by what it is told, on one example of those that are bright at the left."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.off = off

    def to_latent(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x.flatten(1).double()

    def inverse_error(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        return torch.where((torch.arange(len(x)) == 3) & (y == 1), self.off, 1e-4)


@pytest.mark.parametrize(("off", "warned"), [(1e-3, False), (0.5, False), (2.0, True), (math.nan, True)])
def test_inverse_error_is_the_worst_examples_and_a_large_one_is_said(off: float, warned: bool):
    """The pictures' standard deviation is about 80 levels."""
    batch = images(40)
    metrics, warnings = inverse_metrics(Roundabout(off), batch, 16)
    metric = metrics["inverse_error"]
    assert metric.context["n"] == 40
    assert metric.value == (pytest.approx(off) if off == off else None)
    assert bool(warnings) == warned
    if warned:
        assert "not invertible in practice" in warnings[0]
        assert "on 3 of 40 examples" in warnings[0]  # one in each chunk of 16
    assert inverse_metrics(Blank(), batch, 16) == ({}, [])


@pytest.mark.parametrize("name", ["u1", "u4"])
def test_a_flow_on_an_energy_from_end_to_end(name: str, tmp_path: Path):
    """All of it by what the model can do; the numbers are the model's density against quadrature."""
    torch.manual_seed(3)
    spec, target = spec_of(name=name), densities.named(name)
    model = PlanarFlow(PlanarFlow.Config(depth=3), spec).eval()
    with torch.no_grad():
        model.flow.get_submodule("parts.0.bijection").u.add_(torch.randn(3, 2))  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    points: dict[str, Any] = {
        k: factory(Batch(torch.from_numpy(target.sample(300, rng)).float())) for k in ("train", "val", "test")
    }
    info = {"name": name, "variant": "plain", "transforms": [], "density": {"entropy": target.entropy()}}
    options = EvaluationConfig(examples=200, samples=200, energy_draws=50_000)
    found = evaluate(model, spec=spec, info=info, judge=None, options=options, out=tmp_path, seed=0, **points)
    assert {"nll_nats", "reverse_kl_nats", "log_z_is_nats", "effective_sample_size", "inverse_error"} <= set(
        found.flat()
    )
    assert [f.file for f in found.figures] == ["density.png", "temperatures.png"]
    assert found.metrics["nll_nats"].floor == pytest.approx(target.entropy())
    gap, error = found.metrics["reverse_kl_nats"].value, found.metrics["reverse_kl_nats"].error
    assert gap is not None
    assert error is not None
    axis = torch.linspace(-14, 14, 701)
    with torch.no_grad():
        x = torch.cartesian_prod(axis, axis)
        log_q = model.log_prob(x).double()
    mass = log_q.exp() * (axis[1] - axis[0]).item() ** 2
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)  # the sheet holds all but the tails
    expected = (mass * (log_q + target.energy(x.double()))).sum().item() + target.log_z()
    assert gap == pytest.approx(expected, abs=4 * error + 0.01 * gap)  # and what the tails' energy adds
