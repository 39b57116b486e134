"""Predictability minimisation: who descends what, through whom, and what the code is in the end."""

import math
from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.adversarial.predictability import Predictability
from dgm_core.nn.code_units import Marginals, Predictors, discs
from dgm_core.training.trainer import Schedule, Trainer
from tests.contract import checks
from tests.families.adversarial.predictability_variants import AllTerms, Semilinear
from tests.support import SPECS, TwoRanks

SPACE = DataSpec("vector", (5,), None)
GREY = DataSpec("image", (1, 8, 8), 256)
CLOCK = Clock(0, 10)
# The same float64 operations but for the order of sums.
EXACT = {"rtol": 0, "atol": 1e-13}
VARIANT_CHECKS = [c for c in checks.PER_SPEC if c is not checks.config_round_trips]


def build(spec: DataSpec = SPACE, **overrides: object) -> Predictability:
    torch.manual_seed(0)
    return Predictability(Predictability.tiny(spec)[0].merged(overrides), spec).double()


def data(spec: DataSpec = SPACE, n: int = 7) -> Tensor:
    g = torch.Generator().manual_seed(1)
    if spec.levels is None:
        return torch.randn(n, *spec.shape, generator=g, dtype=torch.float64)
    return torch.randint(0, spec.levels, (n, *spec.shape), generator=g).to(spec.dtype)


@pytest.mark.parametrize("spec", [SPACE, GREY], ids=["vector", "image"])
def test_turns_are_equations_1_3_and_6(spec: DataSpec) -> None:
    model = build(spec, conditioned_variance=0.5, variance=2.0, invertibility=3.0, predictability=4.0)
    x = data(spec)
    target = (x.double() + 0.5) / 128 - 1 if spec.levels else x
    target = target.flatten(1)
    y = model.encode(x)
    p, n = model.predictors(y), len(x)
    v_c = (p - y).square().sum() / (2 * n)
    v = (y - y.mean(0)).square().sum() / (2 * n)
    h = (p - y.mean(0)).square().sum() / (2 * n)
    i = (model.decoder(y) - target).square().sum() / (2 * n)
    units = model.loss(Batch(x), "units", CLOCK)
    torch.testing.assert_close(model.loss(Batch(x), "predictors", CLOCK).value, v_c, **EXACT)
    torch.testing.assert_close(units.value, -0.5 * v_c - 2 * v + 3 * i + 4 * h, **EXACT)
    torch.testing.assert_close(model.loss(Batch(x), "decoder", CLOCK).value, i, **EXACT)
    named = ("conditioned_variance", "variance", "predictability", "reconstruction")
    for name, term in zip(named, (v_c, v, h, i), strict=True):
        torch.testing.assert_close(units.metrics[name], term.detach(), **EXACT)


def test_it_is_one_game() -> None:
    """By default units ascend exactly what predictors descend, through the predictors, too."""
    model, batch = build(invertibility=0.0), Batch(data())
    assert Predictability.defaults(SPACE)[0].merged({"codes": 3}).conditioned_variance == 1.0
    ours = torch.autograd.grad(model.loss(batch, "units", CLOCK).value, list(model.units.parameters()))
    y = model.encode(batch.x)
    theirs = torch.autograd.grad(0.5 * (model.predictors(y) - y).square().sum(1).mean(), list(model.units.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, -b, **EXACT)


def test_semilinear_units_and_predictors_learn_at_once_and_apart() -> None:
    """Predictors by the delta rule; units as if each prediction were a constant."""
    model, batch = build(networks="semilinear", invertibility=0.0), Batch(data())
    assert [(t.name, t.players) for t in model.turns()] == [
        ("game", ("predictors", "units")),
        ("decoder", ("decoder",)),
    ]
    assert model.units.hidden is None
    assert model.predictors.hidden is None
    model.loss(batch, "game", CLOCK).value.backward()
    with torch.no_grad():
        y = model.encode(batch.x)
        p = model.predictors(y)
        error, n = p - y, len(y)
        # ∂E/∂w of a sigmoid: (P − y) P (1 − P) times the input; a unit's: (P − y) y (1 − y) x, from T = ½ Σ (P − y)².
        delta, climb = error * p * (1 - p) / n, error * y * (1 - y) / n
        weights = torch.einsum("bi,bik->ik", delta, y[:, model.predictors.others])
        units = torch.einsum("bi,bd->id", climb, model.to_network(batch.x))
    torch.testing.assert_close(model.predictors.weight.grad, weights, **EXACT)
    torch.testing.assert_close(model.predictors.bias.grad, delta.sum(0), **EXACT)
    torch.testing.assert_close(model.units.weight.grad, units, **EXACT)
    torch.testing.assert_close(model.units.bias.grad, climb.sum(0), **EXACT)
    assert all(p.grad is None for p in model.decoder.parameters())


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_predictor_sees_all_units_but_its_own(hidden: int) -> None:
    torch.manual_seed(0)
    predictors = Predictors(4, hidden).double()
    y = torch.rand(1, 4, dtype=torch.float64, requires_grad=True)
    jacobian = torch.cat([torch.autograd.grad(p, y, retain_graph=True)[0] for p in predictors(y)[0]])
    assert jacobian.diag().abs().max() == 0
    assert (jacobian + torch.eye(4)).abs().min() > 0


@pytest.mark.parametrize("form", ["hidden", "semilinear"])
def test_a_turn_reaches_every_parameter_of_its_players_and_no_other(form: str) -> None:
    for turn in build(networks=form).turns():
        model = build(networks=form)
        for name, player in model.named_children():
            player.requires_grad_(name in turn.players)  # as the trainer does
        model.loss(Batch(data(n=16)), turn.name, CLOCK).value.backward()
        for name, p in model.named_parameters():
            mine = name.split(".")[0] in turn.players
            assert (p.grad is not None and bool(p.grad.any())) == mine, (turn.name, name)


def test_a_receptive_field_is_a_disc_within_the_image() -> None:
    seen = discs((2, 16, 12), 9, 5.0).view(9, 2, 16, 12)
    assert torch.equal(seen[:, 0], seen[:, 1])
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(12.0), indexing="ij")
    middles = []
    for disc in seen[:, 0]:
        # A disc of diameter 5 has area 19.6; pixels whose middles lie in it are 16 to 25, wherever it stands.
        assert 16 <= disc.sum() <= 25
        r, c = (rows * disc).sum() / disc.sum(), (columns * disc).sum() / disc.sum()
        assert ((rows - r).square() + (columns - c).square())[disc > 0].max() < 3.5**2
        middles.append((r.item(), c.item()))
    assert len({(round(r, 1), round(c, 1)) for r, c in middles}) == 9
    assert discs((1, 6, 6), 2, 6.0).sum(1).tolist() == [32, 32]  # the whole image but for a pixel at each corner
    model = build(GREY, networks="semilinear", receptive_field=4.0)
    x = model.to_network(data(GREY)).requires_grad_()
    (slope,) = torch.autograd.grad(model.units(x)[:, 1].sum(), x)
    assert torch.equal(slope[0].flatten() != 0, discs((1, 8, 8), 3, 4.0)[1] > 0)


def test_draws_are_independent_and_of_the_marginals() -> None:
    torch.manual_seed(0)
    marginals = Marginals(2, bins=4).double()
    first = torch.tensor([0.1, 0.1, 0.1, 0.6], dtype=torch.float64)
    marginals.add(torch.stack([first, 1 - first], 1))  # one decides the other
    marginals.settle()
    torch.testing.assert_close(
        marginals.shares, torch.tensor([[0.75, 0, 0.25, 0], [0, 0.25, 0, 0.75]], dtype=torch.float64)
    )
    z = marginals.draw(20_000)
    assert z.min() >= 0
    assert z.max() <= 1
    shares = torch.stack([torch.histc(z[:, i], 4, 0, 1) for i in range(2)]) / 20_000
    # Of 20,000 draws: standard error 0.003.
    torch.testing.assert_close(shares, marginals.shares, rtol=0, atol=0.015)
    assert torch.corrcoef(z.T)[0, 1].abs() < 0.035  # five standard errors of 20,000
    # Uniform within a bin.
    assert z[z[:, 0] < 0.25, 0].mean().item() == pytest.approx(0.125, abs=0.003)


def test_marginals_follow_plays_in_training_only() -> None:
    model = build()
    first, second = Batch(data()), Batch(data(n=3) + 2)

    def histogram(*batches: Batch) -> Tensor:
        index = (model.encode(torch.cat([b.x for b in batches])) * 64).long().clamp(0, 63)
        return torch.stack([torch.bincount(column, minlength=64) for column in index.T]).double() / len(index)

    def play(batch: Batch, turn: str = "decoder") -> Tensor:
        before = model.marginals.shares.clone()
        model.loss(batch, turn, CLOCK)
        assert torch.equal(model.marginals.shares, before)  # not before the play is over
        model.after(turn, CLOCK)
        return model.marginals.shares

    start = model.marginals.shares.clone()
    assert torch.equal(play(first, "units"), start)
    torch.testing.assert_close(play(first), histogram(first), **EXACT)
    both = 0.5 * histogram(first) + 0.5 * histogram(second)  # plays count alike at first
    torch.testing.assert_close(play(second), both, **EXACT)
    model.eval()
    torch.testing.assert_close(play(first), both, **EXACT)
    model.calibrate(iter([first, second]))
    torch.testing.assert_close(model.marginals.shares, histogram(first, second), **EXACT)


def test_every_level_comes_back_from_the_network() -> None:
    model = build(GREY)
    x = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    assert torch.equal(model.to_stored(model.to_network(x)), x)
    z = model.draw_latent(5)
    assert torch.equal(model.to_stored(model.generate(z)).double(), (model.decode(z) + 0.5).floor())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"conditioned_variance": 0.0}, "the units need an objective"),
        ({"networks": "semilinear", "predictability": 1.0}, "needs networks: hidden"),
        ({"receptive_field": 5.0}, "needs networks: semilinear"),
        ({"codes": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Predictability.Config.model_validate(given)


@pytest.mark.parametrize(
    ("spec", "given", "message"),
    [
        (DataSpec("audio", (16,), 256), {}, "kind 'audio'"),
        (SPACE, {"networks": "semilinear", "receptive_field": 5.0}, "Leave it out"),
        (GREY, {"networks": "semilinear", "receptive_field": 9.0}, "give at most 8"),
    ],
)
def test_refuses_what_it_cannot_model(spec: DataSpec, given: dict[str, object], message: str) -> None:
    with pytest.raises(DataMismatch, match=message):
        Predictability(Predictability.Config.model_validate(given), spec)


@pytest.mark.parametrize("check", VARIANT_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("model", "spec"), [(Semilinear, "grey_image"), (AllTerms, "real_vector")])
def test_contract_of_variants(check, model, spec) -> None:  # type: ignore[no-untyped-def]
    check(model, SPECS[spec])


@pytest.mark.parametrize("model", [Semilinear, AllTerms])
def test_two_ranks_equal_one(model: type[Predictability], two_ranks: TwoRanks) -> None:
    checks.two_ranks_equal_one(model, SPECS["grey_image"], two_ranks)


class Mixtures:
    """Eight mixtures, with a little noise, of four independent bits."""

    def __init__(self, seed: int, n: int = 8192) -> None:
        g = torch.Generator().manual_seed(seed)
        ways = torch.nn.functional.normalize(torch.randn(8, 4, generator=g), dim=0)
        self.bits = torch.rand(n, 4, generator=g) < 0.5
        self.x = (2.0 * self.bits - 1) @ ways.T + 0.05 * torch.randn(n, 8, generator=g)

    def at(self, position: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        return Batch(self.x[(position + torch.arange(size)) % len(self.x)])

    def one_pass(self, size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        yield Batch(self.x)


def coded(seed: int, **changes: object) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    config = Predictability.Config(codes=4, hidden=16, predictor_hidden=8).merged(changes)
    model, mixtures = Predictability(config, DataSpec("vector", (8,), None)), Mixtures(seed)
    units = Optimizer(lr=5e-3, schedule="linear")
    players = {"predictors": units.merged({"lr": 2e-2}), "units": units, "decoder": units}
    # As many plays of either form: seven in a round, or two.
    recipe = Recipe(batch_size=128, steps=800 if not model.semilinear else 3000, optimizers=players)
    Trainer(model, recipe, mixtures, seed=seed, schedule=Schedule(log_every=1000)).fit()
    return model.eval().measures(mixtures.x)


def largest(between: Tensor) -> float:
    return (between - between.diag().diag()).max().item()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "seed"), [("hidden", 0), ("hidden", 1), ("hidden", 2), ("semilinear", 0)])
def test_units_become_independent_and_say_everything(form: str, seed: int) -> None:
    found = coded(seed, networks=form)
    # Of four fair bits counted on 8192 examples, 16 codes: chance alone leaves 11 / (2 · 8192) = 0.0007 nats.
    assert largest(found["pairwise_information"]) <= 0.02
    assert found["total_correlation"] <= 0.02
    assert found["predictors_information"].max() <= 0.02
    # A constant would be independent, too: nothing of 4 ln 2 is lost.
    assert found["entropy"].sum() - found["total_correlation"] > 0.98 * 4 * math.log(2)


@pytest.mark.slow
def test_without_the_game_they_do_not() -> None:
    """The same units with the largest variance, but nobody to escape: they all say the same."""
    found = coded(0, conditioned_variance=0.0, variance=1.0)
    assert largest(found["pairwise_information"]) > 0.1
    assert found["total_correlation"] > 0.5
