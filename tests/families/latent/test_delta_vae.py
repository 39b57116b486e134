"""δ-VAE: the committed rate in closed form, by Monte Carlo and as a minimum; what each part sees; the bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.distributions.ar1 import AR1, alpha_for, committed_rate, variance_for
from dgm_core.distributions.gaussian import log_normal
from dgm_core.models.latent.delta_vae import DeltaVAE
from dgm_core.nn.incremental import draw_categorical
from dgm_core.nn.latent_sequences import AntiCausal
from tests.contract import checks
from tests.families.latent.posteriors import every_binary_image, rises_to
from tests.support import examples

IMAGE = DataSpec("image", (1, 8, 6), 3)
BINARY = DataSpec("image", (1, 2, 3), 2)
BOTH = pytest.mark.parametrize("prior", ["ar1", "independent"])
# α and λ are kept in the parameters' precision but made in single: 1e-7 relative of rates up to a few hundred.
ROUNDED: Any = {"rtol": 1e-6, "atol": 1e-6}


def build(data: DataSpec = IMAGE, scale: float = 0.2, **config: Any) -> DeltaVAE:
    """The tiny model in float64, its parameters moved so that nothing is zero."""
    torch.manual_seed(0)
    small = {"channels": 8, "depth": 3, "head": 8}
    config = {"rows": 2 if data is IMAGE else 1, "channels": (4,), "decoder": small, **config}
    model = DeltaVAE(DeltaVAE.tiny(data)[0].merged(config), data).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model


def images(n: int, data: DataSpec = IMAGE) -> Tensor:
    return torch.randint(data.levels or 0, (n, *data.shape)).to(data.dtype)


def covariance(alpha: float, n: int) -> Tensor:
    """Of a stationary AR(1) sequence of unit variance: α^|s − t|."""
    t = torch.arange(n, dtype=torch.float64)
    return alpha ** (t[:, None] - t).abs()


@pytest.mark.parametrize(("alpha", "n"), [(0.0, 3), (0.3, 1), (0.5, 2), (0.9, 3), (0.99, 7)])
def test_the_priors_divergence_is_that_of_the_multivariate_normals(alpha, n):
    torch.manual_seed(0)
    prior = AR1([alpha]).double()
    mean, log_variance = torch.randn(5, n, 1, dtype=torch.float64), torch.randn(5, n, 1, dtype=torch.float64)
    found = prior.kl(mean, log_variance)
    whole = MultivariateNormal(torch.zeros(n, dtype=torch.float64), covariance(alpha, n))
    posterior = MultivariateNormal(mean[:, :, 0], torch.diag_embed(log_variance[:, :, 0].exp()))
    torch.testing.assert_close(found.flatten(1).sum(1), kl_divergence(posterior, whole), **ROUNDED)
    assert (found > -1e-9).all()  # each term is a divergence itself; the rest is rounding
    z = torch.randn(4, n, 1, dtype=torch.float64)
    density = log_normal(z, *prior.moments(z)).flatten(1).sum(1)
    torch.testing.assert_close(density, whole.log_prob(z[:, :, 0]), **ROUNDED)


def test_the_priors_divergence_is_what_draws_say():
    """Monte Carlo, two dimensions with an α each."""
    torch.manual_seed(0)
    prior = AR1([0.4, 0.95]).double()
    mean, log_variance = torch.randn(1, 4, 2, dtype=torch.float64), torch.randn(1, 4, 2, dtype=torch.float64)
    z = mean + (0.5 * log_variance).exp() * torch.randn(200_000, 4, 2, dtype=torch.float64)
    ratio = (log_normal(z, mean, log_variance) - log_normal(z, *prior.moments(z))).flatten(1).sum(1)
    error = ratio.std().item() / math.sqrt(len(ratio))
    assert ratio.mean().item() == pytest.approx(prior.kl(mean, log_variance).sum().item(), abs=5 * error)
    assert error < 0.5  # or the comparison says nothing


@pytest.mark.parametrize(("alpha", "n"), [(0.5, 2), (0.3, 4), (0.9, 5), (0.99, 8)])
def test_the_committed_rate_is_the_least_divergence_of_the_family(alpha, n):
    """Found by numerical optimisation over every mean and variance, and reached where `nearest` says."""
    prior = AR1([alpha]).double()
    torch.manual_seed(0)
    free = torch.randn(2, n, 1, dtype=torch.float64).requires_grad_()
    search = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def divergence() -> Tensor:
        search.zero_grad()
        value = prior.kl(free[:1], free[1:]).sum()
        value.backward()
        return value

    search.step(divergence)  # pyright: ignore[reportArgumentType]
    assert divergence().item() == pytest.approx(committed_rate(alpha, n), rel=1e-6)
    torch.testing.assert_close(free[1].detach(), prior.nearest(n), rtol=0, atol=1e-4)  # flat at its least: √1e-8
    torch.testing.assert_close(free[0].detach(), torch.zeros(n, 1, dtype=torch.float64), rtol=0, atol=1e-4)
    at = prior.kl(torch.zeros(1, n, 1, dtype=torch.float64), prior.nearest(n)[None]).sum().item()
    assert at == pytest.approx(committed_rate(alpha, n), rel=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.1, 1.0, 30.0])
def test_alphas_and_variances_of_a_rate(rate):
    # To the last digits of float64, but that a rate of 30 is a difference of numbers near 1.
    for n in (2, 3, 50):
        assert committed_rate(alpha_for(min(rate, 10.0), n), n) == pytest.approx(min(rate, 10.0), rel=1e-6, abs=1e-15)
    variance = variance_for(rate)
    assert variance <= 1
    nearest = kl_divergence(Normal(0.0, math.sqrt(variance)), Normal(0.0, 1.0)).item()
    assert nearest == pytest.approx(rate, rel=1e-4, abs=1e-6)  # torch's own, in single precision


@BOTH
@torch.no_grad()
def test_no_parameters_take_the_rate_below_delta(prior):
    for scale in (0.0, 0.05, 0.5):
        for rate in (0.5, 8.0):
            model = build(scale=scale, prior=prior, rate=rate)
            kl = model.kl(images(20))
            assert kl.shape == (20, math.prod(model.shape))
            assert (kl.sum(1) > rate * (1 - 1e-6)).all()
            assert model.rate == pytest.approx(rate)
    for p in model.encoder.parameters():
        p.zero_()  # the nearest posterior of all
    torch.testing.assert_close(model.kl(images(3)).sum(1), torch.full((3,), 8.0, dtype=torch.float64), **ROUNDED)


@torch.no_grad()
def test_alphas_of_ones_own_commit_what_they_amount_to():
    model = build(alphas=(0.5, 0.99))
    n = model.shape[0]
    assert model.rate == pytest.approx(committed_rate(0.5, n) + committed_rate(0.99, n))
    for p in model.encoder.parameters():
        p.zero_()
    torch.testing.assert_close(model.kl(images(1)).sum().item(), model.rate, **ROUNDED)


@torch.no_grad()
def test_a_rate_of_nothing_is_a_plain_vae():
    model = build(rate=0.0)
    x = images(4)
    mean, log_variance = model.infer(x)
    plain = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(torch.zeros_like(mean), 1.0))
    torch.testing.assert_close(model.kl(x), plain.flatten(1))


def test_the_encoder_sees_its_own_rows_and_those_below_and_none_above():
    """By Jacobian; one residual block of 3 × 3 convolutions reaches three rows further down than its own."""
    model = build()
    x = torch.randn(1, 1, 8, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.encoder(x)[0].square().sum(-1), x)
    sees = jacobian.abs().sum((1, 2, 4)) != 0  # [t, row]
    expected = torch.zeros(4, 8, dtype=torch.bool)
    for t in range(4):
        expected[t, 2 * t : 2 * t + 5] = True
    assert torch.equal(sees, expected)
    assert jacobian.ne(0)[:, 0, 0, 2:4].all(-1)[1].all()  # every column of its own rows


def test_latents_act_on_their_own_rows_and_on_those_below():
    model = build()
    x = images(1).long()
    z = torch.randn(1, 4, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: model.decoder(x, model._condition(z)).square().sum((0, 1, 3, 4)), z
    )
    acts = jacobian.abs().sum((1, 3)) != 0  # [row, t]
    for t in range(4):
        assert not acts[: 2 * t, t].any()
        assert acts[2 * t : 2 * t + 3, t].all()  # and, through the features of rows above, on the next block


@BOTH
def test_the_turns_train_the_model_and_then_the_auxiliary_prior(prior):
    model = build(prior=prior, auxiliary_share=0.25)
    first, second = model.turns()
    assert (first.window, second.window) == ((0.0, 0.75), (0.75, 1.0))
    batch = Batch(images(6))
    for turn in (first, second):
        model.zero_grad()
        model.loss(batch, turn.name, Clock(0, 10)).value.backward()
        for player, parameters in model.players().items():
            reached = [p.grad is not None and bool(p.grad.any()) for p in parameters]
            assert all(reached) if player in turn.players else not any(reached)


@BOTH
@torch.no_grad()
def test_the_loss_is_minus_the_bound_with_the_committed_prior(prior):
    model = build(prior=prior)
    x = images(5)
    torch.manual_seed(3)
    loss = model.loss(Batch(x), "model", Clock(0, 10))
    torch.manual_seed(3)
    mean, log_variance = model.infer(x)
    z = mean + (0.5 * log_variance).exp() * torch.randn(5, 1, *model.shape, dtype=torch.float64)[:, 0]
    logits = model.decoder(x.long(), model._condition(z))
    nats = -logits.log_softmax(-1).gather(-1, x.long()[..., None]).flatten(1).sum(1)
    torch.testing.assert_close(loss.value, (nats + model.kl(x).sum(1)).mean())
    torch.testing.assert_close(loss.metrics["kl_nats"], model.kl(x).sum(1).mean())
    torch.manual_seed(3)
    auxiliary = model.loss(Batch(x), "auxiliary", Clock(9, 10))
    torch.testing.assert_close(auxiliary.value, -model.log_prior(z).mean())


@BOTH
@torch.no_grad()
def test_the_auxiliary_prior_is_the_committed_one_at_first(prior):
    model = build(scale=0.0, prior=prior)
    z = torch.randn(5, *model.shape, dtype=torch.float64)
    torch.testing.assert_close(model.log_prior(z), model.log_prior(z, auxiliary=False))
    x = images(3)
    torch.manual_seed(1)
    bound = model.log_prob(x)
    torch.manual_seed(1)
    loss = torch.stack([model.loss(Batch(x), "model", Clock(0, 1)).value])
    torch.testing.assert_close(bound.mean()[None], -loss)


@torch.no_grad()
def test_the_auxiliary_prior_is_a_density_and_is_drawn_from():
    """By quadrature over two latents; and the draws' mean and covariance are the density's."""
    model = build(BINARY, latents=1)
    with torch.no_grad():
        model.auxiliary.out.weight.mul_(0.3)  # within what the quadrature covers
    axis = torch.linspace(-14, 14, 561, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    mass = model.log_prior(z[:, :, None]).exp() * (axis[1] - axis[0]) ** 2
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)  # the trapezoid's error on smooth densities is far less
    mean = (mass[:, None] * z).sum(0)
    spread = (mass[:, None] * (z - mean)).T @ (z - mean)
    n = 40_000
    drawn = model.draw_latent(n)
    # Five standard errors of means and of products of numbers that are near Gaussian.
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=5 * math.sqrt(spread.max().item() / n))
    torch.testing.assert_close(drawn.T.cov(), spread, rtol=0, atol=10 * spread.max().item() / math.sqrt(n))
    assert not torch.allclose(spread, covariance(model.prior.alpha.item(), 2), atol=0.1)


def test_the_auxiliary_prior_is_fitted_to_the_posteriors_draws():
    """Against a posterior that all examples share, the best prior is that posterior: the KL is closed to nothing."""
    model = build(BINARY, scale=0.0, latents=1, rate=3.0)
    assert isinstance(model.encoder, AntiCausal)
    head = model.encoder.head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([1.5, -0.5]))  # the same for every image
    batch = Batch(images(200, BINARY))
    adam = torch.optim.Adam(model.auxiliary.parameters(), lr=0.02)
    for _ in range(200):
        adam.zero_grad()
        model.loss(batch, "auxiliary", Clock(9, 10)).value.backward()
        adam.step()
    with torch.no_grad():
        mean, log_variance = model.infer(batch.x)
        z = model._draw(mean, log_variance, 1)[:, 0]
        log_q = log_normal(z, mean, log_variance).flatten(1).sum(1)
        committed = (log_q - model.log_prior(z, auxiliary=False)).mean()
        fitted = (log_q - model.log_prior(z)).mean()
    assert committed > 3.0
    assert fitted < 0.1 * committed  # what 200 steps leave: a gated network does not cancel α z exactly


@BOTH
@torch.no_grad()
def test_the_bounds_rise_to_the_exact_probability(prior):
    """log p(x) of six binary pixels and two latents by quadrature; the probabilities sum to one."""
    model = build(BINARY, prior=prior, latents=1 if prior == "ar1" else 2, rate=0.5, scale=0.15)
    axis = torch.linspace(-8, 8, 41, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    log_mass = model.log_prior(z.view(-1, *model.shape)) + 2 * math.log(axis[1] - axis[0])
    space = every_binary_image()
    exact = torch.stack(
        [(model._log_likelihood(x[None], z.view(1, -1, *model.shape))[0] + log_mass).logsumexp(0) for x in space]
    )
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-6)  # steps of 0.4 on smooth densities of width near 1
    some = slice(5, None, 32)
    rises_to(model, space[some], exact[some].mean().item())


@BOTH
@torch.no_grad()
def test_one_sample_weighs_in_closed_form_what_it_would_by_draws(prior):
    """The ELBO's estimate has the mean of log p(x, z) − log q(z | x), and scatters less."""
    model = build(BINARY, prior=prior, scale=0.1)
    x = images(1, BINARY).expand(4000, -1, -1, -1)
    mean, log_variance = model.infer(x)
    z = model._draw(mean, log_variance, 1)
    plain = model._log_likelihood(x, z)[:, 0] + model.log_prior(z[:, 0])
    plain = plain - log_normal(z[:, 0], mean, log_variance).flatten(1).sum(1)
    closed = model.log_prob(x)
    error = math.sqrt((plain.var() + closed.var()).item() / len(x))
    assert closed.mean().item() == pytest.approx(plain.mean().item(), abs=5 * error)
    assert closed.std() < plain.std()


@BOTH
@torch.no_grad()
def test_decoding_equals_the_naive_loop_pixel_for_pixel(prior):
    model = build(prior=prior)
    z = model.draw_latent(3)
    torch.manual_seed(1)
    drawn = model.decode(z, temperature=0.8, top_p=0.9)
    torch.manual_seed(1)
    noise = torch.rand(3, 1, 8, 6, dtype=torch.float64)
    canvas = torch.zeros(3, 1, 8, 6, dtype=torch.int64)
    condition = model._condition(z.unflatten(1, model.shape))
    for r in range(8):
        for c in range(6):
            canvas[:, 0, r, c] = draw_categorical(
                model.decoder(canvas, condition)[:, 0, r, c], noise[:, 0, r, c], 0.8, 0.9
            )
    assert torch.equal(drawn.long(), canvas)
    assert len(canvas.unique()) == 3
    x = model.sample(2)
    assert x.dtype == torch.uint8
    with pytest.raises(ValueError, match="temperature"):
        model.sample(1, top_p=0.0)


class IndependentDeltaVAE(DeltaVAE):
    """The other form under the contract: `tiny` says so."""

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[DeltaVAE.Config, Any]:
        config, recipe = DeltaVAE.tiny(data)
        return config.merged({"prior": "independent", "channels": [8], "rate": 0.5}), recipe


@pytest.mark.parametrize("check", checks.PER_SPEC, ids=lambda f: f.__name__)
def test_contract_of_the_independent_form(check):
    check(IndependentDeltaVAE, DataSpec("image", (1, 4, 4), 2, classes=2))


def test_two_ranks_equal_one_of_the_independent_form(two_ranks):
    checks.two_ranks_equal_one(IndependentDeltaVAE, DataSpec("image", (1, 4, 4), 2, classes=2), two_ranks)


@pytest.mark.slow
def test_the_plain_vaes_rate_collapses_and_the_committed_one_stays():
    """An autoregressive decoder that needs no latent: stripes with one bit of phase that the first pixel gives away."""
    torch.manual_seed(0)
    data = DataSpec("image", (1, 8, 8), 2)
    found = {}
    for rate in (0.0, 2.0):
        model = DeltaVAE(DeltaVAE.tiny(data)[0].merged({"rate": rate}), data)
        adam = torch.optim.Adam(model.players()["model"], lr=3e-3)
        rates = []
        for step in range(200):
            batch = examples(data, 32, seed=step)
            loss = model.loss(batch, "model", Clock(step, 200))
            adam.zero_grad()
            loss.value.backward()
            adam.step()
            rates.append(loss.metrics["kl_nats"].item())
        found[rate] = (min(rates), rates[-1])
    assert found[0.0][1] < 0.1
    assert found[2.0][0] > 2.0 - 1e-4  # single precision


@pytest.mark.parametrize(
    ("data", "config", "said"),
    [
        (DataSpec("image", (1, 8, 8), None), {}, "2 to 256 levels"),
        (DataSpec("audio", (8,), 4), {}, "models images"),
        (DataSpec("codes", (8, 8), 4), {}, "models images"),
        (DataSpec("image", (1, 7, 8), 2), {"rows": 2}, "choose `rows`"),
        (DataSpec("image", (1, 8, 8), 2), {"rows": 8}, "choose `rows`"),
    ],
)
def test_data_that_cannot_be_modelled_is_refused_in_words(data, config, said):
    with pytest.raises(DataMismatch, match=said):
        DeltaVAE(DeltaVAE.tiny(data)[0].merged(config), data)


def test_alphas_that_do_not_fit_are_refused():
    for given in ({"alphas": (0.5,)}, {"alphas": (0.5, 1.0)}, {"alphas": (0.5, 0.5), "prior": "independent"}):
        with pytest.raises(ValidationError, match="alphas"):
            DeltaVAE.tiny(IMAGE)[0].merged(given)
