"""pPCA against scikit-learn, against brute-force Gaussian algebra, and EM against the closed form."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.latent.ppca import PPCA

D, Q = 6, 2
SPEC = DataSpec("vector", (D,), None)


def data(n: int = 400) -> Tensor:
    """Correlated, far from the origin."""
    return torch.randn(n, D, dtype=torch.float64) @ torch.randn(D, D, dtype=torch.float64) + 100


def fitted(x: Tensor, rounds: int = 1, batch: int = 150, fit: str = "closed_form", latents: int = Q) -> PPCA:
    model = PPCA(PPCA.Config(latents=latents, fit=fit), DataSpec("vector", x.shape[1:], None)).double().train()  # type: ignore[arg-type]
    model.enter(fit, iter(Batch(part) for part in x.split(batch)))
    for step in range(rounds):
        model.after(fit, Clock(step, rounds))
    return model.eval()


@pytest.mark.parametrize("latents", [1, 3, 5])
def test_likelihood_is_scikit_learns(latents):
    x = data()
    pca = PCA(latents).fit(x.numpy())
    # scikit-learn divides the covariance by n − 1; maximum likelihood divides by n.
    rescaled = x.mean(0) + (x - x.mean(0)) * (len(x) / (len(x) - 1)) ** 0.5
    model = fitted(rescaled, latents=latents)
    held_out = data(50)
    assert model.log_prob(held_out).mean().item() == pytest.approx(pca.score(held_out.numpy()), rel=1e-6)
    assert torch.allclose(model.log_prob(held_out), torch.from_numpy(pca.score_samples(held_out.numpy())), rtol=1e-6)


def test_likelihood_is_that_of_the_marginal_gaussian():
    model = fitted(data())
    covariance = model.weight @ model.weight.T + model.log_variance.exp() * torch.eye(D, dtype=torch.float64)
    x = data(20)
    expected = torch.distributions.MultivariateNormal(model.mean, covariance).log_prob(x)
    assert torch.allclose(model.log_prob(x), expected, rtol=1e-9)


def test_posterior_is_gaussian_conditioning_of_the_joint():
    model = fitted(data())
    W, eye = model.weight, torch.eye(Q, dtype=torch.float64)
    C = W @ W.T + model.log_variance.exp() * torch.eye(D, dtype=torch.float64)
    x = data(5)
    gain = W.T @ torch.linalg.inv(C)  # Σ_zx Σ_xx⁻¹ of the joint covariance [[I, Wᵀ], [W, C]]
    posterior = model.posterior(x)
    assert torch.allclose(posterior.mean, (x - model.mean) @ gain.T, atol=1e-9)
    covariance = eye - gain @ W
    assert torch.allclose(posterior.covariance_matrix, covariance.expand(5, Q, Q), atol=1e-9)  # type: ignore[attr-defined]
    marginal = torch.distributions.Normal(posterior.mean, covariance.diagonal().sqrt())
    expected = torch.distributions.kl_divergence(marginal, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(model.kl(x), expected, atol=1e-9)


def test_em_climbs_to_the_closed_form():
    x = data()
    best = fitted(x).log_prob(x).mean()
    climbs = [fitted_em.log_prob(x).mean() for fitted_em in _em(x, 300)]
    assert all(b >= a - 1e-10 for a, b in itertools.pairwise(climbs))
    assert climbs[0] < best - 0.1
    assert abs(climbs[-1] - best) < 1e-6


def _em(x: Tensor, rounds: int):
    model = PPCA(PPCA.Config(latents=Q, fit="em"), SPEC).double().train()
    model.enter("em", iter([Batch(x)]))
    yield model
    for step in range(rounds):
        model.after("em", Clock(step, rounds))
        yield model


def test_a_round_of_em_is_the_papers_sums_over_examples():
    """Equations 27 and 28, from the posterior of every example."""
    x = data()
    model = fitted(x, rounds=0, fit="em")
    posterior, u = model.posterior(x), x - model.mean
    z = posterior.mean
    zz = posterior.covariance_matrix + z[:, :, None] * z[:, None]  # type: ignore[attr-defined]
    W = torch.einsum("ni,nj->ij", u, z) @ torch.linalg.inv(zz.sum(0))
    reconstruction = 2 * (z @ W.T * u).sum() - torch.einsum("nij,ij->", zz, W.T @ W)
    model.after("em", Clock(0, 1))
    assert torch.allclose(model.weight, W, rtol=1e-8)
    assert torch.allclose(model.log_variance.exp(), (u.square().sum() - reconstruction) / x.numel(), rtol=1e-8)


def test_em_and_closed_form_span_the_same_subspace():
    x = data()
    W = torch.linalg.qr(fitted(x).weight).Q
    E = torch.linalg.qr(fitted(x, rounds=500, fit="em").weight).Q
    assert torch.allclose(W @ W.T, E @ E.T, atol=1e-6)


@pytest.mark.parametrize("batch", [400, 64, 1])
def test_moments_stream(batch):
    x = data()
    model = fitted(x, batch=batch, fit="em", rounds=0)
    assert torch.allclose(model.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(model.covariance, torch.cov(x.T, correction=0), atol=1e-9)


def test_moments_do_not_cancel_far_from_the_origin():
    x = torch.randn(1000, D, dtype=torch.float64)
    near, far = fitted(x, fit="em", rounds=0), fitted(x + 1e7, fit="em", rounds=0)
    # x + 1e7 rounds x to 1e-9; squaring it without a shift would leave 1e14 · 1e-16 = 0.01.
    assert torch.allclose(near.covariance, far.covariance, atol=1e-7)


def test_samples_have_the_models_moments():
    model = fitted(data())
    x = model.sample(200_000)
    covariance = model.weight @ model.weight.T + model.log_variance.exp() * torch.eye(D, dtype=torch.float64)
    scale = covariance.diagonal().max()
    # Standard errors are below scale · √(2 / 200,000) = 0.0032 scale.
    assert torch.allclose(torch.cov(x.T), covariance, atol=0.02 * scale.item())
    assert torch.allclose(x.mean(0), model.mean, atol=6 * (scale / 200_000).sqrt().item())


def test_what_it_refuses():
    with pytest.raises(DataMismatch, match="real-valued"):
        PPCA(PPCA.Config(), DataSpec("vector", (20,), 2))
    with pytest.raises(DataMismatch, match="fewer latents"):
        PPCA(PPCA.Config(latents=6), SPEC)
    with pytest.raises(DataMismatch, match="at least one training example"):
        PPCA(PPCA.Config(latents=2), SPEC).enter("closed_form", iter([]))
