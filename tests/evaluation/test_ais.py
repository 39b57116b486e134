"""Annealed importance sampling, both ways, against log Z by enumeration."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from dgm_core.contract import DataSpec
from dgm_core.evaluation.ais import _average, ais, model_states, raise_log_prob, reverse_ais, temperatures
from dgm_core.models.boltzmann.rbm import RBM
from dgm_core.nn.rbm import all_states

V, H = 6, 4


def states(units: int) -> Tensor:
    return torch.cat(list(all_states(units, torch.device("cpu")))).double()


def binary(scale: float = 1.0) -> RBM:
    """Offsets and base rates off centre, so that no term vanishes."""
    model = RBM(RBM.Config(hidden=H), DataSpec("vector", (V,), 2)).double().eval()
    with torch.no_grad():
        model.base_mean.uniform_(0.1, 0.9)
        model.layer.visible_offset.uniform_()
        model.layer.hidden_offset.uniform_()
        for p in model.parameters():
            p.normal_(0, scale)
    return model


def real() -> RBM:
    model = RBM(RBM.Config(hidden=3, negative="cd"), DataSpec("vector", (2,), None)).double().eval()
    with torch.no_grad():
        model.scale.fill_(3.0)
        for p in model.parameters():
            p.normal_()
    return model


def truth(model: RBM) -> float:
    log_z = model.exact_log_z()
    assert log_z is not None
    return log_z.item()


def exact_draws(model: RBM, n: int) -> Tensor:
    """Of the model, as chain states."""
    x = states(V)
    return model.chain_state(x[torch.multinomial(model.log_prob(x).exp(), n, replacement=True)])


def assert_mean_is(values: Tensor, expected: float) -> None:
    """Within five standard errors: a false alarm once in two million seeds."""
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - expected) < 5 * error
    assert error < 0.05 * abs(expected)  # the test has the power to fail


def test_the_default_schedule_is_salakhutdinov_and_murrays():
    betas = temperatures()
    assert len(betas) == 14_500
    assert [int((betas <= b).sum()) for b in (0.5, 0.9, 1.0)] == [500, 4_500, 14_500]


@pytest.mark.parametrize("schedule", ["piecewise", "linear", "geometric"])
@pytest.mark.parametrize("count", [2, 3, 10, 1000])
def test_schedules_rise_from_base_to_model(schedule, count):
    betas = temperatures(count, schedule)
    assert len(betas) == count
    assert betas[0] == 0.0
    assert betas[-1] == 1.0
    assert (betas.diff() > 0).all()


def test_the_ends_of_the_annealing_path_are_the_base_rates_and_the_model():
    model = binary()
    x = states(V)
    base, end = model.annealed(0.0), model.annealed(1.0)
    assert torch.allclose(end.free_energy(model.chain_state(x)), model.free_energy(x), atol=1e-10)
    log_f = -base.free_energy(model.chain_state(x))
    assert torch.allclose(model.base_log_z(), torch.logsumexp(log_f, 0), atol=1e-10)
    rates = torch.distributions.Bernoulli(model.base_mean).log_prob(x).sum(1)
    assert torch.allclose(log_f - model.base_log_z(), rates, atol=1e-10)
    draws = model.base_sample(50_000)[:, :V]
    assert torch.allclose(draws.mean(0), model.base_mean, atol=5 * 0.5 / math.sqrt(50_000))


@pytest.mark.parametrize("make", [binary, real])
def test_an_intermediate_chain_is_an_rbm_with_interpolated_parameters(make):
    model, beta = make(), 0.3
    chain = model.annealed(beta)
    layer = copy.deepcopy(model.layer)
    with torch.no_grad():
        layer.weight.mul_(beta)
        layer.hidden_bias.mul_(beta)
        layer.visible_bias.lerp_(layer.bias_for(model.base_mean), 1 - beta)
        v = model.base_sample(50)[:, : layer.weight.shape[0]]
        assert torch.allclose(chain.free_energy(model.layer.chain_state(v)), layer.free_energy(v), atol=1e-10)
        torch.manual_seed(1)
        moved = chain.gibbs(model.layer.chain_state(v))
        torch.manual_seed(1)
        expected = layer.gibbs(v)
    assert torch.allclose(moved, model.layer.chain_state(expected), atol=1e-10)


@pytest.mark.parametrize("make", [binary, real])
def test_both_estimates_are_near_the_truth(make):
    model = make()
    betas = temperatures(500, "linear")
    forward = ais(model, chains=200, betas=betas)
    backward = reverse_ais(model, model_states(model, forward, burn_in=200), betas=betas)
    for estimate in (forward, backward):
        assert estimate.low <= estimate.log_z <= estimate.high
        assert abs(estimate.log_z - truth(model)) < 0.1
        assert estimate.effective > 100


@pytest.mark.parametrize("make", [binary, real])
def test_forward_weights_are_unbiased_on_a_coarse_ladder(make):
    model = make()
    found = ais(model, chains=20_000, betas=[0.0, 0.4, 0.7, 1.0])
    assert_mean_is((found.log_weights - truth(model)).exp(), 1.0)


def test_reciprocals_of_reverse_weights_are_unbiased_from_exact_draws():
    model = binary()
    found = reverse_ais(model, exact_draws(model, 20_000), betas=[0.0, 0.4, 0.7, 1.0])
    assert_mean_is((truth(model) - found.log_weights).exp(), 1.0)


def test_the_truth_lies_between_on_average():
    model = binary(1.5)
    betas = temperatures(8, "linear")
    forward = ais(model, chains=5_000, betas=betas).log_weights
    backward = reverse_ais(model, exact_draws(model, 5_000), betas=betas).log_weights
    margin = [5 * w.std().item() / math.sqrt(5_000) for w in (forward, backward)]
    assert forward.mean() + margin[0] < truth(model) < backward.mean() - margin[1]


def test_raise_is_an_unbiased_probability_of_what_annealing_generates():
    model = binary()
    x, runs = states(V), 4_000
    found = raise_log_prob(model, x, model.chain_state(x), chains=runs, betas=[0.0, 0.3, 0.6, 1.0])
    assert abs(found.exp().sum() - 1) < 0.02  # 256,000 runs in all, weights of order one
    # The generator itself: base draws through the same transitions.
    with torch.no_grad():
        n = 100_000
        state = model.base_sample(n)
        for beta in (0.3, 0.6, 1.0):
            state = model.annealed(beta).gibbs(state)
    code = (state[:, :V].long() << torch.arange(V)).sum(1)
    generated = torch.bincount(code, minlength=2**V).double() / n
    # Total variation of 100,000 draws from their distribution over 64 states is about ½ √(2·64 / π·100,000) = 0.01; the
    # estimates' own errors are as large.
    assert 0.5 * (generated - found.exp()).abs().sum() < 0.03
    model_itself = model.log_prob(x).exp()
    assert 0.5 * (generated - model_itself).abs().sum() > 0.03  # so coarse a ladder does not reach the model


def test_raise_is_conservative_and_tightens_with_the_ladder():
    model = binary(1.5)
    x = states(V)
    p = model.log_prob(x).exp()
    gaps = []
    for count, chains in ((2, 1), (400, 50)):
        found = raise_log_prob(model, x, model.chain_state(x), chains=chains, betas=temperatures(count, "linear"))
        gaps.append((p @ (model.log_prob(x) - found)).item())
    assert gaps[0] > 0.1
    assert abs(gaps[1]) < 0.02


def test_raise_is_a_density_of_the_stored_data():
    model = real()
    x = 3 * torch.randn(20, 2, dtype=torch.float64)
    found = raise_log_prob(model, x, model.chain_state(x), chains=50, betas=temperatures(1000, "linear"))
    assert (found - model.log_prob(x)).abs().mean() < 0.1  # an error in the scale's log-determinant would be 2 log 3


def test_resampled_ends_of_forward_chains_are_draws_of_the_model():
    model = binary()
    forward = ais(model, chains=4_000, betas=temperatures(20, "linear"))
    v = model_states(model, forward, burn_in=50)[:, :V]
    expected = model.log_prob(states(V)).exp() @ states(V)
    assert torch.allclose(v.mean(0), expected, atol=5 * 0.5 / math.sqrt(4_000))


def test_intervals_are_three_standard_errors_of_the_average_weight():
    log_weights = torch.tensor([9.0, 10.0, 11.0], dtype=torch.float64).log()
    ends = torch.zeros(3, 1)
    error = 3 * 1.0 / math.sqrt(3)
    found = _average(log_weights, ends, sign=1)
    expected = [math.log(value) for value in (10, 10 - error, 10 + error)]
    assert [found.log_z, found.low, found.high] == pytest.approx(expected)
    assert found.effective == pytest.approx(30**2 / (81 + 100 + 121))
    found = _average(-log_weights, ends, sign=-1)
    assert [found.log_z, found.high, found.low] == pytest.approx([-value for value in expected])


def test_an_interval_too_wide_for_the_estimate_is_open():
    log_weights = torch.tensor([1.0, 3.0], dtype=torch.float64).log()  # three standard errors are 3, the average 2
    assert _average(log_weights, torch.zeros(2, 1), sign=1).low == -math.inf
    assert _average(-log_weights, torch.zeros(2, 1), sign=-1).high == math.inf


@pytest.mark.parametrize("betas", [[0.0], [0.1, 1.0], [0.0, 0.9], [0.0, 0.5, 0.5, 1.0], [0.0, 0.7, 0.3, 1.0]])
def test_what_is_no_ladder_is_refused(betas):
    with pytest.raises(ValueError, match="rise strictly from 0"):
        ais(binary(), chains=2, betas=betas)


def test_single_precision_loses_nothing_that_matters():
    model = binary()
    betas = temperatures(2_000, "linear")
    found = ais(model.float(), chains=100, betas=betas).log_z
    assert abs(found - truth(model)) < 0.1
