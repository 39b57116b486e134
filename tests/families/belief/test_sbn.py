"""Neal's Gibbs learning and variational EM against the exact gradient and likelihood."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.belief import mean_field
from dgm_core.models.belief.sbn import SBN
from tests.families.belief.enumeration import given, gradients, log_p, randomise, states, sweep_matrix

CLOCK = Clock(0, 10)
X = torch.tensor([[1, 0, 1, 1, 0, 0]], dtype=torch.uint8)


def model(hidden=(4, 3), **config: Any) -> SBN:
    instance = SBN(SBN.Config(hidden=hidden, **config), DataSpec("vector", (6,), 2))
    randomise(instance)
    return instance


def test_the_gibbs_gradient_is_the_likelihoods():
    n = 20_000
    instance = model(burn_in=30, sweeps=2)
    parameters = list(instance.parameters())
    exact = gradients(-instance.generative.log_prob(X.double()).mean(), parameters)
    torch.manual_seed(0)
    found = gradients(instance.loss(Batch(X.expand(n, -1)), "model", CLOCK).value, parameters)
    T = sweep_matrix(instance.generative, X[0].double(), states(4, 3))
    assert torch.linalg.eigvals(T).abs().sort().values[-2] ** 30 < 1e-3  # what is left of the start
    # Neal's rule averages numbers in [−1, 1]: six standard errors of n chains are 6 / √n.
    assert (found - exact).abs().max() < 6 / math.sqrt(n)
    assert exact.abs().max() > 12 / math.sqrt(n)


def test_chains_start_afresh_and_keep_what_follows_the_burn_in():
    instance = model(burn_in=3, sweeps=2)
    x = X.double().expand(5, -1)
    torch.manual_seed(0)
    kept = instance.posterior_states(x)
    torch.manual_seed(0)
    chain = [x, *instance.generative.draw(5)[1:]]
    visited = []
    for _ in range(5):
        chain = instance.generative.gibbs(chain)
        visited.append(chain)
    for level in (1, 2):
        assert torch.equal(kept[level - 1], torch.stack([visited[i][level] for i in (3, 4)], 1))


def test_mean_field_learning_ascends_the_bound_in_both_steps():
    instance = model(inference="mean_field", e_sweeps=100, tolerance=1e-7)
    x = torch.stack(states(6)).squeeze(0)[::7]
    sgd = torch.optim.SGD(instance.parameters(), lr=0.05)
    last = -math.inf
    for _ in range(8):
        sgd.zero_grad()
        loss = instance.loss(Batch(x.to(torch.uint8)), "model", CLOCK).value
        assert -loss.item() > last
        assert -loss <= instance.generative.log_prob(x).mean()
        last = -loss.item()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in instance.parameters())
        sgd.step()


def test_the_m_steps_gradient_holds_the_field_fixed():
    instance = model(inference="mean_field")
    x = X.double()
    field = instance.infer(x)
    parameters = list(instance.parameters())
    expected = gradients(-mean_field.bound(instance.generative, x, field).mean(), parameters)
    found = gradients(instance.loss(Batch(X), "model", CLOCK).value, parameters)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("inference", ["gibbs", "mean_field"])
def test_beyond_enumeration_the_bound_is_mean_fields_and_importance_sampling_closes_it(inference):
    instance = model(inference=inference)
    exact = instance.log_prob(X)
    assert torch.allclose(exact, log_p(instance.generative, given(X[0], states(4, 3))).logsumexp(0))
    instance.exact = False
    field = instance.infer(X.double())
    bound = instance.log_prob(X)
    assert torch.equal(bound, mean_field.bound(instance.generative, X.double(), field))
    assert bound < exact
    torch.manual_seed(0)
    ratios = [(instance.log_prob(X, samples=1000) - exact).exp() for _ in range(50)]
    found = torch.cat(ratios)
    # The weights' mean is p(x) exactly: fifty means of a thousand, six standard errors; and it is near by then.
    error = found.std() / math.sqrt(50)
    assert abs(found.mean() - 1) < 6 * error
    assert error < 0.02


def test_more_than_sixteen_hidden_units_are_not_enumerated():
    assert model(hidden=(16,)).exact
    assert not model(hidden=(9, 8)).exact


def test_many_examples_are_inferred_some_at_a_time(monkeypatch):
    instance = model()
    instance.exact = False
    (x,) = states(6)
    together = instance.log_prob(x)
    monkeypatch.setattr("dgm_core.models.belief.sbn.MEMORY", 3 * 6 * 4)  # three examples of 6 × 4 weights
    rows: list[int] = []
    infer = instance.infer
    monkeypatch.setattr(instance, "infer", lambda v: rows.append(len(v)) or infer(v))
    assert torch.allclose(instance.log_prob(x), together, atol=1e-12)
    assert rows == [3] * 21 + [1]
