"""NVIL, VIMCO and control variates as the model computes them: every draw of h put in by hand, so that the gradient's
mean and variance are sums over states and not estimates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.belief.nvil import NVIL
from dgm_core.nn.running import RunningMoments
from dgm_core.training.optimisers import build_players
from tests.families.belief.enumeration import assert_mean, given, gradients, log_p, log_q, randomise, states

CLOCK = Clock(0, 10)
X = torch.tensor([[1, 0, 1, 1, 0]], dtype=torch.uint8)
SWITCHES = ("baseline", "centring", "variance_normalisation", "local_signals")
OFF = dict.fromkeys(SWITCHES, False)


def model(hidden=(2, 2), **config: Any) -> NVIL:
    instance = NVIL(NVIL.Config(hidden=hidden, baseline_features=8, **config), DataSpec("vector", (5,), 2))
    randomise(instance)
    instance.recognition.mean.uniform_()
    if config.get("objective") != "vimco":
        instance.moments.mean.normal_()
        root = torch.randn_like(instance.moments.covariance)
        instance.moments.covariance.copy_(root @ root.mT)
    return instance


class Enumerated:
    """A model whose draws are, row by row, all tuples of K hidden states, and the chance of each row."""

    def __init__(self, instance: NVIL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.instance, K = instance, instance.config.samples
        hidden = states(*instance.config.hidden)
        n = len(hidden[0])
        rows = torch.cartesian_prod(*[torch.arange(n)] * K).view(-1, K)
        drawn = [h[rows] for h in hidden]
        x = X.double()[:, None].expand(len(rows), 1, -1)
        monkeypatch.setattr(
            instance.recognition, "forward", lambda v, count: (drawn, instance.recognition.log_terms([x, *drawn]))
        )
        self.layers = given(X[0], hidden)
        self.chance = log_q(instance.recognition, self.layers).exp().detach()[rows].prod(1)
        self.x = X.double().expand(len(rows), -1)

    def gradients(self, *players: str) -> Tensor:
        """Of the surrogate, a row each."""
        own = [p for player in players for p in self.instance.players()[player]]
        _, ascent = self.instance._ascent(self.x, note=False)
        found = torch.autograd.grad(ascent, own, torch.eye(len(ascent)).double(), is_grads_batched=True)
        return torch.cat([g.flatten(1) for g in found], 1)

    def mean(self, *players: str) -> Tensor:
        return self.chance @ self.gradients(*players)

    def variance(self) -> float:
        """Of the recognition net's gradient, all coordinates together."""
        rows = self.gradients("recognition")
        return (self.chance @ (rows - self.chance @ rows).square()).sum().item()

    def bound(self, *players: str) -> Tensor:
        """The exact gradient of the bound of K = 1 or 2 draws."""
        own = [p for player in players for p in self.instance.players()[player]]
        p, q = log_p(self.instance.generative, self.layers), log_q(self.instance.recognition, self.layers)
        if self.instance.config.objective != "vimco":
            return gradients(q.exp() @ (p - q), own)
        weights = (p - q).exp()
        return gradients((q.exp()[:, None] * q.exp() * ((weights[:, None] + weights) / 2).log()).sum(), own)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("off", [None, *SWITCHES, "all"])
def test_nvil_is_unbiased_with_each_switch(off, samples, monkeypatch):
    switched = OFF if off == "all" else {} if off is None else {off: False}
    instance = model(samples=samples, **switched)
    instance.moments.covariance.clamp_(max=1.0)  # so that scaling by max(1, √v) is by one; the next test has it
    world = Enumerated(instance, monkeypatch)
    assert torch.allclose(world.mean("generative", "recognition"), world.bound("generative", "recognition"), atol=1e-10)


def test_variance_normalisation_divides_each_layers_signal(monkeypatch):
    instance = model()
    instance.moments.covariance.copy_(torch.tensor([9.0, 0.5])[:, None, None])
    scaled, unscaled = Enumerated(instance, monkeypatch).mean("recognition"), None
    instance.moments.covariance.zero_()
    unscaled = Enumerated(instance, monkeypatch).mean("recognition")
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in instance.recognition.layers]
    assert torch.allclose(scaled, unscaled / torch.tensor([3.0] * per_layer[0] + [1.0] * per_layer[1]), atol=1e-12)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("hidden", [(2, 2), (3,), (2, 1, 1)])
def test_the_control_variate_is_unbiased(hidden, samples, monkeypatch):
    world = Enumerated(model(hidden, objective="control_variate", samples=samples), monkeypatch)
    assert torch.allclose(world.mean("generative", "recognition"), world.bound("generative", "recognition"), atol=1e-10)


def test_vimco_is_unbiased_for_both_nets(monkeypatch):
    world = Enumerated(model(objective="vimco", samples=2), monkeypatch)
    assert torch.allclose(world.mean("generative", "recognition"), world.bound("generative", "recognition"), atol=1e-10)


def fitted(instance: NVIL, world: Enumerated) -> None:
    """Baselines and running moments as they are after learning at a standstill of the nets."""
    own = list(instance.baselines.parameters())
    adam = torch.optim.Adam(own, lr=0.05) if own else None
    for _ in range(150 if own else 0):
        assert adam is not None
        adam.zero_grad()
        instance.moments.mean.zero_()
        instance.moments.covariance.zero_()
        _, ascent = instance._ascent(world.x, note=False)
        (-(world.chance @ ascent)).backward(inputs=own)
        adam.step()
    if instance.config.objective == "vimco":
        return
    torch.manual_seed(0)
    drawn = torch.multinomial(world.chance, 20_000, replacement=True)
    noted: list[Tensor] = []
    instance.moments.add, add = noted.append, instance.moments.add  # type: ignore[method-assign]
    instance._ascent(world.x, note=True)
    instance.moments.add = add  # type: ignore[method-assign]
    add(noted[0][drawn])
    instance.moments.settle(1.0)


def test_every_estimator_varies_less_than_the_plain_score_function(monkeypatch):
    """One table: trace of the covariance of the recognition net's gradient, one x, two draws, by enumeration.

    `vimco` ascends another bound; its plain estimator is the same with L̂ for a signal.
    """
    table: dict[str, float] = {}
    for name, config in {
        "score function": OFF,
        "control variate": {"objective": "control_variate"},
        "centring": {**OFF, "centring": True},
        "local signals": {**OFF, "local_signals": True},
        "baseline": {**OFF, "baseline": True},
        "nvil": {"variance_normalisation": False},  # which would only change the gradient's scale
        "vimco": {"objective": "vimco"},
    }.items():
        instance = model(samples=2, **config)
        world = Enumerated(instance, monkeypatch)
        with torch.no_grad():
            if name != "vimco":
                instance.moments.mean.zero_()
        fitted(instance, world)
        table[name] = world.variance()
    instance = model(samples=2, objective="vimco")
    monkeypatch.setattr(
        "dgm_core.models.belief.nvil.vimco",
        lambda p, q: (p - q).logsumexp(1) + ((p - q).detach().logsumexp(1, keepdim=True) * q).sum(1),
    )
    table["score function of two draws' bound"] = Enumerated(instance, monkeypatch).variance()
    for name in ("control variate", "centring", "local signals", "baseline", "nvil"):
        assert table[name] < table["score function"], table
    for part in ("centring", "local signals", "baseline"):
        assert table["nvil"] < table[part], table
    assert table["vimco"] < table["score function of two draws' bound"], table


@pytest.mark.parametrize("config", [{}, {"objective": "control_variate"}, {"objective": "vimco", "samples": 2}])
def test_the_gradient_of_real_draws_has_the_exact_mean(config, monkeypatch):
    """10⁵ draws with a fixed seed: what the model draws by itself has the chances that the tests above give it."""
    instance = model(**config)
    if not config:
        instance.moments.covariance.zero_()
    own = [*instance.generative.parameters(), *instance.recognition.parameters()]
    torch.manual_seed(0)
    batch = Batch(X.expand(1000, -1))
    blocks = [gradients(instance.loss(batch, "bound", CLOCK).value, own) for _ in range(100)]
    exact = -Enumerated(instance, monkeypatch).bound("generative", "recognition")
    assert_mean(blocks, exact)


def test_the_loss_is_the_bound():
    for config in ({}, {"objective": "control_variate", "samples": 3}, {"objective": "vimco", "samples": 3}):
        instance = model(**config)
        K = instance.config.samples
        torch.manual_seed(0)
        log_weights = instance.log_weights(X.double().expand(9, -1), K)
        torch.manual_seed(0)
        value = instance.loss(Batch(X.expand(9, -1)), "bound", CLOCK).value
        several = (log_weights.logsumexp(1) - torch.tensor(float(K)).double().log()).mean()
        expected = several if instance.config.objective == "vimco" else log_weights.mean()
        assert torch.allclose(value, -expected, atol=1e-12)


def test_the_first_layers_baseline_learns_the_mean_signal(monkeypatch):
    instance = model(variance_normalisation=False, centring=False)
    world = Enumerated(instance, monkeypatch)
    torch.manual_seed(0)
    instance.moments.mean.zero_()
    fitted(instance, world)
    found = instance.baselines[0](X.double() - instance.recognition.mean)
    p, q = log_p(instance.generative, world.layers), log_q(instance.recognition, world.layers)
    assert abs(found - q.exp() @ (p - q)) < 0.02  # 150 steps of Adam; the signal's deviation is above one
    assert instance.moments.covariance[0, 0, 0] > 1


def test_statistics_start_at_the_first_batch_and_follow_once_a_play():
    instance = model(decay=0.75).train()
    x = torch.randint(0, 2, (12, 5), dtype=torch.uint8)
    seen: list[Tensor] = []
    add = instance.moments.add

    def note(values: Tensor) -> None:
        seen.append(values.detach())
        add(values)

    instance.moments.add = note  # type: ignore[method-assign]
    instance.enter("bound", iter([Batch(x[:6]), Batch(x[6:])]))
    assert [len(v) for v in seen] == [6]  # the first batch only, at the visible biases that all batches gave
    assert torch.allclose(instance.moments.mean, seen[0].mean((0, 1)), atol=1e-12)
    variance = seen[0].var((0, 1), correction=0)[..., None]
    assert torch.allclose(instance.moments.covariance, variance, atol=1e-10)
    mean = instance.moments.mean.clone()
    seen.clear()
    for part in x.split(5):
        instance.loss(Batch(part), "bound", CLOCK)
    assert torch.equal(instance.moments.mean, mean)
    instance.after("bound", CLOCK)
    whole = torch.cat(seen)
    assert torch.allclose(instance.moments.mean, 0.75 * mean + 0.25 * whole.mean((0, 1)), atol=1e-12)
    expected = 0.75 * variance + 0.25 * whole.var((0, 1), correction=0)[..., None]
    assert torch.allclose(instance.moments.covariance, expected, atol=1e-10)


def test_running_moments_are_those_of_all_that_was_added():
    moments = RunningMoments(3, 2).double()
    values = torch.randn(40, 3, 2).double() + 5
    for part in values.split(7):
        moments.add(part)
    moments.settle(1.0)
    assert torch.allclose(moments.mean, values.mean(0), atol=1e-12)
    for group in range(3):
        expected = torch.cov(values[:, group].T, correction=0)
        assert torch.allclose(moments.covariance[group], expected, atol=1e-12)


def test_players_follow_the_objective():
    def moves(**config: Any) -> tuple[str, ...]:
        return model(**config).turns()[0].players

    assert moves() == ("generative", "recognition", "baseline")
    assert moves(baseline=False) == ("generative", "recognition")
    assert moves(objective="vimco", samples=2) == ("generative", "recognition")
    idle = model(objective="vimco", samples=2)
    _, recipe = NVIL.tiny(idle.data)  # which has an optimiser for baselines, that vimco has not
    assert list(build_players(idle, recipe)) == ["generative", "recognition"]
    assert len(model(local_signals=False).baselines) == 1
    assert len(model().baselines) == 2
    with pytest.raises(ValueError, match="set samples to 2 or more"):
        model(objective="vimco")


def test_one_pass_reaches_every_player():
    instance = model()
    instance.loss(Batch(X.expand(9, -1)), "bound", CLOCK).value.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in instance.parameters())
