"""The RBM against enumeration (Bernoulli visibles) and quadrature (Gaussian visibles), float64 throughout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_core import distributed
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.boltzmann.rbm import RBM
from dgm_core.nn import rbm as layers
from dgm_core.nn.rbm import BernoulliLayer, BipartiteLayer, GaussianLayer

V, H = 4, 3
CLOCK = Clock(0, 10)


def states(units: int) -> Tensor:
    return torch.cat(list(layers.all_states(units, torch.device("cpu")))).double()


def randomised(layer: BipartiteLayer) -> BipartiteLayer:
    """Weights and biases of order one, offsets anywhere in (0, 1)."""
    layer.double()
    for p in layer.parameters():
        p.data = torch.randn_like(p)
    layer.visible_offset.uniform_()
    layer.hidden_offset.uniform_()
    return layer


def bernoulli(visible: int = V, hidden: int = H) -> BipartiteLayer:
    return randomised(BernoulliLayer(visible, hidden, 0.01))


def gaussian(visible: int = V, hidden: int = H) -> BipartiteLayer:
    return randomised(GaussianLayer(visible, hidden, 0.01, 1.0, learn=True))


def model(visible: int = V, hidden: int = H, **config: Any) -> RBM:
    instance = RBM(RBM.Config(hidden=hidden, **config), DataSpec("vector", (visible,), 2)).double()
    centred = instance.config.centred
    randomised(instance.layer)
    if not centred:
        instance.layer.visible_offset.zero_()
        instance.layer.hidden_offset.zero_()
    return instance


def real_model(dims: int, hidden: int = 3, **config: Any) -> RBM:
    """A Gaussian RBM of data whose location and scale are far from standard."""
    instance = RBM(RBM.Config(hidden=hidden, negative="cd", **config), DataSpec("vector", (dims,), None)).double()
    x = 5 + 3 * torch.randn(500, dims, dtype=torch.float64)
    instance.enter("model", iter([Batch(x[:200]), Batch(x[200:])]))
    with torch.no_grad():
        instance.layer.weight.normal_()
        instance.layer.hidden_bias.normal_()
    return instance


def probabilities(layer: BipartiteLayer) -> Tensor:
    """p(v) of every state by summing the joint energy over h: shares no formula with the free energy."""
    v, h = states(layer.weight.shape[0]), states(layer.weight.shape[1])
    joint = torch.stack([-layer.energy(v, row.expand(len(v), -1)) for row in h], 1)
    return torch.softmax(joint.flatten(), 0).view_as(joint).sum(1)


def transitions(layer: BipartiteLayer) -> Tensor:
    """K(v, v') = Σ_h p(h | v) p(v' | h), from conditionals read off the joint energy."""
    v, h = states(layer.weight.shape[0]), states(layer.weight.shape[1])
    joint = torch.stack([-layer.energy(v, row.expand(len(v), -1)) for row in h], 1)
    return torch.softmax(joint, 1) @ torch.softmax(joint, 0).T


def frequencies(x: Tensor) -> Tensor:
    """Share of each state among rows of bits."""
    code = (x.flatten(1).long() << torch.arange(x[0].numel())).sum(1)
    return torch.bincount(code, minlength=2 ** x[0].numel()).double() / len(x)


def assert_same_distribution(found: Tensor, expected: Tensor, n: int) -> None:
    """Pearson's statistic of n draws stays within six deviations of its mean: chance of a false alarm below 1e-6."""
    freedom = len(expected) - 1
    statistic = n * ((found - expected).square() / expected).sum()
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("make", [bernoulli, gaussian])
def test_free_energy_sums_out_the_hidden_units(make):
    layer = make()
    v, h = (states(V) if make is bernoulli else 3 * torch.randn(16, V).double()), states(H)
    joint = torch.stack([-layer.energy(v, row.expand(len(v), -1)) for row in h])
    assert torch.allclose(layer.free_energy(v), -torch.logsumexp(joint, 0), atol=1e-10)


def test_energy_is_the_centred_one():
    layer = bernoulli()
    v, h = states(V)[5:6], states(H)[3:4]
    u, k = v - layer.visible_offset, h - layer.hidden_offset
    expected = -u @ layer.visible_bias - k @ layer.hidden_bias - (u @ layer.weight * k).sum(1)
    assert torch.allclose(layer.energy(v, h), expected, atol=1e-12)


def test_hidden_free_energy_sums_out_binary_visibles():
    layer = bernoulli()
    v, h = states(V), states(H)
    joint = torch.stack([-layer.energy(row.expand(len(h), -1), h) for row in v])
    assert torch.allclose(layer.hidden_free_energy(h), -torch.logsumexp(joint, 0), atol=1e-10)


def test_hidden_free_energy_integrates_gaussian_visibles():
    layer, h = gaussian(1), states(H)
    # Trapezoid over ±60: with σ and shifts of order one the integrand's tails are far below rounding.
    v = torch.linspace(-60, 60, 60_001, dtype=torch.float64)[:, None]
    joint = torch.stack([-layer.energy(v, row.expand(len(v), -1)) for row in h])
    expected = -torch.logsumexp(joint, 1) - (v[1] - v[0]).log()
    assert torch.allclose(layer.hidden_free_energy(h), expected, atol=1e-8)


@pytest.mark.parametrize(("visible", "hidden"), [(6, 4), (4, 6), (5, 5)])
def test_log_z_is_the_same_from_both_sides_and_in_chunks(visible, hidden, monkeypatch):
    layer = bernoulli(visible, hidden)
    from_v = torch.logsumexp(-layer.free_energy(states(visible)), 0)
    from_h = torch.logsumexp(-layer.hidden_free_energy(states(hidden)), 0)
    assert torch.allclose(from_v, from_h, atol=1e-10)
    assert torch.allclose(layer.log_z(), from_v, atol=1e-10)
    monkeypatch.setattr(layers, "_CHUNK", 7)
    assert torch.allclose(layer.log_z(), from_v, atol=1e-10)


def test_probabilities_sum_to_one_and_come_from_the_joint_energy():
    instance = model()
    log_p = instance.log_prob(states(V).to(torch.uint8))
    assert torch.allclose(log_p.exp(), probabilities(instance.layer), atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2])
def test_gaussian_density_integrates_to_one_in_data_units(dims):
    instance = real_model(dims)
    # Data have mean 5 and deviation 3; components reach a few deviations farther. Error of the sum: far below 1e-6.
    axis = torch.linspace(-60, 70, 521 if dims == 2 else 5201, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)
    total = instance.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** dims
    assert abs(total - 1) < 1e-6


def test_gaussian_moments_by_quadrature_match_samples():
    instance = real_model(1)
    axis = torch.linspace(-60, 70, 5201, dtype=torch.float64)[:, None]
    p = instance.log_prob(axis).exp() * (axis[1] - axis[0])
    mean = (p[:, None] * axis).sum()
    sd = (p[:, None] * (axis - mean).square()).sum().sqrt()
    x = instance.sample(20_000, burn_in=200)
    assert abs(x.mean() - mean) < 6 * sd / math.sqrt(20_000)  # six standard errors of independent chains
    assert abs(x.std() - sd) < 0.05 * sd


def test_gibbs_is_reversible_and_leaves_the_distribution():
    layer = bernoulli()
    p, K = probabilities(layer), transitions(layer)
    assert torch.allclose(p @ K, p, atol=1e-12)
    assert torch.allclose(p[:, None] * K, (p[:, None] * K).T, atol=1e-12)
    n, start = 40_000, 6
    with torch.no_grad():
        ends = layer.gibbs(states(V)[start].expand(n, -1))
    assert_same_distribution(frequencies(ends), K[start], n)


@pytest.mark.parametrize("make", [bernoulli, gaussian])
def test_moving_offsets_keeps_the_distribution(make):
    layer = make()
    v = states(V) if make is bernoulli else 2 * torch.randn(20, V).double()
    with torch.no_grad():
        before = -layer.free_energy(v) - layer.log_z()
        layer.move_offsets(torch.randn(V).double(), torch.randn(H).double())
        assert torch.allclose(-layer.free_energy(v) - layer.log_z(), before, atol=1e-9)


def centred_statistics(layer: BipartiteLayer, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """⟨(v − μ)(h − λ)ᵀ⟩, ⟨v⟩ and ⟨h⟩ with p(h = 1 | v) for h, written out."""
    u = v - layer.visible_offset
    h = torch.sigmoid(layer.hidden_bias + u @ layer.weight)
    return torch.einsum("n,ni,nj->ij", weights, u, h - layer.hidden_offset), weights @ v, weights @ h


def even(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def assert_gradient(layer: BipartiteLayer, data: tuple[Tensor, ...], other: tuple[Tensor, ...], atol: float) -> None:
    """Of the loss: minus the update."""
    for p, plus, minus in zip((layer.weight, layer.visible_bias, layer.hidden_bias), data, other, strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, minus - plus, atol=atol)


@pytest.mark.parametrize("centred", [True, False])
def test_pcd_gradient_is_the_centred_one_of_data_and_chains(centred):
    instance = model(centred=centred, chains=9)
    x = torch.randint(0, 2, (5, V), dtype=torch.uint8)
    instance.particles.copy_(torch.randint(0, 2, (9, V)))
    instance.loss(Batch(x), "model", CLOCK).value.backward()
    layer = instance.layer
    data, chains = (centred_statistics(layer, v, even(len(v))) for v in (x.double(), instance.particles))
    assert_gradient(layer, data, chains, 1e-12)


@pytest.mark.parametrize("steps", [1, 2])
def test_cd_gradient_has_the_expectation_over_its_reconstructions(steps):
    instance = model(negative="cd", gibbs=steps)
    layer, n = instance.layer, 200_000
    start = torch.tensor([3, 9, 9, 12])
    x = states(V)[start].repeat(n // 4, 1).to(torch.uint8)
    instance.loss(Batch(x), "model", CLOCK).value.backward()
    data = torch.bincount(start, minlength=2**V).double() / 4
    reconstructions = data @ torch.linalg.matrix_power(transitions(layer), steps)
    expected = (centred_statistics(layer, states(V), w) for w in (data, reconstructions))
    # Means of 200,000 numbers of size at most one: six standard errors are 0.013.
    assert_gradient(layer, *expected, atol=0.013)


@pytest.mark.parametrize("centred", [True, False])
def test_exact_gradient_is_the_papers_with_the_models_expectations(centred):
    instance = model(negative="exact", centred=centred)
    layer = instance.layer
    x = torch.randint(0, 2, (7, V), dtype=torch.uint8)
    loss = instance.loss(Batch(x), "model", CLOCK).value
    assert torch.allclose(loss, -instance.log_prob(x).mean(), atol=1e-10)
    loss.backward()
    data = centred_statistics(layer, x.double(), even(len(x)))
    assert_gradient(layer, data, centred_statistics(layer, states(V), probabilities(layer).detach()), 1e-10)


def flipped(instance: RBM) -> RBM:
    """The model of 1 − v: with μ → 1 − μ (or, uncentred, with biases that make up for it) p(v) becomes p(1 − v)."""
    other = RBM(instance.config, instance.data).double()
    other.load_state_dict(instance.state_dict())
    with torch.no_grad():
        other.layer.weight.neg_()
        other.layer.visible_bias.neg_()
        if instance.config.centred:
            other.layer.visible_offset.copy_(1 - other.layer.visible_offset)
        else:
            other.layer.hidden_bias.add_(instance.layer.weight.sum(0))
    return other


def fit(instance: RBM, x: Tensor, plays: int) -> None:
    instance.train()
    sgd = torch.optim.SGD(instance.parameters(), lr=0.3)
    for _ in range(plays):
        sgd.zero_grad()
        instance.loss(Batch(x), "model", CLOCK).value.backward()
        sgd.step()
        instance.after("model", CLOCK)


@pytest.mark.parametrize("centred", [True, False])
def test_centred_learning_does_not_care_which_way_bits_are_coded(centred):
    one = model(negative="exact", centred=centred, offset_rate=0.1)
    x, space = torch.randint(0, 2, (6, V), dtype=torch.uint8), states(V).to(torch.uint8)
    two = flipped(one)
    assert torch.allclose(one.log_prob(space), two.log_prob(1 - space), atol=1e-10)
    fit(one, x, 5)
    fit(two, 1 - x, 5)
    apart = (one.log_prob(space) - two.log_prob(1 - space)).abs().max()
    assert apart < 1e-9 if centred else apart > 0.05  # without centring the two go different ways


def test_offsets_follow_the_means_of_the_whole_batch_once_a_play():
    instance = model(offset_rate=0.25, chains=4).train()
    layer = instance.layer
    x = torch.randint(0, 2, (6, V), dtype=torch.uint8)
    mu, lam = layer.visible_offset.clone(), layer.hidden_offset.clone()
    h = torch.sigmoid(layer.hidden_input(x.double())).mean(0)
    before = instance.log_prob(states(V))
    chains = instance.particles.clone()
    for part in x.split(2):
        instance.loss(Batch(part), "model", CLOCK)
    assert torch.equal(layer.visible_offset, mu)
    assert torch.equal(instance.particles, chains)
    torch.manual_seed(3)
    instance.after("model", CLOCK)
    assert torch.allclose(layer.visible_offset, mu + 0.25 * (x.double().mean(0) - mu), atol=1e-12)
    assert torch.allclose(layer.hidden_offset, lam + 0.25 * (h - lam), atol=1e-12)
    assert torch.allclose(instance.log_prob(states(V)), before, atol=1e-10)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(instance.particles, layer.gibbs(chains))
    # A second play starts from empty sums.
    mu = layer.visible_offset.clone()
    instance.loss(Batch(x[:1]), "model", CLOCK)
    instance.after("model", CLOCK)
    assert torch.allclose(layer.visible_offset, mu + 0.25 * (x[0].double() - mu), atol=1e-12)


def test_entering_starts_from_the_base_rates():
    instance = model(centred=False, initial_scale=1e-9)
    with torch.no_grad():
        instance.layer.weight.zero_()
    x = (torch.rand(1000, V) < torch.tensor([0.1, 0.4, 0.5, 0.9])).to(torch.uint8)
    x[:, 2] = 0
    instance.enter("model", iter(Batch(part) for part in x.split(300)))
    p = instance.log_prob(states(V)).exp()
    mean = p @ states(V)
    expected = x.double().mean(0)
    assert torch.allclose(mean[[0, 1, 3]], expected[[0, 1, 3]], atol=1e-9)
    assert 0 < mean[2] < 0.01  # never on in training, but not impossible


def test_a_constant_coordinate_is_no_division_by_zero():
    instance = RBM(RBM.Config(hidden=2, negative="cd"), DataSpec("vector", (2,), None)).double()
    x = torch.randn(50, 2, dtype=torch.float64)
    x[:, 1] = 0.1
    instance.enter("model", iter([Batch(x)]))
    assert instance.log_prob(x).isfinite().all()


@pytest.mark.parametrize("centred", [True, False])
def test_gaussian_hidden_units_start_with_the_activity_asked_for(centred):
    layer = gaussian(3, 1)
    with torch.no_grad():
        layer.reset(torch.randn(3).double(), 0.2, centred=centred)
        log_p = -layer.hidden_free_energy(states(1))
    assert torch.allclose(torch.softmax(log_p, 0)[1], torch.tensor(0.2, dtype=torch.float64), atol=1e-10)


def test_samples_have_the_models_distribution_and_leave_the_chains():
    instance = model(chains=8)
    chains = instance.particles.clone()
    n = 20_000
    x = instance.sample(n, burn_in=100)  # the second eigenvalue of K is far below 0.9 here: 0.9¹⁰⁰ is 3e-5
    assert torch.linalg.eigvals(transitions(instance.layer)).abs().sort().values[-2] < 0.9
    assert x.dtype == torch.uint8
    assert_same_distribution(frequencies(x), probabilities(instance.layer), n)
    assert torch.equal(instance.particles, chains)


def test_completion_draws_from_the_conditional():
    instance = RBM(RBM.Config(hidden=H), DataSpec("image", (1, 2, 2), 2)).double()
    randomised(instance.layer)
    n = 20_000
    x = torch.tensor([[[[1, 0], [1, 1]]]], dtype=torch.uint8).repeat(n, 1, 1, 1)
    observed = torch.tensor([[[True, False], [True, False]]])
    filled = instance.complete(x, observed, burn_in=60)
    assert torch.equal(filled[..., 0], x[..., 0])
    p = probabilities(instance.layer)
    v = states(4)
    agrees = (v[:, 0] == 1) & (v[:, 2] == 1)
    found = frequencies(filled)
    assert found[~agrees].sum() == 0
    assert_same_distribution(found[agrees], p[agrees] / p[agrees].sum(), n)


def test_log_z_is_enumerated_once_for_as_long_as_the_parameters_stay(monkeypatch):
    instance = model()
    calls = []
    enumerate_ = type(instance.layer).log_z
    monkeypatch.setattr(type(instance.layer), "log_z", lambda layer: calls.append(1) or enumerate_(layer))
    x = states(V)
    first = instance.log_prob(x)
    instance.log_prob(x[:3])
    assert len(calls) == 1
    instance.layer.weight.data = instance.layer.weight.data + 1.0  # as swapping in averaged parameters does
    second = instance.log_prob(x)
    assert len(calls) == 2
    assert not torch.allclose(first, second)
    assert abs(second.exp().sum() - 1) < 1e-10


def test_what_it_refuses(monkeypatch):
    with pytest.raises(DataMismatch, match="5 levels"):
        RBM(RBM.Config(), DataSpec("codes", (4, 4), 5))
    large = RBM(RBM.Config(hidden=21), DataSpec("vector", (21,), 2))
    assert not large.exact
    assert large.exact_log_z() is None
    with pytest.raises(RuntimeError, match=r"dgm_core\.evaluation\.ais"):
        large.log_prob(torch.zeros(1, 21, dtype=torch.uint8))
    with pytest.raises(ValueError, match="exact needs at most 20"):
        RBM(RBM.Config(hidden=21, negative="exact"), DataSpec("vector", (21,), None))
    with pytest.raises(DataMismatch, match="empty"):
        large.enter("model", iter([]))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(ValueError, match="do not go round 4 workers"):
        RBM(RBM.Config(chains=3), DataSpec("vector", (4,), 2))
