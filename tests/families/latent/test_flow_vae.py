"""The VAE with planar or radial maps: its posterior's density, its bound, its annealing, and what is known exactly."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Independent

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.evaluation import latents
from dgm_core.evaluation.record import EvaluationConfig
from dgm_core.models.latent import amortised
from dgm_core.models.latent.flow_vae import FlowVAE
from dgm_core.models.latent.vae import VAE
from dgm_core.objectives.elbo import inverse_temperature
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

FLOWS = ["planar", "radial"]
DONE = Clock(10, 20)  # nothing is annealed any more where `anneal` is at most nine rounds
LINEAR = {"hidden": 0, "latents": 2, "variance": "shared", "anneal": 0}


def stop_the_maps(model: FlowVAE) -> None:
    """û = 0 where u = 0; β̂ = 0 where a = b."""
    D, K = model.config.latents, model.config.depth
    with torch.no_grad():
        model._head.weight[2 * D + K * D :] = 0.0
        assert model._head.bias is not None
        model._head.bias[2 * D + K * D :] = 0.0


@pytest.mark.parametrize("latents", [1, 4])
@pytest.mark.parametrize("flow", FLOWS)
def test_density_of_a_draw_is_the_jacobians(flow, latents):
    model = build(FlowVAE, BINARY, flow=flow, depth=3, latents=latents)
    x = every_binary_image()[10:14]
    q = model.infer(x)
    draws = q.draw(3)
    assert (draws.z - draws.start).abs().max() > 0.3  # the maps do something
    found = q.log_prob_of(draws)
    for row in range(4):
        for column in range(3):
            torch.testing.assert_close(found[row, column], density_by_jacobian(q, draws, row, column), **EXACT)


@pytest.mark.parametrize("flow", FLOWS)
def test_density_anywhere_goes_by_the_inverse(flow, monkeypatch):
    """At its own draws the same; at another example's draw that example's own posterior; pieces change nothing."""
    model = build(FlowVAE, BINARY, flow=flow, depth=3)
    x = every_binary_image()[20:25]
    q = model.posterior(x)
    with torch.no_grad():
        draws = q.draw(2)
        torch.testing.assert_close(q.log_prob(draws.z.movedim(1, 0)).t(), q.log_prob_of(draws), **EXACT)
        z = q.sample()
        table = q.log_prob(z[1:4].unsqueeze(1))
        assert table.shape == (3, 5)
        for j in range(5):
            torch.testing.assert_close(table[:, j], model.infer(x[j : j + 1]).log_prob(z[1:4].unsqueeze(1))[:, 0])
        monkeypatch.setattr("dgm_core.distributions.flow_posterior.ELEMENTS", 1)
        torch.testing.assert_close(q.log_prob(z[1:4].unsqueeze(1)), table)
    assert q.sample((3, 2)).shape == (3, 2, 5, model.config.latents)


@pytest.mark.parametrize("config", [{"flow": "none"}, {"depth": 0}], ids=str)
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_without_maps_it_is_the_plain_vae(config, network):
    shared = {"network": network, "channels": (4,)}
    model = build(FlowVAE, BINARY, anneal=9, **shared, **config)
    plain = build(VAE, BINARY, **shared)
    plain.load_state_dict(model.state_dict())
    batch = Batch(every_binary_image())
    for value in (
        lambda m: m.loss(batch, "model", DONE).value,
        lambda m: m.log_prob(batch.x),
        lambda m: m.log_prob(batch.x, samples=5),
        lambda m: m.kl(batch.x),
        lambda m: m.posterior(batch.x).stddev,
    ):
        torch.manual_seed(1)
        ours = value(model)
        torch.manual_seed(1)
        assert torch.equal(ours, value(plain))
    assert isinstance(model.posterior(batch.x), Independent)


@pytest.mark.parametrize("flow", FLOWS)
def test_maps_that_do_nothing_leave_the_gaussian_bound(flow):
    """Draw by draw: the closed form of the Gaussian's KL, to which identities add nothing."""
    model = build(FlowVAE, BINARY, flow=flow, anneal=9)
    stop_the_maps(model)
    plain = build(FlowVAE, BINARY, flow="none", anneal=9)
    state = plain.state_dict()
    mine = {name: value[: len(state[name])] for name, value in model.state_dict().items()}  # the maps' rows come last
    plain.load_state_dict(mine)
    batch = Batch(every_binary_image())
    for clock in (Clock(0, 20), DONE):
        torch.manual_seed(1)
        expected = plain.loss(batch, "model", clock).value
        torch.manual_seed(1)
        torch.testing.assert_close(model.loss(batch, "model", clock).value, expected, **EXACT)
    torch.testing.assert_close(model.kl(batch.x), plain.kl(batch.x), **EXACT)


@pytest.mark.parametrize("flow", FLOWS)
def test_the_loss_is_the_free_energy(flow):
    """E_q [ln q_K(z_K) − ln p(x, z_K)] (eq. 15): part of it in closed form, the same expectation; and so is the KL."""
    model = build(FlowVAE, BINARY, scale=0.1, flow=flow, anneal=0)
    x = every_binary_image()[5:9].repeat(20, 1, 1, 1)
    with torch.no_grad():
        losses = torch.stack([model.loss(Batch(x), "model", DONE).value for _ in range(100)])
        bounds = torch.stack([model.log_prob(x).mean() for _ in range(100)])
        assert close(losses, -bounds)
        assert losses.std() < 1.0  # or the line above could not fail
        q = model.infer(x)
        draws = q.draw(500)
        by_draws = q.log_prob_of(draws) - torch.distributions.Normal(0.0, 1.0).log_prob(draws.z).sum(2)
        kl = torch.stack([model.kl(x).sum(1).mean() for _ in range(20)])
        assert close(kl, by_draws.mean(0))


def test_annealing_by_formula():
    """β_t = min(1, 0.01 + t / T) (eq. 20), and F_β = E ln q_K − β E [ln p(z_K) + ln p(x | z_K)]."""
    expected = {0: 0.01, 4950: 0.505, 9899: 0.9999, 9900: 1.0, 500_000: 1.0}
    assert {t: inverse_temperature(t, 10_000) for t in expected} == pytest.approx(expected, abs=1e-12)
    assert inverse_temperature(0, 0) == 1.0
    assert FlowVAE.defaults(BINARY)[0].anneal == 10_000
    model, batch = build(FlowVAE, BINARY, anneal=100), Batch(every_binary_image())
    torch.manual_seed(1)
    q = model.infer(batch.x)
    draws = q.draw(1)
    log_prior, log_q = q.log_prior(draws), q.kl(draws).sum(1) + q.log_prior(draws)
    log_p = model._log_likelihood(batch.x, draws.z, None).squeeze(1)
    for t, beta in ((0, 0.01), (50, 0.51), (99, 1.0), (150, 1.0)):
        torch.manual_seed(1)
        value = model.loss(batch, "model", Clock(t, 200)).value
        torch.testing.assert_close(value, (log_q - beta * (log_prior + log_p)).mean(), **EXACT)


@pytest.mark.parametrize("flow", FLOWS)
def test_importance_weights_of_a_known_posterior_are_exact(flow):
    """Where q is the posterior every weight is p(x), whatever K; else the bound rises with K, up to p(x)."""
    model = build(FlowVAE, VECTOR, flow=flow, depth=2, **LINEAR)
    exact = know_the_posterior(model)
    x = exact.sample((20,))
    moving = model._head.weight.detach().clone()
    stop_the_maps(model)
    with torch.no_grad():
        for samples in (1, 3):
            torch.testing.assert_close(model.log_prob(x, samples=samples), exact.log_prob(x), **EXACT)
        first = 2 * 2 + model.config.depth * 2
        model._head.weight[first:] = 0.3 * moving[first:]
        model._head.bias[2:4] += 0.5  # wider than the posterior, so that weights are bounded
    rises_to(model, x, exact.log_prob(x).mean().item())


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("flow", [*FLOWS, "none"])
def test_gradients_reach_every_parameter(flow, network):
    model = build(FlowVAE, BINARY, scale=0.1, flow=flow, network=network, channels=(4,), conditional=True).train()
    x = every_binary_image()
    model.loss(Batch(x, torch.arange(64) % 3), "model", Clock(3, 10)).value.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_maps_start_next_to_the_identity_and_follow_the_example():
    torch.manual_seed(0)
    for flow in FLOWS:
        model = FlowVAE(FlowVAE.tiny(BINARY)[0].merged({"flow": flow}), BINARY)
        q = model.infer(every_binary_image())
        draws = q.draw(1)
        moved = (draws.z - draws.start).abs()
        assert 0 < moved.max() < 0.2  # of coordinates with a deviation of about one
        assert q.context is not None
        assert q.context.std(0).min() > 0


@pytest.mark.parametrize("flow", FLOWS)
def test_diagnosis_of_a_posterior_that_is_no_gaussian(flow):
    """Its mean is the draws' mean; one that does not look at x has no active unit and tells nothing of it."""
    model = build(FlowVAE, BINARY, scale=0.1, flow=flow)
    batch, options = Batch(every_binary_image()), EvaluationConfig(mutual_information_examples=32)
    with torch.no_grad():
        some = model.posterior(batch.x[:1])
        draws = some.sample((20_000,))[:, 0]
        error = (draws.std(0) / 20_000**0.5 + draws.std(0) / (2 * 32) ** 0.5) * SIGMAS
        assert ((some.mean[0] - draws.mean(0)).abs() < error).all()
        metrics, details, warnings = latents.latent_metrics(model, batch, options)
        assert metrics["active_units"].context["of"] == "mean"
        assert metrics["mutual_information_nats"].value > 0.1
        assert sum(details["kl_by_dimension"]) == pytest.approx(metrics["kl_nats"].value)
        model._head.weight.zero_()
        metrics, _, warnings = latents.latent_metrics(model, batch, options)
        assert metrics["active_units"].value == 0
        assert metrics["mutual_information_nats"].value == pytest.approx(0, abs=1e-9)
        assert any("collapsed" in warning for warning in warnings)


def test_memory_counts_what_steers_the_maps(monkeypatch):
    model, x = build(FlowVAE, BINARY), every_binary_image()
    monkeypatch.setattr(torch, "randn", lambda *shape, **k: torch.zeros(*shape, **k))
    whole, seen = model.log_prob(x, samples=11), []
    original = FlowVAE._log_likelihood

    def watch(self, x, z, y):
        seen.append(z.shape[1])
        return original(self, x, z, y)

    monkeypatch.setattr(FlowVAE, "_log_likelihood", watch)
    monkeypatch.setattr(amortised, "MEMORY", 4 * len(x) * model.maps.size)
    torch.testing.assert_close(model.log_prob(x, samples=11), whole)
    assert seen == [4, 4, 3]


def test_labels_reach_posterior_and_decoder():
    model = build(FlowVAE, BINARY, conditional=True)
    x = every_binary_image()[:5]
    zero, one = torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long)
    assert not torch.allclose(model.infer(x, zero).context, model.infer(x, one).context)
    z = model.draw_latent(5)
    assert not torch.allclose(model.decode(z, zero), model.decode(z, one))
    assert model.sample(4).shape == (4, 1, 2, 3)


def test_refusals_say_how_to_mend():
    with pytest.raises(DataMismatch, match="FlowVAE models images, audio and vectors"):
        FlowVAE(FlowVAE.Config(observation="bernoulli"), DataSpec("codes", (4, 4), 16))
