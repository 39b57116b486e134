"""Wake, sleep and reweighted updates against the expectations that they estimate, by enumeration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.belief.helmholtz import Helmholtz
from tests.families.belief.enumeration import (
    assert_mean,
    assert_same_distribution,
    frequencies,
    given,
    gradients,
    log_p,
    log_q,
    randomise,
    states,
)

CLOCK = Clock(0, 10)
X = torch.tensor([[1, 0, 1, 1]], dtype=torch.uint8)
HIDDEN = (3, 2)


def model(**config: Any) -> Helmholtz:
    instance = Helmholtz(Helmholtz.Config(hidden=HIDDEN, **config), DataSpec("vector", (4,), 2))
    randomise(instance)
    instance.recognition.mean.uniform_()
    return instance


def rws(turn: str = "both", samples: int = 2) -> Helmholtz:
    return model(objective="rws", samples=samples, recognition_turn=turn)


def blocks(instance: Helmholtz, turn: str, parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """The turn's gradient, a hundred times a thousand draws."""
    torch.manual_seed(0)
    batch = Batch(X.expand(1000, -1))
    return [gradients(instance.loss(batch, turn, CLOCK).value, parameters) for _ in range(100)]


def test_the_recognition_nets_draws_and_probabilities_agree():
    instance, n = model(), 40_000
    layers = given(X[0], states(*HIDDEN))
    q = log_q(instance.recognition, layers)
    assert torch.allclose(instance.recognition.log_terms(layers).sum(-1), q, atol=1e-12)
    assert abs(q.exp().sum() - 1) < 1e-12
    torch.manual_seed(0)
    drawn, terms = instance.recognition(X.double(), n)
    assert_same_distribution(frequencies([h[0] for h in drawn]), q.exp(), n)
    assert torch.allclose(terms, instance.recognition.log_terms([X.double()[:, None], *drawn]), atol=1e-12)


@pytest.mark.parametrize("samples", [1, 3])
def test_the_wake_gradient_is_that_of_the_mean_log_joint_under_the_recognition_net(samples):
    instance = model(samples=samples)
    layers = given(X[0], states(*HIDDEN))
    own = list(instance.generative.parameters())
    q = log_q(instance.recognition, layers).exp().detach()
    exact = gradients(-(q @ log_p(instance.generative, layers)), own)
    assert_mean(blocks(instance, "wake", own), exact)


def test_the_sleep_gradient_is_that_of_the_mean_log_recognition_over_dreams():
    instance = model()
    layers = states(4, *HIDDEN)
    own = list(instance.recognition.parameters())
    p = log_p(instance.generative, layers).exp().detach()
    exact = gradients(-(p @ log_q(instance.recognition, layers)), own)
    assert_mean(blocks(instance, "sleep", own), exact)


@pytest.mark.parametrize("turn", ["wake", "sleep"])
def test_gradients_of_all_states_put_in_by_hand_are_the_enumerated_ones(turn, monkeypatch):
    """Each state's own gradient, times the chance of its being drawn: no draws, so equal to rounding."""
    instance = model()
    if turn == "wake":
        layers, player = given(X[0], states(*HIDDEN)), "generative"
        chance = log_q(instance.recognition, layers).exp().detach()
        exact = chance @ log_p(instance.generative, layers)
    else:
        layers, player = states(4, *HIDDEN), "recognition"
        chance = log_p(instance.generative, layers).exp().detach()
        exact = chance @ log_q(instance.recognition, layers)
    own = list(instance.players()[player])
    total = torch.zeros(sum(p.numel() for p in own)).double()
    for row, share in enumerate(chance):
        state = [h[row : row + 1] for h in layers]
        drawn = [h[:, None] for h in state[1:]]
        terms = instance.recognition.log_terms([state[0][:, None], *drawn])
        monkeypatch.setattr(instance.recognition, "forward", lambda v, count, to=(drawn, terms): to)
        monkeypatch.setattr(instance.generative, "draw", lambda n, to=state: to)
        total += share * gradients(instance.loss(Batch(X), turn, CLOCK).value, own)
    assert torch.allclose(total, gradients(-exact, own), atol=1e-10)


def test_the_reweighted_gradients_are_those_of_weighted_draws():
    instance = rws()
    layers = given(X[0], states(*HIDDEN))
    p, q = log_p(instance.generative, layers), log_q(instance.recognition, layers)
    weights = (p - q).exp().detach()
    # The share that a state has of a pair's weights, over what the other draw may be; both draws play both parts.
    share = 2 * q.exp().detach() * (weights[:, None] / (weights[:, None] + weights) @ q.exp().detach())
    own = list(instance.generative.parameters()) + list(instance.recognition.parameters())
    exact = gradients(-(share @ (p + q)), own)
    assert_mean(blocks(instance, "wake", own), exact)


def test_reweighting_tends_to_the_likelihoods_gradient_and_the_exact_posterior():
    instance = rws(samples=1000)
    layers = given(X[0], states(*HIDDEN))
    posterior = log_p(instance.generative, layers).softmax(0).detach()
    own = list(instance.generative.parameters()) + list(instance.recognition.parameters())
    likelihood = -instance.generative.log_prob(X.double()).mean()
    exact = gradients(likelihood - posterior @ log_q(instance.recognition, layers), own)
    torch.manual_seed(0)
    found = gradients(instance.loss(Batch(X.expand(300, -1)), "wake", CLOCK).value, own)
    few = rws(samples=2)
    few.load_state_dict(instance.state_dict())
    biased = gradients(few.loss(Batch(X.expand(1000, -1)), "wake", CLOCK).value, own)
    # The bias falls as 1 / K: at a thousand draws it is far below the bias of two, which noise does not hide.
    assert (found - exact).norm() < 0.1 * (biased - exact).norm()


def test_losses_are_the_bound_and_the_recognition_nets_surprise():
    batch = Batch(X.expand(50, -1))
    for instance, names in ((model(), ["generative"]), (rws(), ["generative", "recognition"])):
        torch.manual_seed(0)
        log_weights = instance.log_weights(X.double().expand(50, -1), instance.config.samples)
        torch.manual_seed(0)
        loss = instance.loss(batch, "wake", CLOCK)
        bound = (log_weights.logsumexp(1) - torch.tensor(float(log_weights.shape[1])).log()).mean()
        assert torch.allclose(loss.value, -bound, atol=1e-12)
        assert torch.allclose(loss.metrics["bound"], log_weights.mean(), atol=1e-12)
        loss.value.backward()
        reached = [name for name, own in instance.players().items() if all(p.grad is not None for p in own)]
        assert reached == names
    instance = model()
    torch.manual_seed(0)
    loss = instance.loss(batch, "sleep", CLOCK)
    torch.manual_seed(0)
    dreams = instance.generative.draw(50)
    assert torch.allclose(loss.value, -log_q(instance.recognition, dreams).mean(), atol=1e-12)
    loss.value.backward()
    assert all(p.grad is None for p in instance.generative.parameters())
    assert all(p.grad is not None for p in instance.recognition.parameters())


def test_who_learns_when():
    def players(instance: Helmholtz) -> dict[str, tuple[str, ...]]:
        return {turn.name: turn.players for turn in instance.turns()}

    both = ("generative", "recognition")
    assert players(model()) == {"wake": ("generative",), "sleep": ("recognition",)}
    assert players(rws("sleep")) == {"wake": ("generative",), "sleep": ("recognition",)}
    assert players(rws("wake")) == {"wake": both}
    assert players(rws("both")) == {"wake": both, "sleep": ("recognition",)}
    with pytest.raises(ValueError, match="set objective: rws"):
        model(recognition_turn="wake")
    with pytest.raises(ValueError, match="set samples to 2 or more"):
        model(objective="rws")


def test_the_data_sets_the_start_once():
    instance = model()
    x = (torch.rand(1000, 4) < torch.tensor([0.1, 0.4, 0.5, 0.9])).to(torch.uint8)
    x[:, 2] = 0
    instance.enter("wake", iter(Batch(part) for part in x.split(300)))
    mean = x.double().mean(0)
    assert torch.allclose(instance.recognition.mean, mean, atol=1e-12)
    bias = instance.generative.layers[0].bias
    assert torch.allclose(torch.sigmoid(bias)[[0, 1, 3]], mean[[0, 1, 3]], atol=1e-12)
    assert 0 < torch.sigmoid(bias)[2] < 0.01  # never on in training, but not impossible
    instance.enter("sleep", iter([Batch(1 - x)]))
    assert torch.allclose(instance.recognition.mean, mean, atol=1e-12)


def test_importance_sampling_bounds_the_likelihood_and_converges():
    instance = model()
    exact = instance.log_prob(X)
    layers = given(X[0], states(*HIDDEN))
    q = log_q(instance.recognition, layers)
    elbo = q.exp() @ (log_p(instance.generative, layers) - q)
    instance.exact = False
    torch.manual_seed(0)
    one = instance.log_prob(X.expand(40_000, -1))
    assert abs(one.mean() - elbo) < 6 * one.std() / 200  # the variational bound, in expectation
    assert elbo < exact
    many = torch.cat([(instance.log_prob(X, samples=2000) - exact).exp() for _ in range(50)])
    error = many.std() / 50**0.5
    assert abs(many.mean() - 1) < 6 * error  # the weights' mean is p(x) exactly
    assert error < 0.01


def test_importance_samples_come_in_chunks(monkeypatch):
    from dgm_core.models.belief import base

    instance = model()
    instance.exact = False
    monkeypatch.setattr(base, "MEMORY", 10 * 2 * 4)  # ten draws of two examples of four units
    counts = []
    whole = instance.log_weights

    def counted(v: Tensor, count: int) -> Tensor:
        counts.append(count)
        return whole(v, count)

    monkeypatch.setattr(instance, "log_weights", counted)
    torch.manual_seed(0)
    found = instance.log_prob(X.expand(2, -1), samples=25)
    torch.manual_seed(0)
    weights = torch.cat([whole(X.double().expand(2, -1), n) for n in (10, 10, 5)], 1)
    assert counts == [10, 10, 5]
    assert torch.allclose(found, weights.logsumexp(1) - torch.tensor(25.0).log(), atol=1e-6)
