"""WGAN: algorithm 1 with its clipping, and the authors' long rounds."""

import torch

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.adversarial.wgan import WGAN
from dgm_core.training.trainer import Trainer
from tests.support import Tensors, examples

PLANE = DataSpec("vector", (2,), None)
GREY = DataSpec("image", (1, 8, 8), 256)
CLOCK = Clock(0, 10)


def build(spec: DataSpec = PLANE, **overrides: object) -> WGAN:
    torch.manual_seed(0)
    config, _ = WGAN.tiny(spec)
    return WGAN(config.merged(overrides), spec).double()


def test_losses_are_the_two_sides_of_equation_2() -> None:
    model, x = build(), torch.randn(6, 2, dtype=torch.float64)
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "critic", CLOCK)
    torch.manual_seed(1)
    theirs = model.loss(Batch(x), "generator", CLOCK)
    torch.manual_seed(1)
    fake = model.generator(torch.randn(6, model.latents, dtype=torch.float64))
    torch.testing.assert_close(loss.value, model.critic(fake).mean() - model.critic(x).mean(), rtol=0, atol=1e-14)
    torch.testing.assert_close(loss.metrics["wasserstein"], -loss.value.detach(), rtol=0, atol=0)
    torch.testing.assert_close(theirs.value, -model.critic(fake).mean(), rtol=0, atol=1e-14)


def test_clipping_bounds_every_weight_of_the_critic_and_none_of_the_generator() -> None:
    for spec in (PLANE, GREY):
        model = build(spec, clip=0.013)
        before = [p.clone() for p in model.critic.parameters()]
        untouched = [p.clone() for p in model.generator.parameters()]
        model.after("generator", CLOCK)
        assert all(torch.equal(p, b) for p, b in zip(model.critic.parameters(), before, strict=True))
        model.after("critic", CLOCK)
        assert max(float(p.detach().abs().max()) for p in model.critic.parameters()) == 0.013
        for p, b in zip(model.critic.parameters(), before, strict=True):
            assert torch.equal(p, b.clamp(-0.013, 0.013))
        assert all(torch.equal(p, b) for p, b in zip(model.generator.parameters(), untouched, strict=True))


def test_weights_stay_clipped_through_training() -> None:
    config, recipe = WGAN.tiny(PLANE)
    model = WGAN(config.merged({"clip": 0.02, "long_steps": 4, "long_every": 2}), PLANE)
    Trainer(model, recipe.merged({"steps": 4}), Tensors(examples(PLANE, 64))).fit()
    assert max(float(p.detach().abs().max()) for p in model.critic.parameters()) <= 0.02


def plays_of_the_critic(model: WGAN, step: int, total: int) -> int:
    return sum(t.repeat for t in model.turns() if t.players == ("critic",) and t.live(Clock(step, total)))


def test_long_rounds_are_the_authors() -> None:
    """100 plays in the first 25 rounds and in every 500th, else 5."""
    model = build(critic_steps=5, long_steps=100, long_every=500, long_start=25 / 2000)
    found = [plays_of_the_critic(model, step, 2000) for step in range(2000)]
    assert found == [100 if step < 25 or step % 500 == 0 else 5 for step in range(2000)]
    assert [t.players for t in model.turns()][-1] == ("generator",)


def test_long_rounds_can_be_left_out() -> None:
    model = build(critic_steps=5, long_steps=0)
    assert [(t.name, t.repeat) for t in model.turns()] == [("critic", 5), ("generator", 1)]


def test_defaults_are_the_papers() -> None:
    config, recipe = WGAN.defaults(GREY)
    assert (config.clip, config.critic_steps, recipe.batch_size) == (0.01, 5, 64)
    assert {(o.algorithm, o.lr, o.momentum) for o in recipe.optimizers.values()} == {("rmsprop", 5e-5, 0.0)}
    assert config.long_start * recipe.steps == 25
