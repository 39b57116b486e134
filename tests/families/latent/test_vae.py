"""The VAE: where a bound is tight, where an estimate is unbiased, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.latent import amortised as module
from dgm_core.models.latent.ppca import PPCA
from dgm_core.models.latent.vae import VAE
from dgm_core.nn.encoders import ConvDecoder, ConvEncoder
from tests.families.latent.posteriors import VECTOR, rises_to
from tests.families.latent.posteriors import build as perturbed

BINARY = DataSpec("image", (1, 2, 3), 2, classes=3)
START = Clock(0, 10)


def build(data: DataSpec, **config) -> VAE:
    torch.manual_seed(0)
    return VAE(VAE.tiny(data)[0].merged(config), data).double().eval()


def every_binary_image() -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(2)] * 6).reshape(-1, 1, 2, 3).to(torch.uint8)


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("observation", ["bernoulli", "categorical", "discretised_logistic"])
def test_importance_weighted_estimate_is_unbiased(network, observation):
    """E[(1/K) Σ w] = p(x), so that over all images the estimates sum to one, up to their own scatter."""
    model = build(BINARY, network=network, observation=observation, channels=(4,), features=8)
    x, n = every_binary_image(), 500
    with torch.no_grad():
        totals = torch.stack([model.log_prob(x, samples=n).exp().sum() for _ in range(8)])
    assert abs(totals.mean().item() - 1) < 5 * totals.std().item() / math.sqrt(8) + 1e-9
    assert totals.std() < 0.1  # or the line above could not fail


def test_elbo_is_below_the_importance_weighted_bound():
    model = build(BINARY)
    model.encoder[-1].bias.data.normal_()  # a posterior that is not the prior
    x = every_binary_image().repeat(20, 1, 1, 1)
    with torch.no_grad():
        bounds = [model.log_prob(x, samples=k).mean().item() for k in (1, 5, 100)]
    assert bounds[0] < bounds[1] < bounds[2]


@pytest.mark.parametrize(
    ("data", "config"),
    [
        (BINARY, {"observation": "bernoulli"}),
        (BINARY, {"observation": "categorical"}),
        (DataSpec("image", (1, 2, 2), 5), {"observation": "discretised_logistic"}),
        (VECTOR, {"observation": "gaussian", "variance": "network"}),
        (VECTOR, {"observation": "gaussian", "variance": "shared"}),
    ],
)
def test_bounds_rise_to_the_integral_over_the_latents(data, config):
    model = perturbed(VAE, data, latents=2, features=8, **config)
    with torch.no_grad():  # a posterior that is not the right one, and wider, so that no weight is without bounds
        model._head.weight.zero_()
        model._head.bias.copy_(torch.tensor([0.5, -0.5, 0.2, 0.2]))
    x = model.sample(12)
    # Beyond ±8 the prior has nothing; the rule is exact to rounding for integrands as smooth as these.
    axis = torch.linspace(-8, 8, 81, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + 2 * math.log(0.2)
    with torch.no_grad():
        exact = (model._log_likelihood(x, z.expand(12, -1, -1), None) + prior).logsumexp(1)
    if data is BINARY:
        space = every_binary_image()
        with torch.no_grad():
            all_of_it = (model._log_likelihood(space, z.expand(64, -1, -1), None) + prior).logsumexp(1)
        assert all_of_it.exp().sum().item() == pytest.approx(1, abs=1e-9)
    rises_to(model, x, exact.mean().item())


def test_linear_vae_reaches_ppca():
    """With linear networks and one variance, the ELBO's optimum is pPCA's likelihood (Lucas et al. 2019, section 4)."""
    torch.manual_seed(0)
    data = DataSpec("vector", (5,), None)
    x = torch.randn(400, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    x = x + 0.5 * torch.randn(400, 5, dtype=torch.float64) + 1
    ppca = PPCA(PPCA.Config(latents=2), data).double()
    ppca.enter("closed_form", iter([Batch(x)]))
    exact = ppca.log_prob(x).mean().item()
    model = VAE(VAE.Config(latents=2, depth=0, observation="gaussian", variance="shared"), data).double()
    steps = 2000
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(Batch(x), "model", START).value.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        bound = torch.stack([model.log_prob(x).mean() for _ in range(200)])
        tight = model.log_prob(x, samples=200)
    error = 5 * bound.std().item() / math.sqrt(len(bound))
    assert bound.mean().item() < exact + error
    # What annealed stochastic gradients leave: 0.01 nats, of the 1.5 that the best model without latents loses.
    assert bound.mean().item() == pytest.approx(exact, abs=0.01 + error)
    torch.testing.assert_close(tight, ppca.log_prob(x), atol=0.1, rtol=0)  # not only on average
    sigma2 = model.observation.log_variance.exp().item()
    assert sigma2 == pytest.approx(ppca.log_variance.exp().item(), rel=0.03)


def test_the_elbo_of_the_loss_is_reconstruction_minus_kl():
    model = build(BINARY, importance_samples=3)
    x = every_binary_image()
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "model", START)
    torch.manual_seed(1)
    q = model.posterior(x)
    noise = torch.randn(len(x), 3, model.config.latents, dtype=torch.float64)
    z = q.mean[:, None] + q.stddev[:, None] * noise
    p = torch.stack([model.decode(z[:, k]) for k in range(3)], 1)
    log_p = torch.where(x[:, None] == 1, p.log(), (1 - p).log()).flatten(2).sum(2).mean()
    kl = torch.distributions.kl_divergence(
        q.base_dist, torch.distributions.Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
    )
    torch.testing.assert_close(model.kl(x), kl)
    assert loss.value.item() == pytest.approx(kl.sum(1).mean().item() - log_p.item())
    assert loss.metrics["kl_nats"].item() == pytest.approx(kl.sum(1).mean().item())
    assert loss.metrics["reconstruction_nats"].item() == pytest.approx(-log_p.item())


def test_warm_up_and_free_bits_change_the_kl_term_alone():
    x = every_binary_image()

    def value(clock: Clock, **config) -> tuple[float, VAE]:
        model = build(BINARY, **config)
        model.encoder[-1].bias.data.normal_()
        torch.manual_seed(1)
        return model.loss(Batch(x), "model", clock).value.item(), model

    plain, model = value(START)
    kl = model.kl(x).mean(0).detach()
    assert value(START, kl_warmup=0.5)[0] == pytest.approx(plain - kl.sum().item())
    assert value(Clock(2, 10), kl_warmup=0.4)[0] == pytest.approx(plain - 0.5 * kl.sum().item())
    assert value(Clock(4, 10), kl_warmup=0.4)[0] == pytest.approx(plain)
    floor = kl.median().item()
    assert value(START, free_bits=floor)[0] == pytest.approx(plain + (kl.clamp_min(floor) - kl).sum().item())


def test_the_iwae_loss_is_the_bound():
    x = every_binary_image()
    model = build(BINARY, objective="iwae", importance_samples=7)
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "model", START).value
    torch.manual_seed(1)
    assert loss.item() == pytest.approx(-model.log_prob(x, samples=7).mean().item())


def test_memory_is_bounded_and_chunks_change_nothing(monkeypatch):
    """With noise held at zero every weight is the same, whatever the number of samples or chunks."""
    model, x = build(BINARY), every_binary_image()
    monkeypatch.setattr(torch, "randn", lambda *shape, **k: torch.zeros(*shape, **k))
    whole = model.log_prob(x, samples=11)
    largest = 0
    original = VAE._log_likelihood

    def watch(self, x, z, y):
        nonlocal largest
        largest = max(largest, z.shape[1])
        return original(self, x, z, y)

    monkeypatch.setattr(VAE, "_log_likelihood", watch)
    monkeypatch.setattr(module, "MEMORY", 4 * x.numel())
    torch.testing.assert_close(model.log_prob(x, samples=11), whole)
    torch.testing.assert_close(model.log_prob(x, samples=2), whole)
    assert largest == 4


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_labels_reach_both_networks(network, monkeypatch):
    model = build(BINARY, conditional=True, network=network, channels=(4,))
    x = every_binary_image()[:5]
    zero, one = torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long)
    z = model.draw_latent(5)
    assert not torch.allclose(model.decode(z, zero), model.decode(z, one))
    assert not torch.allclose(model.kl(x, zero), model.kl(x, one))
    with pytest.raises(DataMismatch, match="give y"):
        model.log_prob(x)
    assert model.sample(4).shape == (4, 1, 2, 3)  # labels are drawn
    monkeypatch.setattr(torch, "randn", lambda *shape, **k: torch.zeros(*shape, **k))
    together = model.log_prob(x, torch.tensor([0, 1, 2, 0, 1]), samples=3)
    alone = model.log_prob(x[2:3], torch.tensor([2]), samples=3)
    torch.testing.assert_close(together[2:3], alone)  # each of an example's draws has its own label


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 13), (2, 1, 5)])
def test_convolutions_mirror_any_size(shape):
    for channels in [(4,), (4, 8), (4, 8, 8)]:
        h = ConvEncoder(shape, channels, 6)(torch.randn(2, *shape))
        assert ConvDecoder(6, shape, channels)(h).shape == (2, *shape)


def test_decoder_parameters_stay_with_their_pixel():
    """θ of the convolutional decoder: channel c's parameters are contiguous, so that each pixel has its own."""
    model = build(DataSpec("image", (3, 4, 4), 8), network="conv", channels=(4,))
    z = model.draw_latent(2)
    raw = model.decoder(z)
    theta = model._theta(z, None)
    assert theta.shape == (2, 3, 4, 4, 2)
    for c in range(3):
        for p in range(2):
            assert torch.equal(theta[:, c, :, :, p], raw[:, 2 * c + p])


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (DataSpec("image", (1, 4, 4), 256), {"observation": "bernoulli"}, "accepted: discretised_logistic"),
        (DataSpec("vector", (4,), None), {"observation": "categorical"}, "accepted: gaussian"),
        (DataSpec("vector", (4,), 2), {"network": "conv"}, "network: conv needs images"),
        (DataSpec("vector", (4,), 2), {"conditional": True}, "needs classes"),
        (DataSpec("codes", (4, 4), 16), {}, "autoregressive prior"),
    ],
)
def test_refusals_say_how_to_mend(data, config, message):
    with pytest.raises(DataMismatch, match=message):
        VAE(VAE.tiny(data)[0].merged(config), data)


def test_iwae_refuses_changes_to_a_term_that_it_has_not():
    with pytest.raises(ValidationError, match="iwae"):
        VAE.Config(observation="bernoulli", objective="iwae", free_bits=0.1)


def test_temperature_narrows_the_prior():
    model = build(DataSpec("vector", (3,), None), variance="shared")
    model.observation.log_variance.data.fill_(-40.0)
    model.encoder[-1].weight.data.zero_()
    spread = [model.sample(500, temperature=t).std(0).mean().item() for t in (1e-3, 1.0)]
    assert spread[0] < 0.01 * spread[1]
