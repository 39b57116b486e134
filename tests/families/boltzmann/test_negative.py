"""An RBM's negative phase: when its chains move and with what, in half precision, and over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.boltzmann.rbm import RBM
from dgm_core.nn.rbm import draw_bernoulli
from dgm_core.training.trainer import Trainer
from tests.contract import checks
from tests.families.boltzmann.variants import VARIANTS, Tempered
from tests.support import SPECS, Tensors, TwoRanks, examples

CLOCK = Clock(0, 10)


def model(negative: str, visible: int = 4, hidden: int = 3, **config: Any) -> RBM:
    given = RBM.Config.model_validate({"hidden": hidden, "negative": negative, "chains": 6, "centred": False, **config})
    instance = RBM(given, DataSpec("vector", (visible,), 2)).double()
    with torch.no_grad():
        for p in instance.layer.parameters():
            p.normal_()
    return instance


@pytest.mark.parametrize("steps", [1, 3])
def test_a_chain_goes_on_from_the_hidden_units_of_the_play_before(steps):
    """(v, h) at one play's parameters, then v given h and all further steps at the next play's."""
    instance = model("pcd", gibbs=steps).train()
    layer, v = instance.layer, instance.particles.clone()
    before = torch.sigmoid(layer.hidden_bias + v @ layer.weight).detach()
    for part in torch.randint(0, 2, (4, 4), dtype=torch.uint8).split(2):
        instance.loss(Batch(part), "model", CLOCK)
    assert torch.equal(instance.particles, v)  # however many pieces a batch has
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))  # as the optimiser's step
    torch.manual_seed(3)
    instance.after("model", CLOCK)
    torch.manual_seed(3)
    h = (torch.rand_like(before) < before).double()
    for step in range(steps):
        if step > 0:
            h = draw_bernoulli(layer.hidden_bias + v @ layer.weight)
        v = draw_bernoulli(layer.visible_bias + h @ layer.weight.T)
    assert torch.equal(instance.particles, v)


def test_a_loss_in_evaluation_leaves_no_trace_on_the_next_step():
    ends = []
    for looked in (False, True):
        torch.manual_seed(1)
        instance = model("pcd").train()
        instance.loss(Batch(torch.ones(2, 4, dtype=torch.uint8)), "model", CLOCK)
        instance.after("model", CLOCK)
        if looked:
            instance.eval().loss(Batch(torch.zeros(2, 4, dtype=torch.uint8)), "model", CLOCK)
            instance.train()
        with torch.no_grad():
            instance.layer.weight.neg_()
        torch.manual_seed(2)
        instance.after("model", CLOCK)
        ends.append(instance.particles.clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("negative", ["pcd", "cd", "tempering"])
def test_half_precision_is_for_products_alone(negative):
    """Samples stay full, chains move with the play's precision, and a gradient is off by the products' rounding."""
    torch.manual_seed(0)
    instance = model(negative, visible=40, hidden=30).float().train()
    with torch.no_grad():
        instance.layer.weight.mul_(0.1)
    x = torch.randint(0, 2, (64, 40), dtype=torch.uint8)
    found = {}
    for half in (False, True):
        instance.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = instance.loss(Batch(x), "model", CLOCK)
        loss.value.backward()
        found[half] = torch.cat([p.grad.flatten() for p in instance.parameters() if p.grad is not None])
        assert loss.value.dtype == torch.float32
    # bfloat16 keeps 8 bits: rounding is within 2⁻⁸ of numbers of size one, and flips few of CD's draws.
    assert (found[True] - found[False]).abs().max() < (0.2 if negative == "cd" else 0.02)
    assert not torch.equal(found[True], found[False])
    instance.after("model", CLOCK)
    assert instance.particles.dtype == torch.float32


def test_rare_events_keep_their_chance_in_half_precision():
    torch.manual_seed(0)
    n, chance = 4_000_000, 1e-3
    logits = torch.full((n,), chance).logit().bfloat16()
    p = torch.sigmoid(logits[0].double()).item()
    found = draw_bernoulli(logits).mean().item()
    assert abs(found - p) < 6 * (p / n) ** 0.5  # of a half-precision draw one in 256 would be on


@pytest.mark.parametrize("check", [*checks.PER_SPEC, checks.microbatches_equal_one_batch], ids=lambda f: f.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spec", ["binary_vector", "real_vector"])
def test_contract(check, variant, spec) -> None:
    check(variant, SPECS[spec])


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one(variant, two_ranks: TwoRanks) -> None:
    checks.two_ranks_equal_one(variant, SPECS["binary_vector"], two_ranks)


def likelihood(variant: type[RBM], seed: int) -> float:
    """Exact, after a tiny training with this worker's own noise and its share of chains and batches."""
    torch.manual_seed(seed)
    spec = SPECS["binary_vector"]
    config, recipe = variant.tiny(spec)
    instance = variant(config, spec)
    Trainer(instance, recipe.merged({"steps": 150}), Tensors(examples(spec, 400)), seed=seed).fit()
    return instance.eval().log_prob(examples(spec, 400, seed=1).x).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("variant", [RBM, Tempered])
def test_two_ranks_with_chains_of_their_own_reach_the_same_likelihood(variant, two_ranks: TwoRanks) -> None:
    seeds = range(3)
    one = torch.tensor([likelihood(variant, seed) for seed in seeds])
    both = torch.tensor([two_ranks.run(likelihood, variant, seed) for seed in seeds])
    assert torch.equal(both[:, 0], both[:, 1])  # the ranks hold one model
    two = both[:, 0]
    assert not torch.equal(one, two)
    error = ((one.var() + two.var()) / len(seeds)).sqrt()
    # Six standard errors, which three seeds each tell within a factor of two; a wrong step would cost whole nats.
    assert abs(one.mean() - two.mean()) < max(6 * error.item(), 0.05)


@pytest.mark.slow
def test_learns_its_tiny_problem() -> None:
    checks.learns_its_tiny_problem(Tempered, SPECS["binary_image"])
