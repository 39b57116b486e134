"""Score-function estimators by enumeration of every hidden state: unbiased, whatever the baseline.

A random net of six visible and 4 + 3 hidden units and its recognition net, in float64; one x. Per state, or pair of
states, an estimator's coefficient of each ∂ log q_i is read off its surrogate by autograd.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgm_core.nn.belief import RecognitionNet
from dgm_core.objectives.control_variate import coefficient, control_variate
from dgm_core.objectives.nvil import nvil
from dgm_core.objectives.score_function import learning_signals, score_function, with_value
from dgm_core.objectives.vimco import local_signals, vimco
from tests.families.belief.enumeration import given, gradients, log_p, log_q, net, randomise, states

SIZES = (6, 4, 3)
S = 2**7


class World:
    """Terms of log p and log q in every hidden state, and the scores ∂ log q_i / ∂φ."""

    def __init__(self) -> None:
        generative, recognition = net(*SIZES), RecognitionNet(SIZES)
        randomise(recognition, seed=1)
        x = torch.tensor([1, 0, 1, 1, 0, 0]).double()
        layers = given(x, states(*SIZES[1:]))
        own = list(recognition.parameters())
        self.log_p = generative.log_terms(layers).detach()
        log_q_terms = recognition.log_terms(layers)
        self.log_q = log_q_terms.detach()
        self.q = self.log_q.sum(1).exp()
        seeds = torch.eye(2 * S, dtype=torch.float64).view(-1, S, 2)
        scores = torch.autograd.grad(log_q_terms, own, seeds, is_grads_batched=True)
        self.scores = torch.cat([g.flatten(1) for g in scores], 1).view(S, 2, -1)
        p, q = log_p(generative, layers).detach(), log_q(recognition, layers)
        weights = (p - q).exp()
        pairs = q.exp()[:, None] * q.exp() * ((weights[:, None] + weights) / 2).log()
        # The gradients in φ of E (log p − log q) and of E log ½ (w + w').
        self.bound, self.two_draws_bound = (gradients(v, own) for v in (q.exp() @ (p - q), pairs.sum()))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def coefficients(surrogate, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """∂ surrogate / ∂ each term of log p and of log q, row by row."""
    log_p, log_q = log_p.clone().requires_grad_(), log_q.clone().requires_grad_()
    return torch.autograd.grad(surrogate(log_p, log_q).sum(), [log_p, log_q])


def expectation(world: World, surrogate) -> Tensor:
    """Of a single draw's gradient in φ."""
    of_p, of_q = coefficients(surrogate, world.log_p, world.log_q)
    assert torch.equal(of_p, torch.ones_like(of_p))  # the generative net ascends log p(x, h)
    return torch.einsum("s,sl,slp->p", world.q, of_q, world.scores)


def test_learning_signals_are_sums_of_the_terms_a_layer_has_a_part_in(world):
    p, q = world.log_p, world.log_q
    found = learning_signals(p, q)
    assert torch.allclose(found[:, 0], p[:, 0] + p[:, 1] + p[:, 2] - q[:, 0] - q[:, 1], atol=1e-12)
    assert torch.allclose(found[:, 1], p[:, 1] + p[:, 2] - q[:, 1], atol=1e-12)


@pytest.mark.parametrize("local", [True, False])
def test_the_score_function_is_unbiased(world, local):
    def surrogate(p, q):
        signals = learning_signals(p, q)
        return score_function(p, q, signals if local else signals[:, :1])

    assert torch.allclose(expectation(world, surrogate), world.bound, atol=1e-10)


def test_what_a_layer_has_no_part_in_may_not_be_left_out_of_the_layer_below(world):
    """The oracle notices a signal that lacks a term."""

    def surrogate(p, q):
        return score_function(p, q, learning_signals(p, q) + torch.tensor([0.0, 1.0]) * q[:, :1] - p[:, 2:])

    assert (expectation(world, surrogate) - world.bound).abs().max() > 1e-3


def test_nvil_is_unbiased_for_any_baseline_up_to_its_scale(world):
    torch.manual_seed(2)
    variance = torch.tensor([4.0, 0.25], dtype=torch.float64)
    centre = torch.randn(2, dtype=torch.float64)
    by_h1 = torch.randn(2**4, dtype=torch.float64)
    h1 = (states(4, 3)[0].long() << torch.arange(4)).sum(1)
    baselines = torch.stack([torch.full((S,), 1.7, dtype=torch.float64), by_h1[h1]], 1)

    def surrogate(p, q):
        return nvil(p, q, learning_signals(p, q) - baselines, baselines, centre, variance)

    found = expectation(world, surrogate)
    layers = torch.einsum("s,sl,slp->lp", world.q, learning_signals(world.log_p, world.log_q), world.scores)
    # max(1, √4) = 2 for the first layer's signal, max(1, √¼) = 1 for the second's.
    assert torch.allclose(found, layers[0] / 2 + layers[1], atol=1e-10)
    assert torch.allclose(layers.sum(0), world.bound, atol=1e-10)


def test_nvils_baselines_ascend_their_reward():
    signals, baselines = torch.randn(7, 2).double(), torch.randn(7, 2).double().requires_grad_()
    zero, one = torch.zeros(2).double(), torch.ones(2).double()
    value = nvil(torch.zeros(7, 3), torch.zeros(7, 2), signals - baselines.detach(), baselines, zero, one)
    (found,) = torch.autograd.grad(value.sum(), baselines)
    # Minus the slope of ½ (l − C)², which is least at the conditional mean.
    assert torch.allclose(found, signals - baselines.detach(), atol=1e-12)


def test_vimco_is_unbiased_for_the_bound_of_two_draws(world):
    first, second = torch.cartesian_prod(torch.arange(S), torch.arange(S)).unbind(1)
    pairs = torch.stack([first, second], 1)
    p, q = world.log_p.sum(1)[pairs], world.log_q.sum(1)[pairs]
    of_p, of_q = coefficients(vimco, p, q)
    log_weights = p - q
    weights = log_weights.softmax(1)
    assert torch.allclose(of_p, weights, atol=1e-12)  # the generative net ascends Σ w̃_k log p(x, h^k)
    chance = world.q[first] * world.q[second]
    share = torch.zeros(S, dtype=torch.float64).index_add(0, pairs.flatten(), (chance[:, None] * of_q).flatten())
    found = share @ world.scores.sum(1)
    assert torch.allclose(found, world.two_draws_bound, atol=1e-10)


def test_vimcos_signals_put_the_geometric_mean_of_the_others_in_each_place():
    torch.manual_seed(0)
    log_weights = torch.randn(5, 4).double()
    found = local_signals(log_weights)
    w = log_weights.exp()
    for k in range(4):
        others = [j for j in range(4) if j != k]
        geometric = w[:, others].prod(1) ** (1 / 3)
        expected = w.mean(1).log() - ((w[:, others].sum(1) + geometric) / 4).log()
        assert torch.allclose(found[:, k], expected, atol=1e-12)


def test_any_control_variate_with_a_known_mean_leaves_the_gradient_unbiased(world):
    """g any function of the layer and those below; its mean's slope by enumeration of the layer."""
    torch.manual_seed(3)
    h1, h2 = states(4, 3)
    g1, g2 = torch.randn(2**4).double(), torch.randn(2**4, 2**3).double()
    code1, code2 = ((h.long() << torch.arange(h.shape[1])).sum(1) for h in (h1, h2))
    g = torch.stack([g1[code1], g2[code1, code2]], 1)
    a = torch.tensor([0.7, -1.3], dtype=torch.float64)
    zeros = torch.zeros(S, 2, dtype=torch.float64)
    f = learning_signals(world.log_p, world.log_q) + world.log_q

    def surrogate(p, q):
        return control_variate(p, q, f, g, zeros, zeros, a)

    found = expectation(world, surrogate)
    # ∂ E g_i and ∂ H_i by the score function, layer by layer: Σ_h q g ∂ log q and −Σ_h q log q ∂ log q.
    found = found + torch.einsum("s,sl,slp->p", world.q, a * g - world.log_q, world.scores)
    assert torch.allclose(found, world.bound, atol=1e-10)


def test_the_coefficient_makes_the_difference_vary_least():
    torch.manual_seed(0)
    f, g = torch.randn(2, 1000, 3).double()
    f = f + torch.tensor([0.0, 2.0, -1.0]) * g
    pairs = torch.stack([f, g], -1)
    centred = pairs - pairs.mean(0)
    covariance = torch.einsum("ngi,ngj->gij", centred, centred) / 1000
    a = coefficient(covariance)
    best = (f - a * g).var(0)
    for step in (-0.01, 0.01):
        assert ((f - (a + step) * g).var(0) > best).all()
    assert torch.equal(coefficient(torch.zeros(2, 2, 2)), torch.zeros(2))


def test_a_surrogate_keeps_its_gradient_under_another_value():
    w = torch.tensor(3.0, requires_grad=True)
    value = with_value(torch.tensor(-7.0), w.square())
    assert value.item() == -7.0
    value.backward()
    assert w.grad == 6.0
