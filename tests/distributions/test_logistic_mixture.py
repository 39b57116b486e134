"""Mixtures of discretised logistics: against the formulas, by enumeration, and far outside the comfortable range."""

import itertools

import pytest
import torch

from dgm_core.distributions.logistic_mixture import LogisticMixture

SHAPES = [(2, 1), (7, 1), (256, 1), (2, 2), (5, 2), (256, 2), (2, 3), (16, 3), (256, 3), (3, 4)]
shapes = pytest.mark.parametrize(("levels", "channels"), SHAPES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def theta_of(mixture, n, spread):
    return spread * torch.randn(n, mixture.params, dtype=torch.float64)


@shapes
# At 1000 scales are from the floor, where a bin is up to 2,000 of them wide, to where 1 − e^{−w/s} is 0 in float64.
@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_masses_sum_to_one_over_the_levels_of_each_channel_given_the_earlier_ones(levels, channels, spread):
    mixture = LogisticMixture(levels, channels, 5)
    theta = theta_of(mixture, 20, spread)
    x = torch.randint(levels, (20, channels))
    for c in range(channels):
        total = mixture.log_masses(theta, x, c).exp().sum(1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)  # float64 rounding × levels


@pytest.mark.parametrize(("levels", "channels"), [(16, 2), (5, 3), (3, 4)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_probabilities_of_all_pixels_sum_to_one(levels, channels, spread):
    mixture = LogisticMixture(levels, channels, 3)
    pixels = torch.tensor(list(itertools.product(range(levels), repeat=channels)))
    for theta in theta_of(mixture, 5, spread):
        total = mixture.log_prob(pixels, theta.expand(len(pixels), -1)).exp().sum().item()
        assert abs(total - 1) <= 1e-12  # float64 rounding of 256 terms at most


@shapes
def test_a_pixel_is_the_product_of_its_channels_given_the_earlier_ones(levels, channels):
    mixture = LogisticMixture(levels, channels, 4)
    theta, x = theta_of(mixture, 20, 3.0), torch.randint(levels, (20, channels))
    each = [mixture.log_masses(theta, x, c).gather(1, x[:, c, None])[:, 0] for c in range(channels)]
    # float64 rounding of logarithms that reach a few thousand.
    torch.testing.assert_close(sum(each), mixture.log_prob(x, theta), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [4, 256])
def test_it_is_the_mixture_of_the_paper(levels):
    """Equations 2 and 3 written down for three channels, term by term."""
    K = 4
    mixture = LogisticMixture(levels, 3, K)
    theta, x = theta_of(mixture, 30, 1.0), torch.randint(levels, (30, 3))
    logits, rest = theta[:, :K], theta[:, K:]
    mean, log_scale = rest[:, : 3 * K].view(-1, 3, K), rest[:, 3 * K : 6 * K].view(-1, 3, K)
    alpha, beta, gamma = rest[:, 6 * K :].view(-1, 3, K).tanh().unbind(1)
    r, g, b = (2 * x.double() / (levels - 1) - 1).unbind(1)
    means = [mean[:, 0], mean[:, 1] + alpha * r[:, None], mean[:, 2] + beta * r[:, None] + gamma * g[:, None]]
    product = torch.ones(30, K, dtype=torch.float64)
    for c, value in enumerate((r, g, b)):
        upper = value + 1 / (levels - 1)
        lower = value - 1 / (levels - 1)
        upper = torch.where(x[:, c] == levels - 1, torch.inf, upper)[:, None]
        lower = torch.where(x[:, c] == 0, -torch.inf, lower)[:, None]
        scale = log_scale[:, c].exp()
        product = product * (((upper - means[c]) / scale).sigmoid() - ((lower - means[c]) / scale).sigmoid())
    expected = (logits.softmax(1) * product).sum(1).log()
    # The differences of sigmoids written down here cancel: masses of 1e-3 and less from numbers of size one.
    torch.testing.assert_close(mixture.log_prob(x, theta), expected, rtol=1e-9, atol=1e-9)


def test_log_scales_are_bounded_below():
    mixture = LogisticMixture(256, 1, 1)
    bounded = mixture.log_prob(torch.tensor([[100]]), torch.tensor([[0.0, -0.2, -7.0]]))
    assert torch.equal(mixture.log_prob(torch.tensor([[100]]), torch.tensor([[0.0, -0.2, -80.0]])), bounded)


EXTREMES = list(itertools.product((-1e4, 0.0, 1e4), (-1e4, -7.0, 0.0, 14.0, 60.0, 1e3), (-100.0, 100.0)))


@pytest.mark.parametrize("levels", [2, 256])
def test_values_and_gradients_are_finite_and_right_in_single_precision_however_far_out(levels):
    mixture = LogisticMixture(levels, 2, 1)
    theta = torch.tensor([[0.0, mean, mean, scale, scale, a] for mean, scale, a in EXTREMES])
    for x in itertools.product((0, levels // 2, levels - 1), repeat=2):
        x = torch.tensor(x).expand(len(theta), 2)
        at = theta.clone().requires_grad_()
        log_prob = mixture.log_prob(x, at)
        (gradient,) = torch.autograd.grad(log_prob.sum(), at)
        assert gradient.isfinite().all()
        # Single precision: 1e-7 of edges of size 1 and of distances of 1e4, measured in scales of e^{-7}.
        exact = mixture.log_prob(x, theta.double())
        torch.testing.assert_close(log_prob.double(), exact, rtol=1e-5, atol=2e-4)


def test_gradients_are_the_derivatives():
    mixture = LogisticMixture(6, 3, 2)
    x = torch.randint(6, (8, 3))
    # Wide components included, for which 1 − e^{−w/s} is taken from its series.
    theta = torch.cat([theta_of(mixture, 4, 1.0), theta_of(mixture, 4, 1.0)])
    theta[4:, 2 + 6 : 2 + 12] += 12
    assert torch.autograd.gradcheck(lambda t: mixture.log_prob(x, t), theta.requires_grad_())


def test_pixels_of_a_grid_are_treated_alike_and_half_precision_is_promoted():
    mixture = LogisticMixture(9, 3, 2)
    theta, x = torch.randn(2, mixture.params, 4, 5), torch.randint(9, (2, 3, 4, 5))
    whole = mixture.log_prob(x, theta)
    assert whole.shape == (2, 4, 5)
    torch.testing.assert_close(whole[:, 1, 3], mixture.log_prob(x[:, :, 1, 3], theta[:, :, 1, 3]))
    assert mixture.log_prob(x, theta.bfloat16()).dtype == torch.float32
    assert mixture.log_prob(x, theta.double()).dtype == torch.float64
