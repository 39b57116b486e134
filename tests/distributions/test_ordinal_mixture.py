"""A mixture of logistics over levels: its masses by enumeration and quadrature, its draws against the inverse CDF."""

import math

import pytest
import torch

from dgm_core.distributions.ordinal_mixture import OrdinalMixture


def theta_of(mixture, n, spread=2.0):
    return spread * torch.randn(n, mixture.params, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("levels", "components"), [(2, 1), (3, 4), (256, 10), (1000, 3), (65_536, 10)])
def test_masses_sum_to_one(levels, components):
    mixture = OrdinalMixture(levels, components)
    # From components far wider than the range, whose mass lies at both ends, to those much narrower than a level.
    theta = torch.cat([theta_of(mixture, 3), theta_of(mixture, 3, 12.0)])
    x = torch.arange(levels)
    for row in theta:
        total = mixture.log_prob(x, row.expand(levels, -1)).exp().sum().item()
        assert abs(total - 1) <= 1e-10  # float64 rounding of up to 65,536 terms


def test_a_mass_is_the_density_integrated_over_its_bin():
    mixture = OrdinalMixture(16, 2)
    theta = torch.tensor([0.3, -0.2, -1.5, -0.4, 0.5, -0.7], dtype=torch.float64)
    logits, mean, log_scale = mixture._split(theta)
    z = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    deviation = (z[:, None] - mean) / log_scale.exp()
    density = (logits.softmax(0) / log_scale.exp() * deviation.sigmoid() * (-deviation).sigmoid()).sum(1)
    level = ((z + 1) * 15 / 2).round().clamp(0, 15).long()
    mass = torch.zeros(16, dtype=torch.float64).index_add(0, level, density) * (z[1] - z[0])
    exact = mixture.log_prob(torch.arange(16), theta.expand(16, -1)).exp()
    # A grid point at a bin's edge may fall to either side: an error of half a step's mass, 1e-4 × 1 at most.
    torch.testing.assert_close(mass, exact, rtol=0, atol=1e-4)


def test_narrow_components_keep_their_logarithm():
    """In single precision a difference of two sigmoids would be 0 here, and its logarithm −∞."""
    mixture = OrdinalMixture(65_536, 1)
    theta = torch.tensor([[0.0, -1.0, -3.0]])
    log_prob = mixture.log_prob(torch.tensor([60_000]), theta)
    exact = mixture.log_prob(torch.tensor([60_000]), theta.double())
    assert log_prob.isfinite().all()
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize(("levels", "components"), [(2, 3), (16, 3), (17, 3), (100, 1), (256, 10), (5000, 4)])
def test_draws_are_the_inverse_of_the_cumulative_masses(levels, components, temperature):
    mixture = OrdinalMixture(levels, components)
    for row in theta_of(mixture, 5):
        floor = mixture._split(torch.full_like(row, -1e9))[2][0]
        row[2::3] = floor + 2 + 6 * torch.rand(components)  # wide enough for the cooled ones to lie above it
        cooled = row.view(components, 3).clone()
        logits, _, log_scale = mixture._split(row)
        cooled[:, 0] = logits / temperature
        # What softplus makes log s + ln T, so that the cooled mixture's masses can be enumerated.
        cooled[:, 2] = floor + (log_scale + math.log(temperature) - floor).expm1().log()
        masses = mixture.log_prob(torch.arange(levels), cooled.flatten().expand(levels, -1)).exp()
        uniform = torch.rand(2000, dtype=torch.float64)
        exact = torch.searchsorted(masses.cumsum(0)[:-1], uniform, right=True)
        assert torch.equal(mixture.draw(row.expand(2000, -1), uniform, temperature), exact)


def test_the_smallest_and_largest_uniform_numbers_draw_levels():
    mixture = OrdinalMixture(300, 2)
    theta = torch.tensor([0.0, -50.0, 0.0, 0.0, 50.0, 0.0]).expand(2, -1)
    assert mixture.draw(theta, torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 299]


def test_a_start_covers_the_levels():
    mixture = OrdinalMixture(256, 10)
    masses = mixture.log_prob(torch.arange(256), mixture.first().expand(256, -1)).exp()
    assert masses.max().item() < 0.1  # the ends take what lies beyond them
    assert masses[1:-1].min().item() > 0.1 / 256
