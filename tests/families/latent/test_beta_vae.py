"""The β-VAE: what β and C change, and where a linear model's optimum lies, which is known in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.latent.beta_vae import BetaVAE
from dgm_core.models.latent.vae import VAE
from dgm_core.objectives.elbo import capacity_gap
from tests.families.latent.posteriors import BINARY, EXACT, build, every_binary_image

START = Clock(0, 10)
SPECTRUM = (30.0, 9.0, 2.5, 0.5)  # variances of the data's principal directions
LINEAR = {"depth": 0, "latents": 3, "observation": "gaussian", "variance": "shared"}


def of_the_same_weights(model: BetaVAE, **config: Any) -> BetaVAE:
    other = BetaVAE(model.config.merged(config), model.data).double()
    other.load_state_dict(model.state_dict())
    return other


def play(model: BetaVAE | VAE, x: Tensor, clock: Clock = START) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """The loss under fixed noise, its gradients and its metrics."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model.loss(Batch(x), "model", clock)
    loss.value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.value.item(), grads, dict(loss.metrics)


def gaussian_data() -> Tensor:
    """Centred examples whose covariance has exactly the eigenvalues of SPECTRUM, in no axis's direction."""
    torch.manual_seed(2)
    x = torch.randn(40, 4, dtype=torch.float64)
    white = torch.linalg.qr(x - x.mean(0))[0] * math.sqrt(40)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    return white * torch.tensor(SPECTRUM, dtype=torch.float64).sqrt() @ rotation.T


def without_noise(monkeypatch: pytest.MonkeyPatch, x: Tensor, latents: int) -> Tensor:
    """Examples with draws ±√L eᵢ for ε, whose mean and covariance are N(0, I)'s: expectations of squares are exact."""
    points = math.sqrt(latents) * torch.cat([torch.eye(latents), -torch.eye(latents)]).double()
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: points.repeat(len(x), 1).reshape(shape))
    return x.repeat_interleave(2 * latents, 0)


@torch.no_grad()
def put_at_the_optimum(model: BetaVAE, x: Tensor, price: float) -> Tensor:
    """β and a variance of 1 are a VAE with a variance of β: its optimum is pPCA's, and directions below β collapse.

    Gives the divergence a latent in the mean over examples, ½ ln(λ_j / β) or nothing.
    """
    variance, directions = torch.linalg.eigh(x.T @ x / len(x))
    variance, directions = variance.flip(0)[:3], directions.flip(1)[:, :3]
    active = variance > price
    W = directions * (variance - price).clamp_min(0).sqrt()
    (encoder,), (decoder,) = model.encoder, model.decoder
    assert isinstance(encoder, nn.Linear)
    assert isinstance(decoder, nn.Linear)
    decoder.weight.copy_(W)
    encoder.weight.copy_(torch.cat([(W / variance).T, torch.zeros(3, 4)]))
    encoder.bias[:3], encoder.bias[3:] = 0.0, torch.where(active, price / variance, 1.0).log()
    decoder.bias.zero_()
    model.observation.log_variance.zero_()  # type: ignore[union-attr, operator]
    return torch.where(active, 0.5 * (variance / price).log(), 0.0)


def test_at_beta_one_it_is_the_vae():
    model = build(BetaVAE, BINARY, beta=1.0)
    other = VAE(VAE.tiny(BINARY)[0], BINARY).double()
    other.load_state_dict(model.state_dict())
    x = every_binary_image()
    (value, grads, metrics), (expected, expected_grads, expected_metrics) = play(model, x), play(other, x)
    assert value == pytest.approx(expected, rel=1e-12)  # the same sums in float64, in another order
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], **EXACT)
    assert {name: m.item() for name, m in metrics.items()} == pytest.approx(
        {name: m.item() for name, m in expected_metrics.items()}
    )


def test_beta_is_the_price_of_the_kl_alone_and_none_of_the_bounds():
    x = every_binary_image()
    model = build(BetaVAE, BINARY, beta=1.0)
    dear = of_the_same_weights(model, beta=6.0)
    kl = model.kl(x).sum(1).mean().item()
    assert play(dear, x)[0] == pytest.approx(play(model, x)[0] + 5 * kl)
    bounds = []
    for m in (model, dear):
        torch.manual_seed(3)
        bounds.append(m.log_prob(x, samples=4))
    assert torch.equal(*bounds)


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0, 12.0])
def test_a_linear_model_is_at_rest_at_ppca_with_noise_beta(beta, monkeypatch):
    """The gradient vanishes there, no step away is any better, and directions that are not worth β nats collapse."""
    x = gaussian_data()
    model = build(BetaVAE, DataSpec("vector", (4,), None), beta=beta, **LINEAR)
    kl = put_at_the_optimum(model, x, beta)
    assert int((kl > 0).sum()) == sum(variance > beta for variance in SPECTRUM[:3])
    torch.testing.assert_close(model.kl(x).mean(0), kl, **EXACT)
    repeated = without_noise(monkeypatch, x, 3)
    value, grads, _ = play(model, repeated)
    grads.pop("observation.log_variance")  # held at 1: it is what β is measured in
    for name, grad in grads.items():
        assert grad.abs().max() < 1e-10, name
    best = {name: p.detach().clone() for name, p in model.named_parameters()}
    monkeypatch.undo()
    for _ in range(20):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in grads:
                    p.copy_(best[name] + 0.1 * torch.randn_like(p))
        with monkeypatch.context() as patch:
            assert play(model, without_noise(patch, x, 3))[0] > value


def test_the_capacity_objective_is_the_distance_from_c_which_rises():
    x = every_binary_image()
    model = build(BetaVAE, BINARY, objective="capacity", gamma=7.0, capacity=3.0, rise=0.5)
    kl = model.kl(x).sum(1).mean().item()
    for step, C in ((0, 0.0), (2, 1.2), (5, 3.0), (9, 3.0)):
        value, _, metrics = play(model, x, Clock(step, 10))
        assert metrics["capacity_nats"].item() == pytest.approx(C)
        assert value == pytest.approx(metrics["reconstruction_nats"].item() + 7 * abs(kl - C))
    whole = of_the_same_weights(model, rise=0.0)  # C from the first round on
    assert play(whole, x)[2]["capacity_nats"].item() == pytest.approx(3.0)


@pytest.mark.parametrize("price", [1.0, 4.0, 12.0])
def test_the_capacity_objective_rests_on_the_rate_distortion_curve(price, monkeypatch):
    """At the best distortion for a rate of C the loss falls to neither side: its slopes are (±γ − price) ∇KL there."""
    x, gamma = gaussian_data(), 20.0
    model = build(BetaVAE, DataSpec("vector", (4,), None), objective="capacity", gamma=gamma, rise=0.0, **LINEAR)
    rate = put_at_the_optimum(model, x, price).sum().item()
    # Reverse water-filling: each direction is reproduced but for an error of the price, or not at all.
    distortion = sum(min(price, variance) for variance in SPECTRUM[:3]) + SPECTRUM[3]
    repeated = without_noise(monkeypatch, x, 3)
    slopes = []
    for C, sign in ((rate - 0.1, 1), (rate + 0.1, -1)):
        near = of_the_same_weights(model, capacity=C)
        value, grads, metrics = play(near, repeated)
        # −log p is half the squared error, the variance being 1, and a constant.
        assert 2 * metrics["reconstruction_nats"].item() - 4 * math.log(2 * math.pi) == pytest.approx(distortion)
        assert value == pytest.approx(metrics["reconstruction_nats"].item() + 0.1 * gamma)
        grads.pop("observation.log_variance")
        slopes.append({name: grad / (sign * gamma - price) for name, grad in grads.items()})
    assert max(grad.abs().max().item() for grad in slopes[0].values()) > 0.1  # or the next lines could not fail
    for name, slope in slopes[0].items():
        torch.testing.assert_close(slope, slopes[1][name], **EXACT)


def test_training_keeps_the_rate_on_c(monkeypatch):
    x, C, steps = gaussian_data(), 2.0, 400
    config = {"objective": "capacity", "gamma": 20.0, "capacity": C, "rise": 0.5, **LINEAR}
    model = build(BetaVAE, DataSpec("vector", (4,), None), **config)
    repeated = without_noise(monkeypatch, x, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    off = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(Batch(repeated), "model", Clock(step, steps))
        loss.value.backward()
        optimizer.step()
        schedule.step()
        off.append(abs(loss.metrics["kl_nats"].item() - loss.metrics["capacity_nats"].item()))
    assert off[0] > 1  # it did not start there
    assert max(off[100:]) < 0.5  # it follows while C rises, swinging by a step's size about the kink
    assert max(off[-10:]) < 0.02  # and settles as the steps shrink


@pytest.mark.parametrize("objective", ["beta", "capacity"])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_gradients_reach_every_parameter(objective, network):
    model = build(BetaVAE, BINARY, objective=objective, network=network, channels=(4,))
    grads = play(model, every_binary_image())[1]
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads.values())


def ranks_gap(C: float) -> tuple[float, float]:
    """Of four rows' divergences, three of them on the last rank: the value, and the sum of the ranks' gradients."""
    mine = slice(0, 4) if distributed.world_size() == 1 else (slice(0, 1), slice(1, 4))[distributed.rank()]
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    kl = scale * torch.tensor([[0.1, 0.2], [2.0, 3.0], [1.0, 0.0], [4.0, 0.7]], dtype=torch.float64)[mine]
    value = capacity_gap(kl, C)
    (value * len(kl) / 4).backward()  # as the trainer weighs a rank's share
    assert scale.grad is not None
    return value.item(), distributed.all_reduce(scale.grad).item()


@pytest.mark.parametrize("C", [1.0, 2.7, 5.0])
def test_the_gap_is_that_of_all_ranks_together(C, two_ranks):
    """The mean is 2.75: some rows, and one of the ranks, lie on the other side of C."""
    expected = ranks_gap(C)
    assert expected == pytest.approx((abs(2.75 - C), math.copysign(2.75, 2.75 - C)))
    for found in two_ranks.run(ranks_gap, C):
        assert found == pytest.approx(expected)
