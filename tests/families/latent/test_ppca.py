"""pPCA against scikit-learn, against brute-force Gaussian algebra, and EM against the closed form."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.data.batches import Stream, one_pass
from dgm_core.data.prepare import prepare
from dgm_core.data.shards import Split
from dgm_core.data.sources import parse
from dgm_core.models.latent.ppca import PPCA
from dgm_core.training.trainer import Trainer
from tests.contract import checks
from tests.support import Tensors

D, Q = 6, 2
SPEC = DataSpec("vector", (D,), None)
GAPS = DataSpec("vector", (D,), None, context={"observed": DataSpec("vector", (D,), 2)})


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


def test_half_precision_does_not_reach_the_algebra():
    x = data(50)
    model = fitted(x).float()
    expected, moments = model.log_prob(x.float()), model.posterior(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.log_prob(x.float()), expected)
        assert torch.equal(model.posterior(x.float()).variance, moments.variance)


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


def with_gaps(n: int = 300, gone: float = 0.3) -> Batch:
    """Rank-two data with noise, far from the origin; values are missing at random, and are nonsense where they are."""
    x = torch.randn(n, Q, dtype=torch.float64) @ torch.randn(Q, D, dtype=torch.float64)
    x = x + 0.3 * torch.randn(n, D, dtype=torch.float64) + 100
    observed = torch.rand(n, D) >= gone
    return Batch(torch.where(observed, x, -1e3), context={"observed": observed.to(torch.uint8)})


def of_gaps(batch: Batch, rounds: int = 0, **config: Any) -> PPCA:
    """Whole batches, and so EM itself, unless `forgetting` is given."""
    model = PPCA(PPCA.Config(**{"latents": Q, "fit": "em", "forgetting": 0.0, **config}), GAPS).double().train()
    model.enter("em", iter(batch.rows(slice(i, i + 70)) for i in range(0, len(batch.x), 70)))
    for step in range(rounds):
        em_round(model, batch, step)
    return model


def em_round(model: PPCA, batch: Batch, step: int = 0) -> float:
    loss = model.loss(batch, "em", Clock(step, 1000)).value.item()
    model.after("em", Clock(step, 1000))
    return -loss


def present(batch: Batch, row: int) -> tuple[Tensor, Tensor]:
    """Which coordinates of an example are there, and their values."""
    here = batch.context["observed"][row].nonzero().flatten()
    return here, batch.x[row, here]


def test_likelihood_and_posterior_are_those_of_the_observed_coordinates():
    """Of the joint Gaussian, by slicing its covariance; an example with nothing observed says nothing."""
    batch = with_gaps(20)
    batch.context["observed"][3] = 0
    model = of_gaps(with_gaps(), rounds=3).eval()
    W, eye = model.weight, torch.eye(D, dtype=torch.float64)
    C = W @ W.T + model.log_variance.exp() * eye
    log_prob = model.log_prob(batch.x, context=batch.context)
    posterior = model.posterior(batch.x, context=batch.context)
    kl = model.kl(batch.x, context=batch.context)
    for n in range(20):
        here, x = present(batch, n)
        marginal = C[here][:, here]
        gain = W[here].T @ torch.linalg.inv(marginal)
        covariance = torch.eye(Q, dtype=torch.float64) - gain @ W[here]
        mean = gain @ (x - model.mean[here])
        torch.testing.assert_close(posterior.mean[n], mean)
        torch.testing.assert_close(posterior.covariance_matrix[n], covariance)  # type: ignore[attr-defined]
        variance = covariance.diagonal()
        torch.testing.assert_close(kl[n], 0.5 * (variance + mean.square() - 1 - variance.log()))
        if len(here):
            expected = torch.distributions.MultivariateNormal(model.mean[here], marginal).log_prob(x)
            torch.testing.assert_close(log_prob[n], expected)
    assert log_prob[3].item() == pytest.approx(0, abs=1e-12)
    everything = {"observed": torch.ones(20, D)}
    torch.testing.assert_close(model.log_prob(batch.x, context=everything), model.log_prob(batch.x))


def test_a_round_with_gaps_is_the_sums_over_the_examples_that_have_a_coordinate():
    batch = with_gaps(60)
    model = of_gaps(batch, rounds=2)
    W, mu, variance = model.weight, model.mean, model.log_variance.exp()
    moments, A = [], torch.zeros(D, Q + 1, Q + 1, dtype=torch.float64)
    b = torch.zeros(D, Q + 1, dtype=torch.float64)
    for n in range(60):
        here, x = present(batch, n)
        M = W[here].T @ W[here] + variance * torch.eye(Q, dtype=torch.float64)
        m = torch.cat([torch.linalg.solve(M, W[here].T @ (x - mu[here])), torch.ones(1, dtype=torch.float64)])
        mm = m[:, None] * m
        mm[:Q, :Q] += variance * torch.linalg.inv(M)
        moments.append((m, mm))
        A[here] += mm
        b[here] += m * x[:, None]
    theta = torch.linalg.solve(A, b)
    gaps = [
        (x.square() - 2 * x * (theta[here] @ m) + torch.einsum("ip,pq,iq->i", theta[here], mm, theta[here])).sum()
        for n, (m, mm) in enumerate(moments)
        for here, x in [present(batch, n)]
    ]
    em_round(model, batch)
    # The sums above are not about the data's origin, 100: squares of 1e4 leave 1e-12 of a variance of 0.1.
    torch.testing.assert_close(model.weight, theta[:, :Q], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(model.mean, theta[:, Q], rtol=1e-10, atol=0)
    total = batch.context["observed"].sum()
    torch.testing.assert_close(model.log_variance.exp(), torch.stack(gaps).sum() / total, rtol=1e-7, atol=0)


def test_with_nothing_missing_it_is_the_papers_round_and_ends_at_the_closed_form():
    batch = with_gaps(gone=0.0)
    model, plain = of_gaps(batch), fitted(batch.x, rounds=0, fit="em")
    plain.weight, plain.log_variance = model.weight, model.log_variance
    for step in range(3):
        em_round(model, batch, step)
        plain.after("em", Clock(step, 3))
        torch.testing.assert_close(model.weight, plain.weight)
        torch.testing.assert_close(model.mean, plain.mean)
        torch.testing.assert_close(model.log_variance, plain.log_variance)
    for step in range(400):
        em_round(model, batch, step)
    best = fitted(batch.x).log_prob(batch.x).mean().item()
    # EM converges linearly: the 0.5 nats or more at the start shrink by 3 % a round.
    assert em_round(model, batch) == pytest.approx(best, abs=1e-6)


def test_em_with_gaps_climbs_to_where_the_gradient_vanishes():
    batch = with_gaps()
    model = of_gaps(batch)
    climbs = [em_round(model, batch, step) for step in range(600)]
    assert all(b >= a - 1e-10 for a, b in itertools.pairwise(climbs))
    assert climbs[-1] > climbs[0] + 0.5
    parameters = [model.weight, model.mean, model.log_variance]
    model.weight, model.mean, model.log_variance = (p.clone().requires_grad_() for p in parameters)
    climbed = model.eval().log_prob(batch.x, context=batch.context).mean()
    for gradient in torch.autograd.grad(climbed, [model.weight, model.mean, model.log_variance]):
        assert gradient.abs().max() < 1e-5  # at the start they are of order 1; they shrink linearly


def test_small_batches_come_near_to_the_whole():
    batch = with_gaps(600)
    best = of_gaps(batch, rounds=200).eval().log_prob(batch.x, context=batch.context).mean().item()
    model, data = of_gaps(batch, forgetting=0.6), Tensors(batch)
    for step in range(300):
        em_round(model, data.at(60 * step, 60), step)
    found = model.eval().log_prob(batch.x, context=batch.context).mean().item()
    # What batches leave: the last rounds' weights are of 300^-0.6 = 0.03, as if of some 30 batches. Of 0.01 nats or so.
    assert best - 0.05 < found <= best


def test_a_coordinate_that_no_batch_has_shown_yet_stays_where_it_is():
    batch = with_gaps(50)
    model = of_gaps(batch)
    before = model.weight[2].clone(), model.mean[2].clone()
    without = batch.context["observed"].clone()
    without[:, 2] = 0
    em_round(model, batch._replace(context={"observed": without}))
    torch.testing.assert_close(model.weight[2], before[0])
    torch.testing.assert_close(model.mean[2], before[1])
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_completion_draws_what_is_missing_given_what_is_there():
    model = of_gaps(with_gaps(), rounds=20).eval()
    x = model.sample(1).double()
    observed = torch.tensor([[1, 0, 1, 0, 0, 1]])
    n = 100_000
    drawn = model.complete(x.expand(n, D), observed.expand(n, D))
    here, gone = observed[0].nonzero().flatten(), (1 - observed[0]).nonzero().flatten()
    assert torch.equal(drawn[:, here], x[:, here].expand(n, 3))
    C = model.weight @ model.weight.T + model.log_variance.exp() * torch.eye(D, dtype=torch.float64)
    gain = C[gone][:, here] @ torch.linalg.inv(C[here][:, here])
    mean = model.mean[gone] + gain @ (x[0, here] - model.mean[here])
    covariance = C[gone][:, gone] - gain @ C[here][:, gone]
    # Six standard errors of a mean, and of a covariance: at most √2 · the greatest variance / √n.
    error = 6 / n**0.5
    torch.testing.assert_close(
        drawn[:, gone].mean(0), mean, rtol=0, atol=error * covariance.diagonal().max().item() ** 0.5
    )
    scatter = torch.cov(drawn[:, gone].T)
    torch.testing.assert_close(scatter, covariance, rtol=0, atol=1.5 * error * covariance.diagonal().max().item())


class FromShards:
    """A prepared data set's training split, as the trainer asks for it."""

    def __init__(self, split: Split) -> None:
        self.split, self.at = split, Stream(split, seed=0).at

    def one_pass(self, size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        return one_pass(self.split, size, rank=rank, world=world)


def test_a_table_with_gaps_is_learnt_as_if_by_its_own_density(tmp_path: Path):
    """From a CSV file to the likelihood of held-out lines, which nothing can beat by more than chance."""
    n, w = 1500, torch.tensor([[2.0], [-1.0], [0.5], [1.0]], dtype=torch.float64)
    x = torch.randn(n, 1, dtype=torch.float64) @ w.T + 0.5 * torch.randn(n, 4, dtype=torch.float64) + 3
    holed = torch.where(torch.rand(n, 4) < 0.75, x, torch.nan)
    lines = [",".join("" if v != v else repr(v) for v in row) for row in holed.tolist()]
    (tmp_path / "a.csv").write_text("a,b,c,d\n" + "\n".join(lines))
    source = {"source": "csv", "path": str(tmp_path / "a.csv"), "missing": "allow"}
    data = prepare(parse(source), tmp_path / "data", name="table")
    config, recipe = PPCA.defaults(data.spec)
    model = PPCA(config.merged({"latents": 1}), data.spec)
    recipe = recipe.merged({"steps": 60, "batch_size": 300, "precision": "fp64"})
    Trainer(model, recipe, FromShards(data.split("train"))).fit()
    test = next(one_pass(data.split("test"), n))
    truth = PPCA(config.merged({"latents": 1}), data.spec).double()
    truth.weight, truth.mean, truth.log_variance = w, torch.full((4,), 3.0).double(), torch.tensor(0.25).double().log()
    found, best = (m.eval().log_prob(test.x.double(), context=test.context).mean().item() for m in (model, truth))
    # Nine parameters from 1,200 examples: 9 / 2,400 nats are lost on average, and batches lose as much again.
    assert found == pytest.approx(best, abs=0.03)


@pytest.mark.parametrize("check", checks.PER_SPEC, ids=lambda f: f.__name__)
def test_contract_with_gaps(check):
    check(PPCA, GAPS)


def test_two_ranks_equal_one_with_gaps(two_ranks):
    checks.two_ranks_equal_one(PPCA, GAPS, two_ranks)


def test_microbatches_equal_one_batch_with_gaps():
    checks.microbatches_equal_one_batch(PPCA, GAPS)


def test_gaps_that_cannot_be_bridged_are_refused():
    with pytest.raises(DataMismatch, match="closed form needs them all; set fit: em"):
        PPCA(PPCA.Config(latents=2), GAPS)
    batch = with_gaps(30)
    batch.context["observed"][:, 1::3] = 0
    with pytest.raises(DataMismatch, match="coordinates 1, 4 are missing from every training example"):
        of_gaps(batch)
    with pytest.raises(DataMismatch, match="at least one training example"):
        PPCA(PPCA.Config(latents=2, fit="em"), GAPS).enter("em", iter([]))
