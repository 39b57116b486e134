"""Every observation model against enumeration, quadrature and its own draws."""

from __future__ import annotations

import math

import pytest
import torch

from dgm_core.contract import DataSpec
from dgm_core.distributions.bernoulli import Bernoulli
from dgm_core.distributions.categorical import Categorical
from dgm_core.distributions.discretised_logistic import DiscretisedLogistic
from dgm_core.distributions.gaussian import Gaussian, kl_to_standard_normal, log_normal
from dgm_core.distributions.observation import from_network, to_network, to_stored

DISCRETE = [
    (Bernoulli(), 2),
    (Categorical(2), 2),
    (Categorical(7), 7),
    (DiscretisedLogistic(2), 2),
    (DiscretisedLogistic(7), 7),
    (DiscretisedLogistic(256), 256),
    (DiscretisedLogistic(1000), 1000),
]


def table(observation, levels, theta):
    """(B, levels): log p of every level."""
    every = torch.arange(levels).expand(theta.shape[0], levels)
    return observation.log_prob(every, theta[:, None].expand(-1, levels, -1))


@pytest.mark.parametrize(("observation", "levels"), DISCRETE)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_sums_to_one_over_its_levels(observation, levels, spread):
    torch.manual_seed(0)
    theta = spread * torch.randn(50, observation.params, dtype=torch.float64)
    total = table(observation, levels, theta).exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-11)  # float64 rounding × levels


@pytest.mark.parametrize(("observation", "levels"), DISCRETE)
def test_mean_is_the_expectation(observation, levels):
    torch.manual_seed(1)
    theta = 2 * torch.randn(20, observation.params, dtype=torch.float64)
    expected = table(observation, levels, theta).exp() @ torch.arange(levels, dtype=torch.float64)
    torch.testing.assert_close(observation.mean(theta), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("observation", "levels"), DISCRETE[:5])
def test_draws_have_the_stated_frequencies(observation, levels):
    torch.manual_seed(2)
    n = 40_000
    theta = torch.randn(1, observation.params, dtype=torch.float64)
    p = table(observation, levels, theta).exp()[0]
    draws = observation.sample(theta.expand(n, -1))
    assert draws.dtype == torch.uint8
    found = torch.bincount(draws.long(), minlength=levels) / n
    # Five standard errors of a binomial share: one level in a million would stray further by chance.
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()


def test_discretised_logistic_is_the_integral_of_the_logistic_over_the_bins():
    """Not only normalised: each inner level has the mass between its edges, each outer one its tail's."""
    observation, levels = DiscretisedLogistic(5), 5
    theta = torch.tensor([[0.3 / (1 + math.exp(-0.7)), -0.7]], dtype=torch.float64)
    edges = torch.tensor([-math.inf, -0.75, -0.25, 0.25, 0.75, math.inf], dtype=torch.float64)
    cdf = torch.sigmoid((edges - 0.3) / math.exp(-0.7))
    # The smooth lower bound shifts log s by less than e^{-6}.
    torch.testing.assert_close(table(observation, levels, theta).exp()[0], cdf.diff(), rtol=2e-2, atol=0)
    exact = DiscretisedLogistic(5, floor=-60.0)  # whose shift is below rounding
    torch.testing.assert_close(table(exact, levels, theta).exp()[0], cdf.diff(), rtol=1e-12, atol=0)


def test_discretised_logistic_does_not_underflow_far_from_the_data():
    observation = DiscretisedLogistic(256)
    theta = torch.tensor([[40.0, -20.0]], requires_grad=True)  # float32, tens of thousands of scales away
    log_prob = observation.log_prob(torch.tensor([3]), theta)
    (gradient,) = torch.autograd.grad(log_prob.sum(), theta)
    assert log_prob.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[0, 0] < 0  # the mean is pulled towards the data


@pytest.mark.parametrize("variance", ["network", "shared"])
def test_gaussian_integrates_to_one_and_draws_what_it_says(variance):
    torch.manual_seed(3)
    observation = Gaussian(variance).double()
    if observation.log_variance is not None:
        observation.log_variance.data.fill_(-0.8)
    theta = torch.tensor([0.4, -0.8], dtype=torch.float64)[: observation.params]
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = observation.log_prob(grid, theta.expand(len(grid), -1)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-10)
    mean = torch.trapezoid(density * grid, grid)
    variance_ = torch.trapezoid(density * (grid - mean) ** 2, grid)
    assert mean.item() == pytest.approx(observation.mean(theta).item(), abs=1e-9)
    n = 40_000
    draws = observation.sample(theta.expand(n, -1)).double()
    sd = math.sqrt(variance_.item())
    assert abs(draws.mean().item() - mean.item()) < 5 * sd / math.sqrt(n)
    assert draws.var().item() == pytest.approx(sd**2, rel=5 * math.sqrt(2 / n))


def test_gaussian_variance_has_a_floor():
    observation = Gaussian("network", floor=-6.0)
    theta = torch.tensor([[0.0, -1e4]], dtype=torch.float64)
    peak = -0.5 * (math.log(2 * math.pi) - 6.0)
    assert observation.log_prob(torch.zeros(1, dtype=torch.float64), theta).item() == pytest.approx(peak, abs=1e-12)


def test_kl_closed_form_against_monte_carlo():
    torch.manual_seed(4)
    mean = torch.randn(6, dtype=torch.float64)
    log_variance = torch.randn(6, dtype=torch.float64)
    n = 200_000
    z = mean + (0.5 * log_variance).exp() * torch.randn(n, 6, dtype=torch.float64)
    ratio = log_normal(z, mean, log_variance) - log_normal(z, 0.0, 0.0)
    error = (kl_to_standard_normal(mean, log_variance) - ratio.mean(0)).abs()
    assert (error < 5 * ratio.std(0) / math.sqrt(n)).all()


def test_leading_axes_broadcast():
    """θ of several latent draws against one x gives what a loop over the draws gives."""
    torch.manual_seed(5)
    for observation, levels in DISCRETE:
        theta = torch.randn(3, 4, 2, 2, observation.params, dtype=torch.float64)
        x = torch.randint(levels, (3, 2, 2))
        looped = torch.stack([observation.log_prob(x, theta[:, k]) for k in range(4)], 1)
        torch.testing.assert_close(observation.log_prob(x[:, None], theta), looped)


def test_bf16_is_promoted_and_float64_left_alone():
    for observation, _ in DISCRETE:
        theta = torch.zeros(2, observation.params, dtype=torch.bfloat16)
        x = torch.zeros(2, dtype=torch.uint8)
        assert observation.log_prob(x, theta).dtype == torch.float32
        assert observation.log_prob(x, theta.double()).dtype == torch.float64


@pytest.mark.parametrize("levels", [2, 16, 256, 4096])
def test_network_units_and_back(levels):
    data = DataSpec("vector", (levels,), levels)
    x = torch.arange(levels).to(data.dtype)
    scaled = to_network(x, data, torch.float64)
    assert scaled.min() == -1
    assert scaled.max() == 1
    back = to_stored(from_network(scaled, data), data)
    assert back.dtype == data.dtype
    assert torch.equal(back, x)
    assert torch.equal(to_stored(from_network(scaled * 9, data), data).unique().sort().values[[0, -1]], x[[0, -1]])
