"""ProGAN: its game to the letter, growing through turns and clock, resume in the middle of a fade, table 2."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.adversarial.pro_gan import ProGAN
from dgm_core.nn.equalised import EqualisedConv2d
from dgm_core.nn.growing import Stage, double, halve
from dgm_core.training import checkpoint
from dgm_core.training.trainer import Schedule, Trainer
from tests.support import SPECS, Tensors, equal_states, examples

GREY = DataSpec("image", (1, 8, 8), 256)
FADE = ((0.25, 0.75),)
HALF = Clock(5, 10)  # in the middle of the fade
# The same float64 operations but for the order of sums.
EXACT = {"rtol": 0, "atol": 1e-12}


def build(spec: DataSpec = GREY, **overrides: object) -> ProGAN:
    torch.manual_seed(0)
    config = ProGAN.tiny(spec)[0].merged({"growth": FADE, **overrides})
    return ProGAN(config, spec).double()


def images(n: int = 6, side: int = 8) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 256, (n, 1, side, side)).to(torch.uint8)


@pytest.mark.parametrize("target", [1.0, 3.0])
def test_the_critic_minimises_wgan_gp_with_drift(target: float) -> None:
    model = build(gradient_penalty=7.0, drift=0.3, target=target)
    x, stage = images(), Stage(1, 0.5)
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "critic_8", HALF)
    torch.manual_seed(1)
    with torch.no_grad():
        fake = model.generator(torch.randn(6, model.latents, dtype=torch.float64), stage)
    real = (x + torch.rand(x.shape, dtype=torch.float64)) / 128 - 1
    real = 0.5 * real + 0.5 * double(halve(real))
    u = torch.rand(6, 1, 1, 1, dtype=torch.float64)
    between = (u * real + (1 - u) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(model.critic(between, stage).sum(), between)
    norms = gradient.flatten(1).norm(dim=1)
    f_real, f_fake = model.critic(real, stage), model.critic(fake, stage)
    wanted = f_fake.mean() - f_real.mean() + 7 * (norms / target - 1).square().mean() + 0.3 * f_real.square().mean()
    # The guard of 10⁻¹² under the norm's root moves a norm of order 0.1 by 10⁻¹¹.
    torch.testing.assert_close(loss.value, wanted, rtol=0, atol=1e-9)


def test_the_generator_raises_its_score() -> None:
    model, x = build(), images()
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "generator_4", Clock(0, 10))
    torch.manual_seed(1)
    fake = model.generator(torch.randn(6, model.latents, dtype=torch.float64), Stage(0, 1.0))
    assert fake.shape == (6, 1, 4, 4)
    torch.testing.assert_close(loss.value, -model.critic(fake, Stage(0, 1.0)).mean(), **EXACT)


def test_turns_are_the_resolutions_of_the_clock() -> None:
    spec = DataSpec("image", (1, 16, 16), 256)
    model = build(spec, growth=((0.25, 0.5), (0.625, 0.75)))
    turns = [(t.name, t.players, t.window) for t in model.turns()]
    assert turns == [
        (f"{player}_{side}", (player,), window)
        for side, window in ((4, (0.0, 0.25)), (8, (0.25, 0.625)), (16, (0.625, 1.0)))
        for player in ("critic", "generator")
    ]
    for step in range(64):  # one resolution at a time, never none
        live = [t.name for t in model.turns() if t.live(Clock(step, 64))]
        assert len(live) == 2
        assert len({name.split("_")[1] for name in live}) == 1


def test_defaults_are_the_papers_schedule() -> None:
    """800,000 images a phase; the batch size changes as 256 pixels come in, to 14."""
    spec = DataSpec("image", (3, 256, 256), 256)
    config, recipe = ProGAN.defaults(spec)
    rounds, phase = recipe.steps, 50_000
    starts = [phase * (1 + 2 * k) for k in range(6)]
    assert [round(a * rounds) for a, _ in config.growth] == starts
    assert [round(b * rounds) for _, b in config.growth] == [*(s + phase for s in starts[:5]), starts[5] + 57_142]
    assert recipe.batch_size == ((0.0, 16), (starts[5] / rounds, 14))
    for step in (starts[5] - 1, starts[5]):
        clock = Clock(step, rounds)
        with torch.device("meta"):
            live = [t.name for t in ProGAN(config, spec).turns() if t.live(clock)]
        assert (live[0], recipe.batch_size_at(clock.progress)) == (
            ("critic_128", 16) if step < starts[5] else ("critic_256", 14)
        )


def test_a_turn_reaches_every_parameter_of_its_player_in_use_and_no_other() -> None:
    model = build()
    for turn in model.turns():
        model.zero_grad()
        model.requires_grad_(False)
        for p in model.players()[turn.players[0]]:
            p.requires_grad_(True)
        model.loss(Batch(images()), turn.name, HALF).value.backward()
        for name, p in model.named_parameters():
            # At 4 pixels nothing that comes later is used; in the fade to 8 all of it is, both ways to pixels too.
            later = any(part in name for part in ("pixels.1.", "generator.blocks.1.", "critic.blocks.0."))
            used = turn.name.endswith("_8") or not later
            reached = p.grad is not None and bool(p.grad.any())
            assert reached == (name.startswith(turn.players[0]) and used), (turn.name, name)


def test_samples_begin_a_fade_as_the_smaller_network_and_end_it_as_the_larger() -> None:
    model = build().eval()
    z = model.draw_latent(4)
    small = model.generate(z, None)
    assert torch.equal(small, double(model.generator(z, Stage(0, 1.0))))
    model.after("generator_8", Clock(2, 8))  # α = 0
    assert torch.equal(model.generate(z, None), small)
    model.after("generator_8", Clock(4, 8))
    coarse, fine = double(model.generator(z, Stage(0, 1.0))), model.generator(z, Stage(1, 1.0))
    torch.testing.assert_close(model.generate(z, None), 0.5 * coarse + 0.5 * fine, **EXACT)
    model.after("generator_8", Clock(6, 8))
    assert torch.equal(model.generate(z, None), fine)


def run(folder: Path | None, stop: int | None) -> Trainer:
    spec = SPECS["grey_image"]
    config, recipe = ProGAN.tiny(spec)
    torch.manual_seed(0)
    model = ProGAN(config.merged({"growth": FADE}), spec)
    recipe = recipe.merged({"steps": 8, "batch_size": ((0.0, 8), (0.25, 6))})
    rounds = iter(range(100))
    schedule = Schedule(log_every=1000, checkpoint_seconds=None)
    data = Tensors(examples(spec, 40))
    trainer = Trainer(
        model, recipe, data, folder=folder, schedule=schedule, stop=lambda: stop is not None and next(rounds) >= stop
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("stop", [0, 3, 6], ids=["at 4 pixels", "within the fade", "at 8 pixels"])
def test_resume_goes_on_where_growing_stood(tmp_path: Path, stop: int) -> None:
    whole = run(None, None)
    stopped = run(tmp_path, stop)
    assert stopped.step == stop + 1
    torch.manual_seed(99)  # another process would not have our generator
    resumed = run(tmp_path, None)
    assert not equal_states(checkpoint.model_state(whole.model), checkpoint.model_state(resumed.model))
    assert resumed.position == whole.position == 2 * (2 * 8 + 6 * 6)


def test_the_stage_is_saved_with_the_model(tmp_path: Path) -> None:
    """The copy that samples, in mid-growth, shows what training has reached."""
    stopped = run(tmp_path, 3)
    model = stopped.model
    assert isinstance(model, ProGAN)
    assert model.stage == Stage(1, 0.25)  # the last play was round 3 of 8, and the fade is from 2 to 6
    other = ProGAN(model.config, model.data)
    other.load_state_dict(model.state_dict())
    assert other.stage == model.stage


def test_networks_are_table_2s() -> None:
    """The rows of table 2 up to 256 pixels, counted by hand: with biases, 3 × 3 but where it says otherwise."""
    spec = DataSpec("image", (3, 256, 256), 256)
    with torch.device("meta"):
        model = ProGAN(ProGAN.defaults(spec)[0], spec)

    def three(*widths: int) -> int:
        return sum(9 * a * b + b for a, b in itertools.pairwise(widths))

    last = 64 * 3 + 3
    project = 512 * 512 * 16 + 512 * 16  # a bias for each unit, theirs for each channel
    body = three(512, 512, 512, 512, 512, 512, 512, 512, 256, 256, 128, 128, 64, 64)
    coarse = sum(w * 3 + 3 for w in (512, 512, 512, 512, 256, 128))
    assert sum(p.numel() for p in model.generator.parameters()) == project + body + coarse + last
    body = three(64, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 512) + three(513, 512)
    head = 512 * 16 * 512 + 512 + 513
    coarse = sum(w * 3 + w for w in (512, 512, 512, 512, 256, 128, 64))
    assert sum(p.numel() for p in model.critic.parameters()) == body + head + coarse


def test_all_convolutions_have_equalised_rates() -> None:
    model = build()
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert sum(isinstance(m, EqualisedConv2d) for m in model.modules()) == 3 + 2 + 2 + 2 + 1


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (4, 32, 8), (2, 16, 128)])
def test_images_of_every_size(shape: tuple[int, int, int]) -> None:
    spec = DataSpec("image", shape, 256)
    with torch.device("meta"):
        model = ProGAN(ProGAN.defaults(spec)[0].merged({"features": 4, "latents": 5}), spec)
        batch = Batch(torch.zeros(4, *shape, dtype=torch.uint8))
        for turn in model.turns():
            assert model.loss(batch, turn.name, Clock(0, 10)).value.shape == ()
        assert model.generate(model.draw_latent(4), None).shape == (4, *shape)


def test_without_growing_there_is_one_resolution() -> None:
    model = build(growth=())
    assert [t.name for t in model.turns()] == ["critic_8", "generator_8"]
    assert model.stage == Stage(1, 1.0)
    assert len(model.generator.to_pixels) == 1


def test_real_images_are_standardised_once() -> None:
    spec = DataSpec("image", (2, 8, 8), None)
    model = build(spec)
    x = 5 + 3 * torch.randn(50, 2, 8, 8, dtype=torch.float64)
    for turn in model.turns():  # only the first measures
        model.enter(turn.name, iter([Batch(x if turn.name == "critic_4" else x + 7)]))
    network = model.to_network(x)
    # Sums of 3200 terms in float64.
    torch.testing.assert_close(network.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec("image", (1, 28, 28), 256), "powers of two"),
        (DataSpec("image", (1, 512, 512), 256), "powers of two"),
        (DataSpec("vector", (6,), 2), "makes images"),
        (DataSpec("audio", (64,), 256), "kind 'audio'"),
    ],
)
def test_refuses_what_it_cannot_model(spec: DataSpec, message: str) -> None:
    config, _ = ProGAN.defaults(spec)
    with pytest.raises(DataMismatch, match=message):
        ProGAN(config, spec)
