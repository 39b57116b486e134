"""The deep belief net against enumeration of all of its layers, float64 throughout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.evaluation.ais import ais, model_states, reverse_ais
from dgm_core.evaluation.likelihood import likelihood
from dgm_core.evaluation.record import EvaluationConfig
from dgm_core.models.boltzmann.dbn import DBN
from tests.families.boltzmann.enumerated import (
    assert_mean_is,
    assert_reversible,
    assert_same_distribution,
    frequencies,
    log_bernoulli,
    pairs,
    randomise,
    states,
)

V = 4
CLOCK = Clock(0, 10)


def model(*hidden: int, depth: int | None = None, dims: int = V, scale: float = 1.0, **config: Any) -> DBN:
    instance = DBN(DBN.Config(hidden=hidden, **config), DataSpec("vector", (dims,), 2)).double().eval()
    randomise(instance, scale)
    instance.depth.fill_(len(hidden) if depth is None else depth)
    return instance


def data(n: int = 40, dims: int = V) -> Tensor:
    return (torch.rand(n, dims) < torch.linspace(0.2, 0.8, dims)).to(torch.uint8)


def down(instance: DBN, level: int, above: Tensor) -> Tensor:
    """p(h^level = 1 | h^{level + 1}), written out."""
    layer = instance.layer(level)
    return torch.sigmoid(layer.visible_bias + above @ layer.weight.T)


def up(instance: DBN, level: int, below: Tensor) -> Tensor:
    """q(h^{level + 1} = 1 | h^level), written out."""
    return torch.sigmoid(below @ instance.up[level] + instance.layer(level).hidden_bias)


def top_table(instance: DBN) -> tuple[Tensor, Tensor]:
    """log p(h^{L−1}) of every state, and log Z, by summing the joint over the top two layers."""
    layer = instance.layer(len(instance.layers) - 1)
    h, k = states(layer.weight.shape[0]), states(layer.weight.shape[1])
    log_joint = (h @ layer.visible_bias)[:, None] + k @ layer.hidden_bias + h @ layer.weight @ k.T
    log_z = torch.logsumexp(log_joint.flatten(), 0)
    return torch.logsumexp(log_joint, 1) - log_z, log_z


def log_likelihood(instance: DBN) -> Tensor:
    """log p(x) of every x, one layer after the other from the top."""
    table = top_table(instance)[0]
    for level in reversed(range(len(instance.layers) - 1)):
        below, above = states(instance.sizes[level]), states(instance.sizes[level + 1])
        table = torch.logsumexp(log_bernoulli(below[:, None], down(instance, level, above)) + table, 1)
    return table


def recognised(instance: DBN, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every h¹, …, h^{L−1} and log q(h | x)."""
    rows = pairs(*[states(n) for n in instance.sizes[1:-1]])
    below = [x.expand(len(rows[0]), -1), *rows[:-1]]
    log_q = sum(log_bernoulli(h, up(instance, i, b)) for i, (b, h) in enumerate(zip(below, rows, strict=True)))
    assert isinstance(log_q, Tensor)
    return rows, log_q


@pytest.mark.parametrize("hidden", [(3, 2), (3, 2, 3)])
def test_weights_average_to_the_likelihood_and_their_logs_stay_below_it(hidden, monkeypatch):
    instance = model(*hidden)
    truth, (_, log_z) = log_likelihood(instance), top_table(instance)
    bounds = []
    for x, log_p in zip(states(V), truth, strict=True):
        rows, log_q = recognised(instance, x)
        monkeypatch.setattr(instance, "recognise", lambda v, levels, rows=rows: [v, *rows])
        log_w = instance.bound(x.expand(len(log_q), -1)) - log_z
        assert torch.allclose(torch.logsumexp(log_q + log_w, 0), log_p, atol=1e-10)
        bounds.append((log_q.exp() * log_w).sum())
    assert (torch.stack(bounds) < truth).all()
    monkeypatch.undo()
    x = states(V)[5:6].to(torch.uint8)
    with torch.no_grad():
        assert_mean_is(instance.log_prob(x.expand(50_000, -1)), bounds[5].item())


def test_many_draws_come_near_the_likelihood(monkeypatch):
    instance = model(3, 2, scale=0.7)
    x = states(V).to(torch.uint8)
    # Weights between e⁻³ and e³ of their mean: with 50,000 of them the logarithm's error is far below 0.05.
    assert torch.allclose(instance.log_prob(x, samples=50_000), log_likelihood(instance), atol=0.05)
    monkeypatch.setattr("dgm_core.models.boltzmann.base.MEMORY", 4 * 16 * 7)
    assert torch.allclose(instance.log_prob(x, samples=5_000), log_likelihood(instance), atol=0.2)


def test_tied_weights_make_the_rbm_again_and_the_bound_exact():
    """Hinton's complementary prior: a layer that starts from the transposed one below leaves the distribution."""
    instance = model(3, V, depth=1)
    x = states(V).to(torch.uint8)
    rbm = instance.log_prob(x)
    assert torch.allclose(rbm.exp().sum(), torch.tensor(1.0).double(), atol=1e-10)
    instance.enter("layer2", iter([Batch(data())]))
    assert int(instance.depth) == 2
    assert torch.allclose(log_likelihood(instance), rbm, atol=1e-10)
    # The posterior is factorial and q is it: every draw gives log p itself.
    for _ in range(5):
        assert torch.allclose(instance.log_prob(x), rbm, atol=1e-10)


def test_other_sizes_start_from_the_means_of_the_layer_below():
    instance = model(3, 5, depth=1)
    first, x = instance.layer(0), data()
    instance.enter("layer2", iter(Batch(part) for part in x.split(15)))
    mean = torch.sigmoid(x.double() @ first.weight + first.hidden_bias).mean(0)
    assert torch.equal(instance.up[0], first.weight)
    assert torch.allclose(instance.machine_mean, mean, atol=1e-12)
    assert torch.allclose(torch.sigmoid(instance.layer(1).visible_bias), mean, atol=1e-12)


def test_layers_whose_window_had_no_round_are_started_all_the_same():
    instance, x = model(3, V, 3, depth=0), data()
    instance.enter("up_down", iter([Batch(x)]))
    assert int(instance.depth) == 3
    for level in (1, 2):
        below, layer = instance.layer(level - 1), instance.layer(level)
        assert torch.equal(instance.up[level - 1], below.weight)
        assert torch.equal(layer.weight, below.weight.T)
    assert torch.allclose(torch.sigmoid(instance.layer(0).visible_bias), x.double().mean(0), atol=1e-12)
    before = {name: t.clone() for name, t in instance.state_dict().items()}
    instance.enter("layer2", iter([]))  # nothing is started twice
    assert all(torch.equal(t, before[name]) for name, t in instance.state_dict().items())


@pytest.mark.parametrize("hidden", [(3, 2), (3, 2, 3)])
def test_windows_follow_each_other_and_fill_the_run(hidden):
    windows = [turn.window for turn in model(*hidden, greedy=0.7).turns()]
    assert windows[0][0] == 0.0
    assert windows[-1][1] == 1.0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(windows))
    for step in range(97):
        assert sum(turn.live(Clock(step, 97)) for turn in model(*hidden, greedy=0.7).turns()) == 1


def top_kernel(instance: DBN) -> Tensor:
    """p(h'^{L−1} | h^{L−1}) of one Gibbs step, from conditionals read off the joint of the top two layers."""
    layer = instance.layer(len(instance.layers) - 1)
    h, k = states(layer.weight.shape[0]), states(layer.weight.shape[1])
    log_joint = (h @ layer.visible_bias)[:, None] + k @ layer.hidden_bias + h @ layer.weight @ k.T
    return torch.softmax(log_joint, 1) @ torch.softmax(log_joint, 0).T


def test_the_tops_gibbs_kernel_leaves_its_distribution():
    instance, n = model(3, 2), 40_000
    kernel = top_kernel(instance).detach()
    assert_reversible(top_table(instance)[0].exp().detach(), kernel)
    with torch.no_grad():
        ends = instance.machine.gibbs(states(3)[5].expand(n, -1))
    assert_same_distribution(frequencies(ends), kernel[5], n)


@pytest.mark.parametrize("hidden", [(3, 2), (3, 2, 3)])
def test_samples_have_the_models_distribution(hidden):
    instance, n = model(*hidden), 20_000
    assert torch.linalg.eigvals(top_kernel(instance)).abs().sort().values[-2] < 0.9  # 0.9¹⁰⁰ is 3e-5
    x = instance.sample(n, burn_in=100)
    assert x.dtype == torch.uint8
    assert_same_distribution(frequencies(x), log_likelihood(instance).exp(), n)


def expected_up_down(instance: DBN, x: Tensor, steps: int) -> Tensor:
    """The up–down scalar of a net with two hidden layers, in expectation over wake, chain and dream, its draws' own
    probabilities held fixed."""
    h = states(instance.sizes[1])
    log_q = log_bernoulli(h, up(instance, 0, x))
    wake = log_q.exp().detach()
    chain = wake @ torch.linalg.matrix_power(top_kernel(instance).detach(), steps)
    free_energy = -top_table(instance)[0]  # up to log Z, which cancels: both are distributions
    generative = (wake * log_bernoulli(x, down(instance, 0, h))).sum()
    dream, pen = pairs(states(V), h)
    share = log_bernoulli(dream, down(instance, 0, pen)).exp().detach() * chain.repeat(2**V)
    assert torch.allclose(share.sum(), torch.tensor(1.0).double())
    recognition = (share * log_bernoulli(pen, up(instance, 0, dream))).sum()
    return ((wake - chain) * free_energy).sum() - generative - recognition


@pytest.mark.parametrize(("step", "k"), [(0, 1), (9, 2)])
def test_up_down_gradients_equal_the_enumerated_ones(step, k):
    instance, n = model(3, 2, greedy=0.5, top_gibbs=(1, 2), up_down_rate=0.5), 200_000
    x = states(V)[6]
    clock = Clock(step, 10)
    instance.loss(Batch(x.expand(n, -1).to(torch.uint8)), "up_down", clock).value.backward()
    found = {name: p.grad.clone() for name, p in instance.named_parameters() if p.grad is not None}
    assert set(found) == {name for name, _ in instance.named_parameters()}
    instance.zero_grad()
    (0.5 * expected_up_down(instance, x, k)).backward()
    for name, p in instance.named_parameters():
        assert p.grad is not None
        # Means of 200,000 numbers of size at most one, differences of two, halved: six standard errors are 0.0135.
        assert torch.allclose(found[name], p.grad, atol=0.0135), name
        assert p.grad.abs().max() > 0.02, f"{name}: too small a gradient to tell"


def test_k_rises_in_equal_parts_of_up_down():
    instance = model(3, 2, greedy=0.4, top_gibbs=(3, 6, 10))
    found = [instance.top_steps(Clock(step, 100)) for step in range(100)]
    assert found == sorted(found)
    assert all(abs(found[40:].count(k) - 20) <= 1 for k in (3, 6, 10))  # a round on an edge may fall on either side


def test_a_layers_turn_trains_that_layer_alone_on_draws_from_below():
    instance, n = model(3, 2, depth=2), 100_000
    x = states(V)[9]
    instance.loss(Batch(x.expand(n, -1).to(torch.uint8)), "layer2", CLOCK).value.backward()
    assert {name for name, p in instance.named_parameters() if p.grad is not None} == {
        f"layers.1.{part}" for part in ("weight", "visible_bias", "hidden_bias")
    }
    found = instance.layer(1).visible_bias.grad.clone()
    below = log_bernoulli(states(3), up(instance, 0, x)).exp()
    after = below @ top_kernel(instance)
    # CD-1's gradient is the mean after a step less the mean before it; six standard errors are 0.013.
    assert torch.allclose(found, (after - below) @ states(3), atol=0.013)


def test_annealing_finds_the_tops_log_z():
    instance = model(6, 5, scale=0.8)
    log_z = instance.exact_log_z()
    assert log_z is not None
    assert torch.allclose(log_z, top_table(instance)[1], atol=1e-10)
    instance.get_buffer("mean1").uniform_(0.2, 0.8)
    betas = torch.linspace(0, 1, 300).tolist()
    forward = ais(instance, chains=400, betas=betas)
    backward = reverse_ais(instance, model_states(instance, forward, burn_in=50), betas=betas)
    assert abs(forward.log_z - log_z) < 0.1  # standard errors of both are near 0.01
    assert abs(backward.log_z - log_z) < 0.1
    assert forward.log_z != backward.log_z


def test_log_z_follows_the_parameters_and_the_depth():
    instance = model(3, 2)
    first = instance.exact_log_z()
    instance.layer(1).weight.data = instance.layer(1).weight.data + 1.0  # as swapping in averaged parameters does
    second = instance.exact_log_z()
    instance.depth.fill_(1)
    third = instance.exact_log_z()
    assert first is not None
    assert second is not None
    assert third is not None
    assert len({round(float(z), 6) for z in (first, second, third)}) == 3
    assert torch.allclose(third, instance.layer(0).log_z())


def test_evaluation_by_annealing_says_that_it_is_a_bound():
    large = model(21, 21, dims=21, scale=0.1)
    spec, x = large.data, data(30, 21)
    options = EvaluationConfig(ais_chains=10, ais_temperatures=20, ais_burn_in=5)
    found = likelihood(large, Batch(x), spec, {}, options)
    assert set(found) == {"nll_ais_nats", "nll_reverse_ais_nats"}
    assert all(metric.context["bound"] == "variational" for metric in found.values())


def test_what_it_refuses():
    with pytest.raises(DataMismatch, match="real-valued"):
        DBN(DBN.Config(), DataSpec("vector", (3,), None))
    with pytest.raises(DataMismatch, match="256 levels"):
        DBN(DBN.Config(), DataSpec("image", (1, 4, 4), 256))
    with pytest.raises(ValueError, match="hidden"):
        DBN.Config(hidden=(3,))
    large = model(21, 21)
    assert large.exact_log_z() is None
    with pytest.raises(RuntimeError, match=r"dgm_core\.evaluation\.ais"):
        large.log_prob(data(2))
    with pytest.raises(DataMismatch, match="empty"):
        model(3, 2, depth=0).enter("layer1", iter([]))
