"""The deep Boltzmann machine against enumeration of all of its units, float64 throughout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_core import distributed
from dgm_core.config import Recipe
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.evaluation.ais import ais, model_states, reverse_ais
from dgm_core.models.boltzmann.dbm import DBM
from tests.contract import checks
from tests.families.boltzmann.enumerated import (
    assert_mean_is,
    assert_reversible,
    assert_same_distribution,
    frequencies,
    pairs,
    randomise,
    states,
)
from tests.support import SPECS, TwoRanks

V = 3
CLOCK = Clock(9, 10)
SHAPES = [(2, 3), (3, 2, 2)]


class ThreeLayers(DBM):
    """A shape and windows that the catalogue's tiny one does not have."""

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[DBM.Config, Recipe]:
        config = DBM.Config(hidden=(5, 4, 3), chains=10, updates=4, tolerance=1e-3, gibbs=2, pretraining=0.6)
        return config, super().tiny(data)[1]


def model(*hidden: int, dims: int = V, scale: float = 1.0, **config: Any) -> DBM:
    instance = DBM(DBM.Config(hidden=hidden, **config), DataSpec("vector", (dims,), 2)).double().eval()
    randomise(instance, scale)
    return instance


def every_state(instance: DBM) -> list[Tensor]:
    """Rows for all joint states, a tensor a layer; x varies slowest."""
    return pairs(*[states(n) for n in instance.sizes])


def log_joint(instance: DBM, layers: list[Tensor]) -> Tensor:
    """−E, written out with the two biases of a layer between."""
    total = (
        layers[0] @ instance.layer(0).visible_bias + layers[-1] @ instance.layer(len(instance.layers) - 1).hidden_bias
    )
    for i in range(1, len(layers) - 1):
        total = total + layers[i] @ (instance.layer(i - 1).hidden_bias + instance.layer(i).visible_bias) / 2
    for layer, (below, above) in zip(instance.layers, itertools.pairwise(layers), strict=True):
        total = total + (below @ layer.weight * above).sum(1)
    return total


def log_z(instance: DBM) -> Tensor:
    return torch.logsumexp(log_joint(instance, every_state(instance)), 0)


def log_likelihood(instance: DBM) -> Tensor:
    """log p(x) of every x."""
    table = log_joint(instance, every_state(instance)).view(2**V, -1)
    return torch.logsumexp(table, 1) - log_z(instance)


def even_and_odd(instance: DBM) -> tuple[Tensor, Tensor]:
    """log p of every state of the even layers together, by every state of the odd ones together."""
    even = torch.cat(pairs(*[states(n) for n in instance.sizes[::2]]), 1)
    odd = torch.cat(pairs(*[states(n) for n in instance.sizes[1::2]]), 1)
    e, o = pairs(even, odd)
    layers: list[Tensor] = []
    for i in range(len(instance.sizes)):
        side, sizes = (o, instance.sizes[1::2]) if i % 2 else (e, instance.sizes[::2])
        layers.append(side.split(list(sizes), 1)[i // 2])
    return even, (log_joint(instance, layers) - log_z(instance)).view(len(even), len(odd))


@pytest.mark.parametrize("hidden", SHAPES)
def test_energy_conditionals_and_log_z_are_the_joint_tables(hidden):
    instance = model(*hidden)
    layers = every_state(instance)
    assert torch.allclose(-instance.energy(layers), log_joint(instance, layers), atol=1e-12)
    found = instance.exact_log_z()
    assert found is not None
    assert torch.allclose(found, log_z(instance), atol=1e-10)
    for level, h in enumerate(layers):
        flipped = [*layers[:level], torch.cat([1 - h[:, :1], h[:, 1:]], 1), *layers[level + 1 :]]
        gain = log_joint(instance, flipped) - log_joint(instance, layers)
        logit = torch.where(h[:, 0] > 0, -gain, gain)
        assert torch.allclose(instance.field(level, dict(enumerate(layers)))[:, 0], logit, atol=1e-10)


@pytest.mark.parametrize("hidden", SHAPES)
def test_gibbs_is_reversible_and_leaves_the_joint(hidden):
    instance, n = model(*hidden), 40_000
    even, table = even_and_odd(instance)
    kernel = (torch.softmax(table, 1) @ torch.softmax(table, 0).T).detach()
    assert_reversible(table.exp().sum(1).detach(), kernel)
    start = 6
    ends = instance.gibbs(even[start].expand(n, -1))
    found = frequencies(ends)
    order = (even.long() << torch.arange(even.shape[1])).sum(1)
    assert_same_distribution(found[order], kernel[start], n)


@pytest.mark.parametrize("hidden", SHAPES)
def test_mean_field_is_at_a_fixed_point_and_climbs_to_it(hidden):
    instance, x = model(*hidden, scale=0.7), states(V)
    mu = instance.mean_field(x, 500, 0.0)
    for level, m in enumerate(mu, 1):
        field = instance.field(level, dict(enumerate([x, *mu])))
        assert torch.allclose(m, torch.sigmoid(field), atol=1e-9)
    bounds = []
    for updates in range(8):
        q = instance.mean_field(x, updates, 0.0)
        entropy = sum(-(m * m.log() + (1 - m) * (1 - m).log()).sum(1) for m in q)
        bounds.append(entropy - instance.energy([x, *q]))
    assert all((b >= a - 1e-12).all() for a, b in itertools.pairwise(bounds))
    assert (bounds[-1] > bounds[0] + 1e-6).any()


@pytest.mark.parametrize("hidden", SHAPES)
def test_the_bound_is_the_enumerated_one_and_below_the_truth(hidden):
    instance, x = model(*hidden), states(V)
    bound = instance.log_prob(x.to(torch.uint8))
    assert (bound < log_likelihood(instance)).all()
    mu = instance.mean_field(x, 500, 0.0)
    for row in range(len(x)):
        rows = pairs(*[states(n) for n in hidden])
        log_q = torch.stack(
            [(h * m[row].log() + (1 - h) * (1 - m[row]).log()).sum(1) for h, m in zip(rows, mu, strict=True)]
        ).sum(0)
        log_p = log_joint(instance, [x[row].expand(len(rows[0]), -1), *rows]) - log_z(instance)
        # The model stops when means move by less than 1e-6, where the bound is flat.
        assert torch.allclose(bound[row], (log_q.exp() * (log_p - log_q)).sum(), atol=1e-9)


@pytest.mark.parametrize("hidden", SHAPES)
def test_the_bound_is_tight_where_the_posterior_is_factorial(hidden):
    instance = model(*hidden)
    for layer in list(instance.layers)[1:]:
        layer.weight.data.zero_()
    assert torch.allclose(instance.log_prob(states(V).to(torch.uint8)), log_likelihood(instance), atol=1e-9)


@pytest.mark.parametrize("hidden", SHAPES)
def test_importance_weights_average_to_the_unnormalised_likelihood(hidden):
    instance = model(*hidden, scale=0.7)
    truth = log_likelihood(instance) + log_z(instance)
    weights = instance.log_weights(states(V), 20_000).exp()
    for row, expected in zip(weights, truth.exp().detach(), strict=True):
        assert_mean_is(row, expected)
    x = states(V).to(torch.uint8)
    # Logarithms of means of 20,000 weights whose deviation is of their mean's size: errors near 0.007.
    assert torch.allclose(instance.log_prob(x, samples=20_000), log_likelihood(instance), atol=0.05)


def joint_gradients(instance: DBM, x: Tensor) -> list[Tensor]:
    """Of the joint loss, with the chains' states in the model's own shares."""
    even, table = even_and_odd(instance)
    for state, share in zip(even, table.exp().sum(1).detach(), strict=True):
        instance.particles.copy_(state[None])
        (share * instance.loss(Batch(x.to(torch.uint8)), "joint", CLOCK).value).backward()
    found = [p.grad.clone() for p in instance.parameters()]
    instance.zero_grad()
    return found


def assert_gradients(instance: DBM, found: list[Tensor]) -> None:
    for (name, p), g in zip(instance.named_parameters(), found, strict=True):
        assert torch.allclose(g, p.grad, atol=1e-10), name


@pytest.mark.parametrize("hidden", SHAPES)
def test_joint_gradients_equal_the_enumerated_ones(hidden):
    """The gradient of −bound at the mean field held fixed: E_q[E] and log Z by brute force."""
    instance = model(*hidden, chains=1, updates=500, joint_rate=0.5)
    x = states(V)[torch.tensor([1, 6, 6])]
    found = joint_gradients(instance, x)
    assert all(g.abs().max() > 1e-3 for g in found)
    value, rows = log_z(instance), pairs(*[states(n) for n in hidden])
    h, mu = torch.cat(rows, 1), torch.cat(instance.mean_field(x, 500, 0.0), 1)
    for example, m in zip(x, mu, strict=True):
        q = (h * m + (1 - h) * (1 - m)).prod(1)
        value = value - (q * log_joint(instance, [example.expand(len(h), -1), *rows])).sum() / len(x)
    (0.5 * value).backward()
    assert_gradients(instance, found)


def test_where_the_posterior_is_factorial_the_joint_gradient_is_the_likelihoods():
    instance = model(2, 3, chains=1, updates=500, joint_rate=1.0)
    instance.layer(1).weight.data.zero_()
    x = torch.tensor([1, 6, 6])
    found = joint_gradients(instance, states(V)[x])
    (-log_likelihood(instance)[x].mean()).backward()
    assert_gradients(instance, found)


def doubled_joint(instance: DBM, level: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Copies of the lower units, of the upper ones, and log of their joint, from the sum over all pairs of copies."""
    rbm, layer = instance.doubled(level), instance.layer(level)
    lower, upper = states(layer.weight.shape[0]), states(layer.weight.shape[1])
    rows = pairs(*[lower] * rbm.below, *[upper] * rbm.above)
    below, above = rows[: rbm.below], rows[rbm.below :]
    total = sum(s @ layer.visible_bias for s in below) + sum(t @ layer.hidden_bias for t in above)
    factor = 2 if rbm.below == rbm.above == 1 else 1
    for s, t in itertools.product(below, above):
        total = total + factor * (s @ layer.weight * t).sum(1)
    assert isinstance(total, Tensor)
    return below, above, total


@pytest.mark.parametrize("level", [0, 1, 2])
def test_pretraining_rbms_are_those_of_the_copies(level):
    instance = model(2, 3, 2)
    rbm = instance.doubled(level)
    assert (rbm.below, rbm.above, rbm.weight) == [(2, 1, 1.0), (1, 1, 2.0), (1, 2, 1.0)][level]
    below, _, joint = doubled_joint(instance, level)
    n = 2 ** (below[0].shape[1] * rbm.below)
    table = joint.view(n, -1)
    s = torch.stack(below).sum(0).view(n, -1, below[0].shape[1])[:, 0]
    assert torch.allclose(rbm.free_energy(s), -torch.logsumexp(table, 1), atol=1e-10)
    # One step of the chain, by the sum of the copies.
    kernel = (torch.softmax(table, 1) @ torch.softmax(table, 0).T).detach()
    codes = (s.long() * 3 ** torch.arange(s.shape[1])).sum(1)
    draws = 40_000
    ends = rbm.gibbs(s[n // 2].expand(draws, -1))
    got = torch.bincount((ends.long() * 3 ** torch.arange(s.shape[1])).sum(1), minlength=3 ** s.shape[1]) / draws
    expected = torch.zeros_like(got, dtype=torch.float64).index_add_(0, codes, kernel[n // 2])
    assert_same_distribution(got[expected > 0].double(), expected[expected > 0], draws)


@pytest.mark.parametrize("hidden", SHAPES)
def test_a_units_input_is_the_average_of_what_its_two_rbms_say(hidden):
    """With both copies at one state, from their joint tables: half of the one and half of the other is the whole."""
    instance = model(*hidden)
    for level in range(1, len(hidden)):
        below, above, joint = doubled_joint(instance, level - 1)
        h_below, h_above = states(instance.sizes[level - 1]), states(instance.sizes[level + 1])
        from_below = [unit_logit(below, above[0], joint, [h] * len(below)) for h in h_below]
        below, above, joint = doubled_joint(instance, level)
        from_above = [unit_logit(above, below[0], joint, [h] * len(above)) for h in h_above]
        for (i, a), (j, b) in itertools.product(enumerate(from_below), enumerate(from_above)):
            known = {level - 1: h_below[i : i + 1], level + 1: h_above[j : j + 1]}
            assert torch.allclose((a + b) / 2, instance.field(level, known)[0, 0], atol=1e-10)


def unit_logit(given: list[Tensor], unit: Tensor, joint: Tensor, at: list[Tensor]) -> Tensor:
    """Log-odds of the first unit of `unit`, given that each of `given` stands as in `at`."""
    rows = torch.stack([(g == h).all(1) for g, h in zip(given, at, strict=True)]).all(0)
    on = torch.logsumexp(joint[rows & (unit[:, 0] == 1)], 0)
    return on - torch.logsumexp(joint[rows & (unit[:, 0] == 0)], 0)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_pretraining_gradient_is_that_of_contrastive_divergence(level):
    instance, n = model(2, 3, 2), 100_000
    x = states(V)[5]
    instance.loss(Batch(x.expand(n, -1).to(torch.uint8)), f"layer{level + 1}", CLOCK).value.backward()
    moved = {name for name, p in instance.named_parameters() if p.grad is not None}
    assert moved == {f"layers.{level}.{part}" for part in ("weight", "visible_bias", "hidden_bias")}
    rbm, layer = instance.doubled(level), instance.layer(level)
    with torch.no_grad():
        h = x.expand(n, -1)
        for below in range(level):
            h = (
                torch.rand(n, instance.sizes[below + 1]) < torch.sigmoid(instance.doubled(below).recognise(h))
            ).double()
        data = rbm.below * h
        chain = rbm.gibbs(data)
        upper = [torch.sigmoid(layer.hidden_bias + rbm.weight * (s @ layer.weight)) for s in (data, chain)]
    # ⟨copies of the lower units⟩ after a step less before; both sides are means of 100,000 draws of size at most two,
    # and six standard errors of their difference are 0.06.
    assert torch.allclose(layer.visible_bias.grad, (chain - data).mean(0), atol=0.06)
    products = [rbm.weight * rbm.above * s.T @ u / n for s, u in zip((data, chain), upper, strict=True)]
    assert torch.allclose(layer.weight.grad, products[1] - products[0], atol=0.06)
    assert torch.allclose(layer.hidden_bias.grad, rbm.above * (upper[1] - upper[0]).mean(0), atol=0.06)
    assert layer.weight.grad.abs().max() > 0.12


def test_tolerance_lets_an_example_stand_still_whatever_its_batch():
    instance, x = model(3, 3), states(V)
    whole = instance.mean_field(x, 50, 1e-2)
    alone = [instance.mean_field(row[None], 50, 1e-2) for row in x]
    for level, m in enumerate(whole):
        assert torch.allclose(m, torch.cat([a[level] for a in alone]), atol=1e-12)
    exact = instance.mean_field(x, 500, 0.0)
    off = max(float((a - b).abs().max()) for a, b in zip(whole, exact, strict=True))
    assert 1e-6 < off < 0.5  # it did stop early


@pytest.mark.parametrize("hidden", [(6, 5), (5, 4, 3)])
def test_annealing_finds_log_z(hidden):
    instance = model(*hidden, scale=0.6)
    truth = log_z(instance)
    instance.base_mean.uniform_(0.2, 0.8)
    betas = torch.linspace(0, 1, 300).tolist()
    forward = ais(instance, chains=400, betas=betas)
    backward = reverse_ais(instance, model_states(instance, forward, burn_in=50), betas=betas)
    assert abs(forward.log_z - truth) < 0.1  # standard errors of both are near 0.02
    assert abs(backward.log_z - truth) < 0.1


def test_the_assembled_machine_follows_the_parameters():
    instance = model(2, 3)
    first = instance.machine
    assert instance.machine is first
    instance.layer(1).weight.data = instance.layer(1).weight.data + 1.0  # as swapping in averaged parameters does
    assert torch.equal(instance.machine.weight[V:], instance.layer(1).weight.T)
    found = instance.exact_log_z()
    assert found is not None
    assert torch.allclose(found, log_z(instance), atol=1e-10)


@pytest.mark.parametrize("hidden", SHAPES)
def test_samples_have_the_models_distribution_and_leave_the_chains(hidden):
    instance, n = model(*hidden, scale=0.7, chains=8), 20_000
    table = even_and_odd(instance)[1]
    kernel = torch.softmax(table, 1) @ torch.softmax(table, 0).T
    assert torch.linalg.eigvals(kernel).abs().sort().values[-2] < 0.9  # 0.9¹⁰⁰ is 3e-5
    chains = instance.particles.clone()
    x = instance.sample(n, burn_in=100)
    assert x.dtype == torch.uint8
    p = torch.zeros(2**V).double()
    p[(states(V).long() << torch.arange(V)).sum(1)] = log_likelihood(instance).exp().detach()
    assert_same_distribution(frequencies(x), p, n)
    assert torch.equal(instance.particles, chains)


def test_completion_draws_from_the_conditional():
    instance, n = model(2, 3, scale=0.7), 20_000
    x = torch.tensor([[1, 0, 1]], dtype=torch.uint8).repeat(n, 1)
    filled = instance.complete(x, torch.tensor([[True, False, False]]), burn_in=60)
    assert torch.equal(filled[:, 0], x[:, 0])
    p = log_likelihood(instance).exp()
    agrees = states(V)[:, 0] == 1
    found = frequencies(filled)
    assert found[~agrees].sum() == 0
    assert_same_distribution(found[agrees], p[agrees] / p[agrees].sum(), n)


def test_chains_move_once_a_joint_play_and_only_in_training():
    instance = model(2, 3, chains=4, gibbs=3)
    x = Batch(states(V).to(torch.uint8))
    for turn, training, moves in [("layer1", True, False), ("joint", False, False), ("joint", True, True)]:
        instance.train(training)
        before = instance.particles.clone()
        for part in (x, x):
            instance.loss(part, turn, CLOCK)
        assert torch.equal(instance.particles, before)
        torch.manual_seed(3)
        instance.after(turn, CLOCK)
        torch.manual_seed(3)
        expected = before
        for _ in range(3 if moves else 0):
            expected = instance.gibbs(expected)
        assert torch.equal(instance.particles, expected)


def test_entering_starts_layers_and_chains_from_means():
    instance, x = model(2, 3, chains=50), (torch.rand(3000, V) < torch.tensor([0.2, 0.5, 0.9])).to(torch.uint8)

    def batches() -> Iterator[Batch]:
        return iter(Batch(part) for part in x.split(1000))

    instance.enter("layer1", batches())
    assert torch.allclose(torch.sigmoid(instance.layer(0).visible_bias), x.double().mean(0), atol=1e-12)
    instance.enter("layer2", batches())
    first = instance.layer(0)
    mean = torch.sigmoid(2 * x.double() @ first.weight + first.hidden_bias).mean(0)
    assert torch.allclose(torch.sigmoid(instance.layer(1).visible_bias), mean, atol=1e-12)
    instance.enter("joint", batches())
    assert torch.allclose(instance.base_mean[:V], x.double().mean(0), atol=1e-12)
    assert set(instance.particles.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("hidden", SHAPES)
def test_windows_follow_each_other_and_fill_the_run(hidden):
    turns = model(*hidden, pretraining=0.7).turns()
    assert [turn.name for turn in turns] == [*(f"layer{i + 1}" for i in range(len(hidden))), "joint"]
    assert all(sum(turn.live(Clock(step, 97)) for turn in turns) == 1 for step in range(97))
    assert all(a.window[1] == b.window[0] for a, b in itertools.pairwise(turns))


@pytest.mark.parametrize("check", checks.PER_SPEC, ids=lambda f: f.__name__)
def test_three_layers_keep_the_contract(check):
    check(ThreeLayers, SPECS["binary_vector"])


def test_three_layers_over_microbatches_and_ranks(two_ranks: TwoRanks):
    checks.microbatches_equal_one_batch(ThreeLayers, SPECS["binary_vector"])
    checks.two_ranks_equal_one(ThreeLayers, SPECS["binary_vector"], two_ranks)


def test_what_it_refuses(monkeypatch):
    with pytest.raises(DataMismatch, match="real-valued"):
        DBM(DBM.Config(), DataSpec("vector", (3,), None))
    for hidden in [(3,), (3, 3, 3, 3)]:
        with pytest.raises(ValueError, match="hidden"):
            DBM.Config(hidden=hidden)
    with pytest.raises(RuntimeError, match=r"dgm_core\.evaluation\.ais"):
        model(21, 21).log_prob(torch.zeros(1, V, dtype=torch.uint8))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(ValueError, match="do not go round 4 workers"):
        DBM(DBM.Config(chains=3), DataSpec("vector", (4,), 2))
