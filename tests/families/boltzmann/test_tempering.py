"""Tempered chains against the joint of all temperatures, by the transition matrix of a tiny net, float64 throughout."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.boltzmann.rbm import RBM
from dgm_core.nn import tempering
from dgm_core.nn.rbm import BernoulliLayer, BipartiteLayer, GaussianLayer
from dgm_core.nn.tempering import TemperedLayer, ladder
from tests.families.boltzmann.enumerated import assert_same_distribution, states

CLOCK = Clock(0, 10)
V, H, T = 2, 2, 3


def randomised(layer: BipartiteLayer) -> BipartiteLayer:
    """Weights of order two, so that temperatures differ, and offsets anywhere in (0, 1)."""
    layer.double()
    for p in layer.parameters():
        p.data = 2 * torch.randn_like(p)
    layer.visible_offset.uniform_()
    layer.hidden_offset.uniform_()
    return layer


def tempered(layer: BipartiteLayer, count: int = T) -> TemperedLayer:
    base = torch.randn_like(layer.visible_bias)
    return TemperedLayer(layer, base, ladder(count, base))


def at_temperature(chain: TemperedLayer, beta: float) -> BipartiteLayer:
    """An RBM of its own with the parameters that the temperature gives it."""
    layer = copy.deepcopy(chain.layer)
    with torch.no_grad():
        layer.weight.mul_(beta)
        layer.hidden_bias.mul_(beta)
        layer.visible_bias.copy_(chain.base_bias + beta * (chain.layer.visible_bias - chain.base_bias))
    return layer


def joint_states(count: int = T) -> Tensor:
    """(states of all temperatures together, T, V), the last temperature's states fastest."""
    v = states(V)
    return torch.stack([v[list(row)] for row in itertools.product(range(len(v)), repeat=count)])


def product_of_marginals(chain: TemperedLayer) -> Tensor:
    """Π_t p_{β_t}(v_t) of `joint_states`, each factor from the joint energy of its own RBM."""
    parts = []
    for beta in chain.betas.tolist():
        layer = at_temperature(chain, beta)
        v, h = states(V), states(H)
        joint = torch.stack([-layer.energy(v, row.expand(len(v), -1)) for row in h], 1)
        parts.append(torch.softmax(joint.flatten(), 0).view_as(joint).sum(1).detach())
    return torch.einsum("i,j,k->ijk", *parts).flatten()


def places(v: Tensor) -> Tensor:
    """Of joint states among `joint_states`."""
    code = (v.long() << torch.arange(V)).sum(-1)  # of a temperature's, as `states` numbers them
    return (code * (2**V) ** torch.arange(v.shape[1] - 1, -1, -1)).sum(1)


def gibbs_matrix(chain: TemperedLayer, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Of a Gibbs step of all temperatures: hidden states put in by hand, chances as the code's logits give them."""
    v, h = states(V), states(H)
    seen: dict[str, Tensor] = {}
    kernel = torch.zeros(T, len(v), len(v)).double()
    with monkeypatch.context() as patch:
        for row in h:

            def put_in(logits: Tensor, row: Tensor = row) -> Tensor:
                seen["hidden"] = logits
                return row.expand_as(logits)

            def look(d: Tensor) -> Tensor:
                seen["visible"] = d
                return d

            patch.setattr(tempering, "draw_bernoulli", put_in)
            patch.setattr(chain.layer, "draw_visible", look)
            chain.gibbs(v[:, None].expand(-1, T, -1))
            p_h, p_v = torch.sigmoid(seen["hidden"]), torch.sigmoid(seen["visible"])
            chance = (row * p_h + (1 - row) * (1 - p_h)).prod(-1)  # (v, T)
            to = (v * p_v[:, :, None] + (1 - v) * (1 - p_v[:, :, None])).prod(-1)  # (v, T, v')
            kernel += (chance[..., None] * to).transpose(0, 1)
    return torch.kron(torch.kron(kernel[0], kernel[1]), kernel[2])


def swap_matrix(chain: TemperedLayer, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Of the swaps, every outcome put in by hand, chances as the code's ratios give them."""
    v = joint_states()
    found = torch.zeros(len(v), len(v)).double()
    for outcome in itertools.product((True, False), repeat=T - 1):
        ratios: list[Tensor] = []

        def decide(log_ratio: Tensor, outcome: tuple[bool, ...] = outcome, ratios: list[Tensor] = ratios) -> Tensor:
            ratios.append(log_ratio[:, 0])
            return torch.full_like(log_ratio, outcome[len(ratios) - 1], dtype=torch.bool)

        with monkeypatch.context() as patch:
            patch.setattr(tempering, "_accept", decide)
            moved, swapped = chain.swap(v)
        chance = torch.ones(len(v)).double()
        for yes, log_ratio in zip(outcome, ratios, strict=True):
            p = log_ratio.exp().clamp(max=1)
            chance = chance * (p if yes else 1 - p)
        assert (swapped == torch.tensor(outcome)).all()
        found.index_put_((torch.arange(len(v)), places(moved)), chance, accumulate=True)
    return found


def test_gibbs_and_swaps_each_leave_the_joint_of_all_temperatures(monkeypatch):
    chain = tempered(randomised(BernoulliLayer(V, H, 0.01)))
    p = product_of_marginals(chain)
    for kernel in (gibbs_matrix(chain, monkeypatch), swap_matrix(chain, monkeypatch)):
        assert torch.allclose(kernel.sum(1), torch.ones(len(p)).double(), atol=1e-12)
        assert torch.allclose(p @ kernel, p, atol=1e-12)
        assert (kernel - torch.eye(len(p))).abs().max() > 0.1  # something moves
    # A ratio with a temperature too many or a sign turned would fail: other temperatures' product is not invariant.
    other = copy.copy(chain)
    other.betas = chain.betas.flip(0)
    assert not torch.allclose(p @ swap_matrix(other, monkeypatch), p, atol=1e-3)


def test_draws_follow_both_matrices(monkeypatch):
    chain, n = tempered(randomised(BernoulliLayer(V, H, 0.01))), 40_000
    steps = {
        "gibbs": (lambda v: chain.gibbs(v), gibbs_matrix(chain, monkeypatch)),
        "swap": (lambda v: chain.swap(v)[0], swap_matrix(chain, monkeypatch)),
    }
    torch.manual_seed(0)
    for step, kernel in steps.values():
        for start in (6, 27, 57):
            ends = places(step(joint_states()[start].expand(n, -1, -1)))
            found, expected = torch.bincount(ends, minlength=len(kernel)).double() / n, kernel[start]
            assert found[expected == 0].sum() == 0
            assert_same_distribution(found[expected > 0], expected[expected > 0], n)


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_ratios_are_those_of_each_temperatures_free_energy(kind, monkeypatch):
    """With Gaussian visibles there is no matrix: log r against free energies of RBMs of their own."""
    many = 4
    layer = BernoulliLayer(3, H, 0.01) if kind == "bernoulli" else GaussianLayer(3, H, 0.01, 1.0, learn=True)
    chain = tempered(randomised(layer), many)
    v = torch.randint(0, 2, (9, many, 3)).double() if kind == "bernoulli" else torch.randn(9, many, 3).double()
    ratios: list[Tensor] = []

    def refuse(log_ratio: Tensor) -> Tensor:
        ratios.append(log_ratio)
        return torch.zeros_like(log_ratio, dtype=torch.bool)

    monkeypatch.setattr(tempering, "_accept", refuse)
    moved, swapped = chain.swap(v)
    assert torch.equal(moved, v)
    assert not swapped.any()
    at = [at_temperature(chain, beta) for beta in chain.betas.tolist()]
    expected = []
    for i in range(many - 1):
        here, there = at[i], at[i + 1]
        stay = here.free_energy(v[:, i]) + there.free_energy(v[:, i + 1])
        expected.append(stay - here.free_energy(v[:, i + 1]) - there.free_energy(v[:, i]))
    assert torch.allclose(ratios[0], torch.stack(expected[::2], 1), atol=1e-10)
    assert torch.allclose(ratios[1], torch.stack(expected[1::2], 1), atol=1e-10)


def test_a_swap_takes_whole_states_with_it(monkeypatch):
    chain = tempered(randomised(BernoulliLayer(V, H, 0.01)), 4)
    monkeypatch.setattr(tempering, "_accept", lambda r: torch.ones_like(r, dtype=torch.bool))
    v = torch.arange(4.0).double()[None, :, None].expand(1, 4, V)
    assert chain.swap(v)[0][0, :, 0].tolist() == [1.0, 3.0, 0.0, 2.0]  # (1 2)(3 4), then (2 3)


def test_gaussian_states_at_each_temperature_have_its_moments():
    torch.manual_seed(0)
    chain = tempered(randomised(GaussianLayer(2, H, 0.01, 1.0, learn=True)))
    n = 4_000
    v = torch.randn(n, T, 2).double()
    for _ in range(40):
        v = chain.swap(chain.gibbs(v))[0]
    h = states(H)
    for t, beta in enumerate(chain.betas.tolist()):
        layer = at_temperature(chain, beta)
        p = torch.softmax(-layer.hidden_free_energy(h), 0)
        means = layer.visible_offset + layer.visible_input(h)
        mean = p @ means
        variance = p @ (means - mean).square() + layer.log_variance.exp()
        found = v[:, t]
        assert ((found.mean(0) - mean).abs() < 6 * (variance / n).sqrt()).all()  # six standard errors
        # A deviation of a variance of 4,000 draws, whatever the modes, is below √(2 / 4,000), 0.022, of it.
        assert torch.allclose(found.var(0), variance, rtol=0.15)


def model(**config: Any) -> RBM:
    given = {"hidden": H, "negative": "tempering", "temperatures": T, "chains": 8, **config}
    instance = RBM(RBM.Config(**given), DataSpec("vector", (V,), 2)).double()
    randomised(instance.layer)
    return instance


def test_samples_of_a_play_are_the_models_own_temperature():
    """CD's gradient with the states at β = 1 for samples, and no others."""
    instance = model(centred=False)
    instance.particles.copy_(torch.randint(0, 2, instance.particles.shape))
    x = torch.tensor([[1, 0], [1, 1], [0, 0]], dtype=torch.uint8)
    instance.loss(Batch(x), "model", CLOCK).value.backward()
    found = [p.grad.clone() for p in instance.layer.parameters() if p.grad is not None]
    instance.zero_grad()
    layer = instance.layer
    (layer.free_energy(x.double()).mean() - layer.free_energy(instance.particles[:, 0]).mean()).backward()
    for g, p in zip(found, layer.parameters(), strict=True):
        assert p.grad is not None
        assert torch.allclose(g, p.grad, atol=1e-12)


def test_persistent_chains_reach_the_models_distribution_through_play_after_play():
    instance = model(chains=4_000, centred=False).train()
    torch.manual_seed(0)
    instance.particles.copy_(torch.zeros_like(instance.particles))
    for _ in range(60):
        instance.after("model", CLOCK)
    found = instance.particles[:, 0]
    code = (found.long() << torch.arange(V)).sum(1)
    share = torch.bincount(code, minlength=2**V).double() / len(found)
    expected = instance.log_prob(states(V).to(torch.uint8)).exp().detach()
    assert_same_distribution(share, expected, len(found))


def test_rates_in_the_metrics_are_the_chance_of_a_swap():
    instance = model(chains=2_000, centred=False, temperatures=2).train()
    torch.manual_seed(0)
    for _ in range(200):  # the running mean forgets where it began: 0.95²⁰⁰ is 4e-5
        instance.after("model", CLOCK)
    chain = TemperedLayer(instance.layer, instance.layer.bias_for(instance.base_mean), ladder(2, instance.base_mean))
    v = states(V)
    pairs = torch.stack([v[list(row)] for row in itertools.product(range(len(v)), repeat=2)])
    at = [at_temperature(chain, beta) for beta in (1.0, 0.0)]
    log_p = [torch.log_softmax(-layer.free_energy(v), 0) for layer in at]
    joint = (log_p[0][:, None] + log_p[1]).exp()
    accept = (log_p[0] + log_p[1][:, None] - log_p[0][:, None] - log_p[1]).exp().clamp(max=1)
    exact = (joint * accept).sum().item()
    assert len(pairs) == joint.numel()
    metrics = instance.loss(Batch(v.to(torch.uint8)), "model", CLOCK).metrics
    # An average over some twenty plays of 2,000 chains: a standard error of 0.0025 were the plays independent.
    assert abs(metrics["swap_rate"].item() - exact) < 0.03
    assert metrics["swap_rate"] == metrics["swap_rate_least"]
    assert 0.05 < exact < 0.99


def test_tempering_crosses_between_modes_that_gibbs_sampling_does_not():
    """Two modes, 00… and 11…, with as much mass each: from one of them half of the chains must find the other."""
    d = 8
    found = {}
    for negative in ("pcd", "tempering"):
        config = RBM.Config(hidden=1, negative=negative, chains=200, centred=False, temperatures=10)
        instance = RBM(config, DataSpec("vector", (d,), 2)).double().train()
        with torch.no_grad():
            instance.layer.weight.fill_(8.0)
            instance.layer.visible_bias.fill_(-4.0)
            instance.layer.hidden_bias.fill_(-4.0 * d)  # softplus(4) − softplus(−4) = 4: either mode as likely
        instance.particles.zero_()
        torch.manual_seed(0)
        for _ in range(150):
            instance.after("model", CLOCK)
        found[negative] = instance.standing().mean().item()
    exact = (instance.log_prob(states(d).to(torch.uint8)).exp() @ states(d)).mean().item()
    assert abs(exact - 0.5) < 1e-9
    assert abs(found["tempering"] - exact) < 0.2  # 200 chains: six standard errors
    assert found["pcd"] < 0.2
