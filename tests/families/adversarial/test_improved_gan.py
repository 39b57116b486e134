"""Improved GAN: each technique on its own, each left out, and what they leave in the state."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.adversarial.improved_gan import ImprovedGAN
from dgm_core.nn.minibatch import MinibatchDiscrimination
from dgm_core.nn.norm import BatchNorm
from dgm_core.nn.virtual_batch_norm import VirtualBatchNorm
from dgm_core.training import checkpoint
from dgm_core.training.trainer import Trainer
from tests.support import Tensors, equal_states, examples

PLANE = DataSpec("vector", (2,), None)
GREY = DataSpec("image", (1, 8, 8), 256)
START, END = Clock(0, 10), Clock(10, 10)
NONE = {
    "feature_matching": 0.0,
    "minibatch_kernels": 0,
    "historical_averaging": 0.0,
    "real_target": 1.0,
    "virtual_batch": 0,
    "instance_noise": 0.0,
}


def build(spec: DataSpec = PLANE, overrides: Mapping[str, object] = {}) -> ImprovedGAN:
    torch.manual_seed(0)
    config, _ = ImprovedGAN.tiny(spec)
    return ImprovedGAN(config.merged(overrides), spec).double()


def fakes(model: ImprovedGAN, n: int) -> Tensor:
    torch.manual_seed(1)
    return model.generator(model.draw_latent(n))


def losses(model: ImprovedGAN, x: Tensor, clock: Clock = START) -> tuple[Tensor, Tensor]:
    found = []
    for turn in ("discriminator", "generator"):
        torch.manual_seed(1)
        found.append(model.loss(Batch(x), turn, clock).value)
    return found[0], found[1]


def test_with_everything_left_out_it_is_the_original_game() -> None:
    model, x = build(PLANE, NONE), torch.randn(6, 2, dtype=torch.float64)
    discriminator, generator = losses(model, x)
    real, fake = model.discriminator(x), model.discriminator(fakes(model, 6))
    torch.testing.assert_close(discriminator, F.softplus(-real).mean() + F.softplus(fake).mean(), rtol=0, atol=1e-14)
    torch.testing.assert_close(generator, F.softplus(-fake).mean(), rtol=0, atol=1e-14)
    kinds = {type(m) for m in model.modules()}
    assert BatchNorm in kinds
    assert not kinds & {VirtualBatchNorm, MinibatchDiscrimination}
    assert not [name for name in model.state_dict() if "past" in name or "latents" in name]


@pytest.mark.parametrize("spec", [PLANE, GREY], ids=["vector", "image"])
@pytest.mark.parametrize("name", sorted(NONE))
def test_each_can_be_left_out(spec: DataSpec, name: str) -> None:
    model = build(spec, {name: NONE[name]})
    batch = Batch(examples(spec, 8).x)
    for turn in model.turns():
        loss = model.loss(batch, turn.name, START)
        assert loss.value.isfinite()
        model.after(turn.name, START)
    others = build(spec)
    kinds, all_kinds = ({type(m) for m in m_.modules()} for m_ in (model, others))
    gone = {"minibatch_kernels": MinibatchDiscrimination, "virtual_batch": VirtualBatchNorm}
    assert (gone[name] in all_kinds - kinds) if name in gone else (kinds >= {*gone.values()})
    assert (len(model.past) == 0) == (name == "historical_averaging")


def test_feature_matching_compares_means_of_the_last_hidden_layer() -> None:
    model, x = (
        build(PLANE, {**NONE, "feature_matching": 3.0, "adversarial": 0.0}),
        torch.randn(6, 2, dtype=torch.float64),
    )
    _, generator = losses(model, x)
    body = model.discriminator.body
    gap = body(x).mean(0) - body(fakes(model, 6)).mean(0)
    torch.testing.assert_close(generator, 3.0 * gap.square().mean(), rtol=0, atol=1e-14)


def test_a_generator_without_an_objective_is_refused() -> None:
    with pytest.raises(ValidationError, match="the generator needs an objective"):
        ImprovedGAN.Config(adversarial=0.0, feature_matching=0.0)


def test_smoothing_is_of_the_data_alone() -> None:
    model, x = build(PLANE, {**NONE, "real_target": 0.9}), torch.randn(6, 2, dtype=torch.float64)
    discriminator, generator = losses(model, x)
    real, fake = model.discriminator(x), model.discriminator(fakes(model, 6))
    target = torch.full_like(real, 0.9)
    expected = F.binary_cross_entropy_with_logits(real, target) + F.softplus(fake).mean()
    torch.testing.assert_close(discriminator, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(generator, F.softplus(-fake).mean(), rtol=0, atol=1e-14)


def test_minibatch_features_stand_beside_an_examples_own() -> None:
    model, x = build(PLANE, {**NONE, "minibatch_kernels": 3}), torch.randn(6, 2, dtype=torch.float64)
    judge = model.discriminator
    assert judge.nearness is not None
    f = judge.body(x)
    torch.testing.assert_close(
        judge(x), judge.score(torch.cat([f, judge.nearness(f)], 1)).flatten(), rtol=0, atol=1e-14
    )
    # Data and samples are batches of their own: a collapsed batch of samples does not change the data's scores.
    order = torch.randperm(6)
    torch.testing.assert_close(judge(x[order]), judge(x)[order], rtol=0, atol=1e-13)
    assert not torch.allclose(judge(x)[:3], judge(x[:3]))


def test_instance_noise_falls_to_zero() -> None:
    x = torch.randn(2000, 2, dtype=torch.float64)
    model = build(PLANE, {**NONE, "instance_noise": 0.5})
    for clock, sd in ((START, 0.5), (Clock(5, 10), 0.25), (END, 0.0)):
        noise = model._noisy(x, clock) - x
        # 4000 draws: their deviation is known to 1 %.
        assert noise.std().item() == pytest.approx(sd, rel=0.05, abs=1e-12)
    plain = build(PLANE, NONE)
    for a, b in zip(losses(model, x, END), losses(plain, x, END), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_history_is_the_mean_of_where_each_player_stood() -> None:
    """(1/t) Σᵢ θ[i] over the start and every step since, of that player alone."""
    model = build(PLANE, {**NONE, "historical_averaging": 2.0})
    stood = {name: [flat(model.get_submodule(name))] for name in ("discriminator", "generator")}
    for turn in ("discriminator", "generator", "discriminator", "discriminator"):
        with torch.no_grad():
            for p in model.get_submodule(turn).parameters():
                p.add_(torch.randn_like(p))
        model.after(turn, START)
        stood[turn].append(flat(model.get_submodule(turn)))
        for name, positions in stood.items():
            torch.testing.assert_close(model.past[name].mean, torch.stack(positions).mean(0), rtol=0, atol=1e-13)
    x = torch.randn(6, 2, dtype=torch.float64)
    plain = build(PLANE, NONE)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("past")})
    for name, mine, without in zip(("discriminator", "generator"), losses(model, x), losses(plain, x), strict=True):
        distance = (flat(model.get_submodule(name)) - model.past[name].mean).square().sum()
        torch.testing.assert_close(mine - without, 2.0 * distance, rtol=1e-12, atol=1e-12)


def test_a_sample_depends_on_its_latent_and_the_reference_batch_only() -> None:
    for spec in (PLANE, GREY):
        model = build(spec)
        z = model.draw_latent(5)
        together = model.generator(z)
        apart = torch.cat([model.generator(z[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)  # another order of summation
        model.eval()
        torch.testing.assert_close(model.generator(z), together, rtol=0, atol=0)
        with torch.no_grad():
            model.generator.latents.add_(1.0)  # type: ignore[operator, union-attr]
        assert not torch.allclose(model.generator(z), together)


def test_the_reference_batch_is_drawn_once_and_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config, recipe = ImprovedGAN.tiny(PLANE)
    model = ImprovedGAN(config, PLANE)
    drawn = model.generator.latents.clone()  # type: ignore[operator, union-attr]
    trainer = Trainer(model, recipe.merged({"steps": 3}), Tensors(examples(PLANE, 40)), folder=tmp_path)
    trainer.fit()
    assert torch.equal(model.generator.latents, drawn)  # type: ignore[arg-type]
    saved = checkpoint.load(tmp_path / "last.pt", torch.device("cpu"))["model"]
    assert torch.equal(saved["generator.latents"], drawn)
    assert not equal_states(saved, checkpoint.model_state(model))
