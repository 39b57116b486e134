"""Measures of disentanglement, on latents of which it is known what they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_core.evaluation.disentanglement import beta_vae_metric, mutual_information_gap

COUNTS = (4, 3, 5)


def combinations() -> Tensor:
    return torch.cartesian_prod(*(torch.arange(c) for c in COUNTS))


def turned(values: Tensor) -> Tensor:
    """The same, seen along axes each of which mixes all of them alike, but for the sign."""
    h = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    return values @ h[:, : values.shape[1]].T


def standard(factors: Tensor) -> Tensor:
    values = factors.double()
    return (values - values.mean(0)) / values.std(0)


def test_a_latent_for_each_factor_has_the_whole_gap():
    """Told apart by forty standard deviations, a latent knows its factor; of the others it knows nothing."""
    factors = combinations()
    mean = torch.cat([40.0 * factors[:, [2, 0, 1]].double(), torch.zeros(len(factors), 1)], 1)
    found = mutual_information_gap(mean, torch.ones_like(mean), factors)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for k, (latent, count) in enumerate(zip((1, 2, 0), COUNTS, strict=True)):
        expected[k, latent] = math.log(count)
    # Of every combination once the factors are independent, and so are the mixtures: exact up to e^(−40² / 8).
    torch.testing.assert_close(found.information, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.entropy, torch.tensor(COUNTS, dtype=torch.float64).log())
    assert found.gap == pytest.approx(1.0)


def test_the_information_of_blurred_values_is_the_integrals():
    """I(z; v) of two values two standard deviations apart, by quadrature."""
    factors = torch.arange(2).repeat_interleave(8000)[:, None]
    mean = 2.0 * factors.double()
    grid = torch.linspace(-10, 12, 4001, dtype=torch.float64)
    parts = torch.stack([torch.distributions.Normal(m, 1.0).log_prob(grid) for m in (0.0, 2.0)])
    whole = parts.exp().mean(0)
    step = (grid[1] - grid[0]).item()
    exact = (parts.exp() * (parts - whole.log())).mean(0).sum().item() * step
    torch.manual_seed(0)
    subset = slice(None, None, 8)  # the mixtures do not depend on how many examples have the same posterior
    found = mutual_information_gap(mean[subset], torch.ones_like(mean[subset]), factors[subset])
    # Draws of log q(z | v) − log q(z) scatter by less than 1: five errors of the mean of 2,000.
    assert found.information.item() == pytest.approx(exact, abs=5 / math.sqrt(2000))
    assert found.gap == pytest.approx(exact / math.log(2), abs=5 / math.sqrt(2000) / math.log(2))


def test_mixed_latents_have_a_small_gap_and_silent_ones_none():
    factors = combinations()
    mean = turned(40 * standard(factors))
    assert mutual_information_gap(mean, torch.ones_like(mean), factors).gap < 0.5
    silent = torch.zeros(len(factors), 3)
    assert mutual_information_gap(silent, torch.ones_like(silent), factors).gap == pytest.approx(0, abs=1e-12)


def test_chunks_change_nothing():
    factors = combinations()
    mean, sd = turned(standard(factors)), torch.full((60, 4), 0.5)
    gaps = []
    for chunk in (7, 60):
        torch.manual_seed(0)
        gaps.append(mutual_information_gap(mean, sd, factors, chunk=chunk).gap)
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-12)


def test_the_metric_is_one_where_each_factor_has_a_latent_of_its_own():
    own = standard(combinations())
    assert beta_vae_metric(own, COUNTS) == 1.0
    assert beta_vae_metric(torch.cat([-3 * own, torch.zeros(60, 2)], 1), COUNTS) == 1.0  # unused latents do no harm


def test_the_metric_is_a_guess_where_latents_say_nothing():
    # 1,000 points: a guess among three is right a third of the time, give or take 0.015.
    assert beta_vae_metric(torch.zeros(60, 3), COUNTS) == pytest.approx(1 / 3, abs=0.075)
    assert beta_vae_metric(torch.randn(60, 1), COUNTS) < 0.7  # a single latent cannot tell three factors


def test_fewer_pairs_tell_mixed_latents_less_well_than_separate_ones():
    own = standard(combinations())
    mixed = turned(own)[:, :1]  # the sum alone
    assert beta_vae_metric(mixed, COUNTS, pairs=5) < 0.6 < beta_vae_metric(own, COUNTS, pairs=5)


def test_factors_of_one_value_are_none():
    counts = (1, 4, 5)
    values = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    assert beta_vae_metric(standard(values), counts) == 1.0  # among two, not three
    with pytest.raises(ValueError, match="fewer than two"):
        beta_vae_metric(torch.zeros(4, 2), (1, 4, 1))
    with pytest.raises(ValueError, match="60 combinations"):
        beta_vae_metric(torch.zeros(59, 2), COUNTS)
