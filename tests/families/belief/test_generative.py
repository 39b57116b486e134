"""The generative net against enumeration: joint, likelihood, ancestral draws, Gibbs sampling."""

from __future__ import annotations

import pytest
import torch

from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.models import CATALOG
from dgm_core.models.belief.sbn import SBN
from dgm_core.nn import belief, rbm
from tests.families.belief.enumeration import (
    assert_same_distribution,
    frequencies,
    given,
    log_p,
    net,
    states,
    sweep_matrix,
)

SIZES = [(4, 3), (5, 3, 2), (3, 2, 2, 2)]


@pytest.mark.parametrize("sizes", SIZES)
def test_the_joint_is_the_product_of_its_layers_and_sums_to_one(sizes):
    generative = net(*sizes)
    every = states(*sizes)
    terms = generative.log_terms(every)
    assert terms.shape == (2 ** sum(sizes), len(sizes))
    assert torch.allclose(terms.sum(-1), log_p(generative, every), atol=1e-12)
    assert abs(terms.sum(-1).exp().sum() - 1) < 1e-12
    for level in range(1, len(sizes)):  # from a layer on, as expansions ask for it
        assert torch.equal(generative.log_terms(every[level:], level), terms[:, level:])


@pytest.mark.parametrize("sizes", SIZES)
def test_the_likelihood_sums_the_joint_over_hidden_states(sizes, monkeypatch):
    generative = net(*sizes)
    (x,), hidden = states(sizes[0]), states(*sizes[1:])
    expected = torch.stack([log_p(generative, given(row, hidden)).logsumexp(0) for row in x])
    assert torch.allclose(generative.log_prob(x), expected, atol=1e-12)
    monkeypatch.setattr(rbm, "_CHUNK", 3)
    assert torch.allclose(generative.log_prob(x), expected, atol=1e-12)


def test_log_joint_takes_data_units_and_any_number_of_draws():
    model = SBN(SBN.Config(hidden=(3, 2)), DataSpec("image", (1, 2, 2), 2)).double()
    x = torch.randint(0, 2, (5, 1, 2, 2), dtype=torch.uint8)
    hidden = [torch.randint(0, 2, (5, 7, n)).double() for n in (3, 2)]
    found = model.log_joint(x, hidden)
    rows = x.flatten(1).double()[:, None].expand(-1, 7, -1)
    assert torch.allclose(found, log_p(model.generative, [rows, *hidden]), atol=1e-12)
    assert torch.allclose(model.log_joint(x, [h[:, 0] for h in hidden]), found[:, 0], atol=1e-12)


def test_draws_have_the_frequencies_of_the_joint():
    generative, n = net(4, 3, 2), 50_000
    torch.manual_seed(0)
    drawn = generative.draw(n)
    assert_same_distribution(frequencies(drawn), log_p(generative, states(4, 3, 2)).exp(), n)


def test_a_units_log_odds_are_those_of_the_joint():
    """In every state of the other units: so each update leaves the posterior as it is, whatever the order."""
    sizes = (4, 3, 2)
    generative = net(*sizes)
    every = states(*sizes)
    for level in (1, 2):
        for j in range(sizes[level]):
            on, off = ([h.clone() for h in every] for _ in range(2))
            on[level][:, j], off[level][:, j] = 1, 0
            top = level == 2
            own = generative.prior if top else generative.inputs(level, every[level + 1])
            weight = generative.affine(level - 1)[0][:, j]
            gain = belief._gain(every[level - 1], generative.inputs(level - 1, off[level]), weight)
            odds = log_p(generative, on) - log_p(generative, off)
            assert torch.allclose(own[..., j] + gain, odds, atol=1e-12)


def test_a_gibbs_sweep_has_the_transition_matrix_of_its_units_and_keeps_the_posterior():
    sizes, n = (4, 3, 2), 40_000
    generative = net(*sizes)
    hidden = states(*sizes[1:])
    x = torch.tensor([1.0, 0, 0, 1]).double()
    posterior = log_p(generative, given(x, hidden)).softmax(0)
    T = sweep_matrix(generative, x, hidden)
    assert torch.allclose(posterior @ T, posterior, atol=1e-12)
    torch.manual_seed(1)
    for start in (0, 13, 31):
        begin = given(x, [h[start].expand(n, -1) for h in hidden])
        end = generative.gibbs(begin)
        assert torch.equal(end[0], begin[0])
        assert torch.equal(begin[1], hidden[0][start].expand(n, -1))  # what was given is not written to
        assert_same_distribution(frequencies(end[1:]), T[start], n)
    drawn = torch.multinomial(posterior, n, replacement=True)
    end = generative.gibbs(given(x, [h[drawn] for h in hidden]))
    assert_same_distribution(frequencies(end[1:]), posterior, n)


@pytest.mark.parametrize("name", ["sbn", "helmholtz", "nvil"])
def test_what_it_refuses(name):
    model = CATALOG[name]
    for spec, word in ((DataSpec("vector", (4,), None), "real-valued"), (DataSpec("codes", (4, 4), 5), "5 levels")):
        with pytest.raises(DataMismatch, match=f"{word}.*binarised"):
            model(model.tiny(spec)[0], spec)
    with pytest.raises(ValueError, match="at least 1 item"):
        model.Config(hidden=())
    spec = DataSpec("vector", (4,), 2)
    with pytest.raises(DataMismatch, match="empty"):
        instance = model(model.tiny(spec)[0], spec)
        instance.enter(instance.turns()[0].name, iter([]))
