"""The VAE with inverse autoregressive steps: causality, its posterior's density, free bits, what is known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dgm_core.bijections import Autoregressive
from dgm_core.contract import Batch, Clock
from dgm_core.evaluation import latents
from dgm_core.evaluation.record import EvaluationConfig
from dgm_core.models.latent.iaf_vae import IAFVAE
from dgm_core.models.latent.vae import VAE
from tests.families.latent.posteriors import (
    BINARY,
    EXACT,
    SIGMAS,
    VECTOR,
    build,
    close,
    density_by_jacobian,
    every_binary_image,
    know_the_posterior,
    rises_to,
)

START = Clock(0, 10)
LINEAR = {"hidden": 0, "latents": 2, "variance": "shared"}


@pytest.mark.parametrize("depth", [1, 3])
def test_density_of_a_draw_is_the_jacobians(depth):
    """−Σ_i (½ ε_i² + ½ log 2π + log σ_{0,i} + Σ_t log σ_{t,i}) (eq. 11)."""
    model = build(IAFVAE, BINARY, depth=depth, latents=4)
    q = model.infer(every_binary_image()[10:13])
    draws = q.draw(2)
    assert (draws.z - draws.start).abs().max() > 0.3  # the steps do something
    found = q.log_prob_of(draws)
    for row in range(3):
        for column in range(2):
            torch.testing.assert_close(found[row, column], density_by_jacobian(q, draws, row, column), **EXACT)
    noise = (draws.start - q.start_mean[:, None]) / (0.5 * q.log_variance).exp()[:, None]
    terms = 0.5 * noise.square() + 0.5 * math.log(2 * math.pi) + 0.5 * q.log_variance[:, None] + draws.log_det
    torch.testing.assert_close(found, -terms.sum(2), **EXACT)


def test_density_anywhere_goes_by_the_inverse():
    model = build(IAFVAE, BINARY, depth=2)
    x = every_binary_image()[20:25]
    q = model.posterior(x)
    with torch.no_grad():
        draws = q.draw(2)
        torch.testing.assert_close(q.log_prob(draws.z.movedim(1, 0)).t(), q.log_prob_of(draws), **EXACT)
        z = q.sample()
        table = q.log_prob(z[1:4].unsqueeze(1))
        for j in range(5):
            alone = model.infer(x[j : j + 1]).log_prob(z[1:4].unsqueeze(1))[:, 0]
            torch.testing.assert_close(table[:, j], alone, **EXACT)


def test_steps_are_causal_and_each_reverses_the_order():
    """Triangular Jacobians, full below (or above) the diagonal; the context reaches every coordinate."""
    model = build(IAFVAE, BINARY, depth=3, latents=5)
    z, h = torch.randn(5).double(), torch.randn(16).double()
    for t, step in enumerate(model.steps):
        assert isinstance(step, Autoregressive)

        def moved(z, h, step=step):
            return step(z[None], h[None])[0][0]

        by_z, by_h = torch.autograd.functional.jacobian(moved, (z, h))
        by_z = by_z.flip(0, 1) if t % 2 else by_z
        assert torch.equal(by_z.triu(1), torch.zeros(5, 5).double())
        assert (by_z.tril().abs() > 0).sum() == 15
        assert (by_h.abs().sum(1) > 0).all()


def test_steps_are_the_papers_gates():
    """σ = sigmoid(s + 2), z_t = σ ⊙ z_{t−1} + (1 − σ) ⊙ m; at the start s = m = 0, so that most of z is kept."""
    model = build(IAFVAE, BINARY, depth=1)
    (step,) = model.steps
    z, h = torch.randn(6, model.config.latents).double(), torch.randn(6, 16).double()
    with torch.no_grad():
        m, s = step.net(z, h).chunk(2, 1)
        gate = torch.sigmoid(7 * torch.tanh(s / 7) + 2)
        found, log_gate = model._forward_steps(z, h)
        torch.testing.assert_close(found, gate * z + (1 - gate) * m, **EXACT)
        torch.testing.assert_close(log_gate, gate.log(), **EXACT)
        fresh = build(IAFVAE, BINARY, scale=0.0, depth=3, forget_bias=1.0)
        torch.testing.assert_close(fresh._forward_steps(z, h)[0], torch.sigmoid(torch.tensor(1.0)).double() ** 3 * z)


@pytest.mark.parametrize("free_bits", [0.0, 0.3])
def test_without_steps_it_is_the_plain_vae(free_bits):
    model = build(IAFVAE, BINARY, depth=0, free_bits=free_bits)
    plain = build(VAE, BINARY, free_bits=free_bits)
    plain.load_state_dict(model.state_dict())
    batch = Batch(every_binary_image())
    for value in (
        lambda m: m.loss(batch, "model", START).value,
        lambda m: m.log_prob(batch.x),
        lambda m: m.log_prob(batch.x, samples=5),
        lambda m: m.kl(batch.x),
    ):
        torch.manual_seed(1)
        ours = value(model)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, value(plain), **EXACT)


def test_free_bits_by_formula():
    """Σ_j max(λ, mean KL_j) − E log p(x | z) (eq. 15), a latent a group."""
    model, batch = build(IAFVAE, BINARY), Batch(every_binary_image())
    torch.manual_seed(1)
    q = model.infer(batch.x)
    draws = q.draw(1)
    kl, log_p = q.kl(draws).mean(0), model._log_likelihood(batch.x, draws.z, None).mean()
    floor = kl.mean().item()
    for nats, paid in ((0.0, kl.sum()), (floor, kl.clamp_min(floor).sum())):
        free = build(IAFVAE, BINARY, free_bits=nats)
        torch.manual_seed(1)
        loss = free.loss(batch, "model", START)
        torch.testing.assert_close(loss.value, paid - log_p, **EXACT)
        torch.testing.assert_close(loss.metrics["kl_nats"], kl.sum().detach(), **EXACT)
    assert kl.clamp_min(floor).sum() > kl.sum() + 0.01  # the two differ


def test_below_the_threshold_the_kl_has_no_gradient():
    """With more free bits than any latent uses, what moves is the reconstruction alone."""
    model, batch = build(IAFVAE, BINARY, free_bits=1e4), Batch(every_binary_image())
    parameters = list(model.parameters())
    torch.manual_seed(1)
    found = torch.autograd.grad(model.loss(batch, "model", START).value, parameters)
    torch.manual_seed(1)
    draws = model.infer(batch.x).draw(1)
    expected = torch.autograd.grad(-model._log_likelihood(batch.x, draws.z, None).mean(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    paying = build(IAFVAE, BINARY, free_bits=0.0)
    torch.manual_seed(1)
    whole = torch.autograd.grad(paying.loss(batch, "model", START).value, list(paying.parameters()))
    assert any((a - b).abs().max() > 0.01 for a, b in zip(whole, expected, strict=True))


def test_the_loss_is_the_bound_and_the_kl_is_shared_by_the_chain_rule():
    """Part of both is in closed form: the same expectation. By one step, the first latent's term is a Gaussian's KL."""
    model = build(IAFVAE, BINARY, scale=0.1, depth=1)
    x = every_binary_image()[5:9].repeat(20, 1, 1, 1)
    with torch.no_grad():
        losses = torch.stack([model.loss(Batch(x), "model", START).value for _ in range(100)])
        bounds = torch.stack([model.log_prob(x).mean() for _ in range(100)])
        assert close(losses, -bounds)
        assert losses.std() < 1.0  # or the line above could not fail
        q = model.infer(x)
        draws = q.draw(500)
        terms = torch.stack([model.kl(x) for _ in range(50)])
        by_draws = q.log_prob_of(draws) - Normal(0.0, 1.0).log_prob(draws.z).sum(2)
        assert close(terms.sum(2).mean(1), by_draws.mean(0))
        (step,) = model.steps
        m, s = step.net(torch.zeros_like(q.start_mean), q.context)[:, :: model.config.latents].unbind(1)
        gate = torch.sigmoid(7 * torch.tanh(s / 7) + 2)  # of the first latent: it depends on the context alone
        first = Normal(gate * q.start_mean[:, 0] + (1 - gate) * m, gate * (0.5 * q.log_variance[:, 0]).exp())
        closed = kl_divergence(first, Normal(torch.zeros_like(m), torch.ones_like(m))).mean()
        error = terms[..., 0].mean(1).std().item() / math.sqrt(len(terms))
        assert terms[..., 0].mean().item() == pytest.approx(closed.item(), abs=SIGMAS * error)


def test_annealing_adds_to_free_bits():
    """β takes its share of log p(x, z) back, whatever of the KL is free."""
    model, batch = build(IAFVAE, BINARY, free_bits=0.1, anneal=100), Batch(every_binary_image())
    torch.manual_seed(1)
    q = model.infer(batch.x)
    draws = q.draw(1)
    paid, log_prior = q.kl(draws).mean(0).clamp_min(0.1).sum(), q.log_prior(draws).mean()
    log_p = model._log_likelihood(batch.x, draws.z, None).mean()
    for t, beta in ((0, 0.01), (50, 0.51), (99, 1.0)):
        torch.manual_seed(1)
        value = model.loss(batch, "model", Clock(t, 100)).value
        torch.testing.assert_close(value, paid + (1 - beta) * log_prior - beta * log_p, **EXACT)


def test_importance_weights_of_a_known_posterior_are_exact():
    """Steps at their start multiply by sigmoid(2)²: with q₀ wider by as much every weight is p(x), whatever K. Else the
    bound rises with K, up to p(x)."""
    model = build(IAFVAE, VECTOR, scale=0.0, depth=2, **LINEAR)
    exact = know_the_posterior(model, gain=torch.sigmoid(torch.tensor(2.0, dtype=torch.float64)).item() ** 2)
    x = exact.sample((20,))
    with torch.no_grad():
        for samples in (1, 3):
            torch.testing.assert_close(model.log_prob(x, samples=samples), exact.log_prob(x), **EXACT)
        for p in model.steps.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model._head.bias[2:4] += 0.5  # wider than the posterior, so that weights are bounded
    rises_to(model, x, exact.log_prob(x).mean().item())


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_gradients_reach_every_parameter(network):
    model = build(IAFVAE, BINARY, scale=0.1, network=network, channels=(4,), conditional=True).train()
    model.loss(Batch(every_binary_image(), torch.arange(64) % 3), "model", START).value.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_diagnosis_of_a_posterior_that_is_no_gaussian():
    """One that does not look at x has no active unit and tells nothing of it."""
    model = build(IAFVAE, BINARY, scale=0.2)
    batch, options = Batch(every_binary_image()), EvaluationConfig(mutual_information_examples=32)
    with torch.no_grad():
        metrics, _, _ = latents.latent_metrics(model, batch, options)
        assert metrics["active_units"].context["of"] == "mean"
        assert metrics["mutual_information_nats"].value > 0.1
        model._head.weight.zero_()
        metrics, _, warnings = latents.latent_metrics(model, batch, options)
        assert metrics["active_units"].value == 0
        assert metrics["mutual_information_nats"].value == pytest.approx(0, abs=1e-9)
        assert any("collapsed" in warning for warning in warnings)
