"""Bounds on a linear-Gaussian model, where log p(x) and the posterior are known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from dgm_core.distributions.gaussian import kl_to_standard_normal, log_normal
from dgm_core.objectives.elbo import elbo, free_bits, kl_weight
from dgm_core.objectives.iwae import iwae

W, S2, X = 1.3, 0.4, torch.tensor(1.7, dtype=torch.float64)  # x ~ N(W z, S2), z ~ N(0, 1)
EXACT = log_normal(X, 0.0, math.log(W**2 + S2)).item()
POSTERIOR = (W * X.item() / (W**2 + S2), S2 / (W**2 + S2))


def log_weights(mean: float, variance: float, rows: int, samples: int) -> torch.Tensor:
    z = mean + math.sqrt(variance) * torch.randn(rows, samples, dtype=torch.float64)
    joint = log_normal(X, W * z, math.log(S2)) + log_normal(z, 0.0, 0.0)
    return joint - log_normal(z, mean, math.log(variance))


def test_at_the_exact_posterior_every_bound_is_log_p():
    """The weights are constant there: a test of every term, without sampling error."""
    for samples in (1, 3, 50):
        bound = iwae(log_weights(*POSTERIOR, rows=4, samples=samples))
        torch.testing.assert_close(bound, torch.full_like(bound, EXACT), rtol=1e-12, atol=0)


def test_iwae_rises_with_samples_up_to_log_p():
    torch.manual_seed(0)
    means, errors = [], []
    for samples in (1, 2, 8, 64):
        bound = iwae(log_weights(0.2, 0.8, rows=20_000, samples=samples))
        means.append(bound.mean().item())
        errors.append(bound.std().item() / math.sqrt(len(bound)))
    for (low, high), (e1, e2) in zip(pairwise(means), pairwise(errors), strict=True):
        assert high - low > 4 * math.hypot(e1, e2)  # each gain is far outside the sampling error here
    assert means[-1] < EXACT + 4 * errors[-1]
    assert EXACT - means[-1] < 0.05  # and it closes: the gap at K = 1 is above 1 nat
    assert EXACT - means[0] > 1


def test_elbo_is_log_p_minus_the_posterior_gap():
    """ELBO = log p(x) − KL(q ‖ p(z | x)), both sides in closed form."""
    m, v = torch.tensor([0.2], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    expected_log_likelihood = log_normal(X, W * m, math.log(S2)) - 0.5 * W**2 * v / S2
    bound = elbo(expected_log_likelihood, kl_to_standard_normal(m, v.log())[:, None])
    pm, pv = POSTERIOR
    gap = 0.5 * (v / pv + (m - pm) ** 2 / pv - 1 - (v / pv).log())
    torch.testing.assert_close(bound, EXACT - gap, rtol=1e-12, atol=0)


def test_iwae_gradient_weighs_the_samples():
    """∇ = Σ_k w̃_k ∇ log w_k with normalised weights (Burda et al., eq. 13)."""
    torch.manual_seed(1)
    log_w = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(iwae(log_w).sum(), log_w)
    torch.testing.assert_close(gradient, log_w.detach().softmax(1), rtol=1e-12, atol=0)


def test_free_bits_floor_the_mean_of_the_batch():
    kl = torch.tensor([[0.1, 2.0], [0.5, 4.0]], dtype=torch.float64, requires_grad=True)
    value = free_bits(kl, 1.0)
    assert value.item() == pytest.approx(1.0 + 3.0)  # the first latent's mean, 0.3, counts as 1; the second's is 3
    (gradient,) = torch.autograd.grad(value, kl)
    assert gradient.tolist() == [[0.0, 0.5], [0.0, 0.5]]  # no reward for going further down


def test_kl_weight():
    assert kl_weight(0.0, 0.0) == 1
    assert [kl_weight(p, 0.5) for p in (0.0, 0.25, 0.5, 0.9)] == [0, 0.5, 1, 1]
