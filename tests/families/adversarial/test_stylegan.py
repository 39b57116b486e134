"""StyleGAN: AdaIN, noise, mixing and truncation by formula, the game with R1 in either form, the paper's networks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.adversarial.stylegan import StyleGAN
from dgm_core.nn.growing import Stage, double
from dgm_core.nn.styled import RunningMean, Styled, StyledBlock, adain, blur, crossed, mapping
from dgm_core.objectives.gan import gradient_norm, r1_penalty
from tests.support import TwoRanks

GREY = DataSpec("image", (1, 8, 8), 256)
FADE = ((0.25, 0.75),)
HALF = Clock(4, 8)  # in the middle of the fade
# The same float64 operations but for the order of sums.
EXACT = {"rtol": 0, "atol": 1e-12}


def build(spec: DataSpec = GREY, *, moved: bool = True, **overrides: object) -> StyleGAN:
    """With noise and biases that do something, and a mean of w that is not zero."""
    torch.manual_seed(0)
    model = StyleGAN(StyleGAN.tiny(spec)[0].merged({"growth": FADE, **overrides}), spec).double()
    if moved:
        with torch.no_grad():
            for name, p in model.generator.named_parameters():
                if name.endswith(("noise", "bias", "constant")):
                    p.add_(0.5 * torch.randn_like(p))
            model.generator.average.mean.normal_()
    return model


def images(n: int = 6) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 256, (n, 1, 8, 8)).to(torch.uint8)


def grown(model: StyleGAN) -> StyleGAN:
    model.grown.fill_(model.growth.last)
    return model


def test_adain_has_the_styles_statistics() -> None:
    """Whatever comes in, each image's channel leaves with the shift for mean and the scale for deviation."""
    x = 3 + torch.randn(3, 4, 5, 6, dtype=torch.float64) * torch.tensor([0.1, 1, 5, 20]).view(1, 4, 1, 1)
    scale, shift = torch.randn(2, 3, 4, dtype=torch.float64)
    y = adain(x, scale, shift)
    torch.testing.assert_close(y.mean((2, 3)), shift, **EXACT)
    # ε = 10⁻⁸ beside a variance of 0.01 at least.
    torch.testing.assert_close(y.std((2, 3), correction=0), scale.abs(), rtol=1e-6, atol=0)
    torch.testing.assert_close(adain(7 * x - 2, scale, shift), y, rtol=0, atol=1e-5)


def test_adain_of_a_constant_is_the_shift() -> None:
    x = torch.full((2, 3, 4, 4), 5.0, dtype=torch.float64)
    scale, shift = torch.randn(2, 2, 3, dtype=torch.float64)
    assert torch.equal(adain(x, scale, shift), shift[:, :, None, None].expand(2, 3, 4, 4))


def test_blur_is_the_binomial_filter() -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    row = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    kernel = (row[:, None] * row).expand(3, 1, 3, 3)
    torch.testing.assert_close(blur(x), F.conv2d(x, kernel, padding=1, groups=3), **EXACT)


def test_a_styled_layer_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = Styled(4, 5).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x, w = torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.manual_seed(1)
    found = layer(x, w, 0.5)
    torch.manual_seed(1)
    field = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    h = F.leaky_relu(x + 0.5 * layer.noise.view(4, 1, 1) * field + layer.bias.view(4, 1, 1), 0.2)
    style = w @ layer.style.weight.T / 5**0.5 + layer.style.bias
    torch.testing.assert_close(found, adain(h, 1 + style[:, :4], style[:, 4:]), **EXACT)
    assert torch.equal(layer(x, w, 0.0), layer(x, w, 0.0))  # without noise nothing is drawn


def test_noise_starts_at_zero_and_scales_at_one() -> None:
    layer = Styled(4, 5)
    x, w = torch.randn(3, 4, 6, 6), torch.zeros(3, 5)
    y = layer(x, w, 1.0)
    assert torch.equal(y, layer(x, w, 0.0))
    # A style of zero leaves normalised features; single precision over 36 terms.
    torch.testing.assert_close(y.square().mean((2, 3)), torch.ones(3, 4), rtol=0, atol=1e-5)


def test_a_block_doubles_and_blurs_behind_its_first_convolution() -> None:
    torch.manual_seed(0)
    block = StyledBlock(3, 4, 5).double()
    h, w = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 2, 5, dtype=torch.float64)
    assert block.conv1 is not None
    first = block.styled1(blur(block.conv1(double(h))), w[:, 0], 0.0)
    torch.testing.assert_close(block(h, w, 0.0), block.styled2(block.conv2(first), w[:, 1], 0.0), **EXACT)


def test_the_mapping_sees_only_the_latents_direction() -> None:
    network = mapping(6, 3, 0.01).double()
    z = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(network(z), network(10 * z), rtol=0, atol=1e-6)  # ε = 10⁻⁸ under the root
    assert [m.rate for m in network if hasattr(m, "rate")] == [0.01] * 3


def test_styles_cross_where_they_are_cut() -> None:
    a, b = torch.zeros(3, 2), torch.ones(3, 2)
    styles = crossed(a, b, torch.tensor([0, 1, 4]), 4)
    assert styles[:, :, 0].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_training_mixes_the_share_of_styles_that_it_should() -> None:
    """By the styles that reach the layers: one for all, or a second from some layer on."""
    model = build(mixing=0.6).train()
    seen: list[Tensor] = []
    model.generator.synthesis.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.generator(model.draw_latent(2000), Stage(1, 1.0))
    (styles,) = seen
    assert styles.shape == (2000, 4, model.latents)
    changes = (styles[:, 1:] != styles[:, :-1]).any(2)
    assert changes.sum(1).max() == 1
    # Binomial: sd 0.011 of the share, and 0.009 at each of three places within it.
    assert changes.any(1).double().mean().item() == pytest.approx(0.6, abs=0.04)
    for place in changes.double().mean(0):
        assert place.item() == pytest.approx(0.2, abs=0.04)


def test_without_mixing_every_layer_has_one_style() -> None:
    model = build(mixing=0.0)
    seen: list[Tensor] = []
    model.generator.synthesis.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    z = model.draw_latent(5)
    model.generator(z, Stage(1, 0.5))
    assert torch.equal(seen[0], model.generator.mapping(z)[:, None].expand(5, 4, model.latents))


def test_truncation_0_gives_the_mean_image_and_1_nothing_less() -> None:
    model = grown(build()).eval()
    with torch.no_grad():
        mean = model.generator.average.mean
        picture = model.to_stored(model.draw(mean.expand(1, 4, -1), 0.0))
        assert torch.equal(model.sample(5, truncation=0.0, noise=0.0), picture.expand(5, -1, -1, -1))
        torch.manual_seed(1)
        whole = model.sample(5, noise=0.0)
        torch.manual_seed(1)
        z = model.draw_latent(5)
        assert torch.equal(whole, model.to_stored(model.generate(z, None)))
        assert not torch.equal(whole[0], whole[1])


def test_truncation_is_linear_in_w_and_may_spare_fine_layers() -> None:
    model = build()
    w, mean = torch.randn(3, 4, model.latents, dtype=torch.float64), model.generator.average.mean
    torch.testing.assert_close(model.truncated(w, 0.7), mean + 0.7 * (w - mean), **EXACT)
    torch.testing.assert_close(model.truncated(w, -1.0), 2 * mean - w, **EXACT)
    some = model.truncated(w, 0.7, 2)
    torch.testing.assert_close(some[:, :2], mean + 0.7 * (w[:, :2] - mean), **EXACT)
    assert torch.equal(some[:, 2:], w[:, 2:])


def test_mixing_takes_layers_from_either_latent() -> None:
    model = grown(build()).eval()
    a, b = model.draw_latent(3), model.draw_latent(3)
    assert torch.equal(model.mixed(a, b, 4), model.generate(a, None))
    assert torch.equal(model.mixed(a, b, 0), model.generate(b, None))
    assert not torch.allclose(model.mixed(a, b, 2), model.generate(a, None))


def test_the_mean_of_w_follows_plays() -> None:
    model, x = build(moved=False, mixing=0.0).train(), images()
    torch.manual_seed(1)
    model.loss(Batch(x), "generator_4", Clock(0, 8))
    assert not model.generator.average.mean.any()  # settled in `after`
    model.after("generator_4", Clock(0, 8))
    torch.manual_seed(1)
    w = model.generator.mapping(model.draw_latent(6))
    torch.testing.assert_close(model.generator.average.mean, 0.005 * w.mean(0).detach(), **EXACT)
    before = model.generator.average.mean.clone()
    model.loss(Batch(x), "penalty_4", Clock(0, 8))  # draws no samples
    model.after("penalty_4", Clock(0, 8))
    assert torch.equal(model.generator.average.mean, before)


def mean_over_ranks(w: Tensor) -> Tensor:
    average = RunningMean(3, 0.5).double()
    mine = w[distributed.share(len(w))]
    for part in mine.split(2):  # microbatches
        average.note(part)
    average.settle()
    return average.mean


def test_the_mean_of_w_spans_ranks_and_microbatches(two_ranks: TwoRanks) -> None:
    w = torch.randn(7, 3, dtype=torch.float64)
    for got in (mean_over_ranks(w), *two_ranks.run(mean_over_ranks, w)):
        torch.testing.assert_close(got, 0.5 * w.mean(0), **EXACT)


def test_calibration_measures_the_mean_of_the_weights_that_sample() -> None:
    model = build().eval()
    model.calibrate(iter([]), passes=8, batch_size=1000)
    with torch.no_grad():
        w = model.generator.mapping(model.draw_latent(8000))
    # Two means of 8000 draws: an error of sd/√4000 in each coordinate; five of them.
    gap = (model.generator.average.mean - w.mean(0)).abs() / w.std(0)
    assert gap.max() < 5 / 4000**0.5


def test_r1_of_a_linear_critic() -> None:
    """f(x) = wᵀx: ½ ‖w‖² wherever it is taken, with the gradient w."""
    weight = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    layer = nn.Linear(3, 1).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    penalty = r1_penalty(gradient_norm(lambda x: layer(x)[:, 0], torch.randn(5, 3, dtype=torch.float64)))
    penalty.backward()
    # The guard of the norm's root adds ½ · 10⁻¹² to the value, and nothing to the gradient.
    assert penalty.item() == pytest.approx(4.5, abs=1e-11)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad[0], weight, rtol=0, atol=1e-11)


def game(model: StyleGAN, x: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
    """−E log D(x) − E log(1 − D(x̃)) and ½ E ‖∇ D(x)‖², from the random stream where a turn's loss begins."""
    z = model.draw_latent(len(x))
    fake = model.generator(z, stage).detach()
    real = model.growth.shown((x + torch.rand(x.shape, dtype=torch.float64)) / 128 - 1, stage).requires_grad_()
    on_real, on_fake = model.discriminator(real, stage), model.discriminator(fake, stage)
    (gradient,) = torch.autograd.grad(on_real.sum(), real, retain_graph=True)
    value = -on_real.sigmoid().log().mean() - (1 - on_fake.sigmoid()).log().mean()
    return value, 0.5 * gradient.square().sum() / len(x)


def test_the_discriminator_plays_the_game_with_r1() -> None:
    model, x = build(penalty=10.0, penalty_every=1), images()
    assert [t.name for t in model.turns()] == ["discriminator_4", "generator_4", "discriminator_8", "generator_8"]
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "discriminator_8", HALF)
    torch.manual_seed(1)
    value, r1 = game(model, x, Stage(1, 0.5))
    # The guard of the norm's root: γ/2 · 10⁻¹².
    torch.testing.assert_close(loss.value, value + 10 * r1, rtol=0, atol=1e-10)


def test_lazily_r1_is_a_turn_of_its_own_weighted_by_its_interval() -> None:
    model, x = build(penalty=10.0, penalty_every=4), images()
    names = ["discriminator", "generator", "penalty"]
    assert [t.name for t in model.turns()] == [f"{name}_{side}" for side in (4, 8) for name in names]
    lazy = model.turns()[-1]
    assert (lazy.players, lazy.every, lazy.window) == (("discriminator",), 4, (0.25, 1.0))
    assert [lazy.live(Clock(step, 16)) for step in range(16)] == [step in (4, 8, 12) for step in range(16)]
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "discriminator_8", HALF)
    torch.manual_seed(1)
    value, _ = game(model, x, Stage(1, 0.5))
    torch.testing.assert_close(loss.value, value, **EXACT)
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "penalty_8", HALF)
    torch.manual_seed(1)
    real = model.growth.shown((x + torch.rand(x.shape, dtype=torch.float64)) / 128 - 1, Stage(1, 0.5))
    real.requires_grad_()
    (gradient,) = torch.autograd.grad(model.discriminator(real, Stage(1, 0.5)).sum(), real)
    torch.testing.assert_close(loss.value, 4 * 10 * 0.5 * gradient.square().sum() / 6, rtol=0, atol=1e-10)


def test_the_generator_does_not_saturate() -> None:
    model, x = build(), images()
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "generator_8", HALF)
    torch.manual_seed(1)
    fake = model.generator(model.draw_latent(6), Stage(1, 0.5))
    wanted = -model.discriminator(fake, Stage(1, 0.5)).sigmoid().log().mean()
    torch.testing.assert_close(loss.value, wanted, **EXACT)


def test_a_turn_reaches_every_parameter_of_its_player_and_no_other() -> None:
    model = build()
    for turn in model.turns()[-3:]:  # within the fade everything is in use
        model.zero_grad()
        model.requires_grad_(False)
        for p in model.players()[turn.players[0]]:
            p.requires_grad_(True)
        model.loss(Batch(images()), turn.name, HALF).value.backward()
        for name, p in model.named_parameters():
            reached = p.grad is not None and bool(p.grad.any())
            # Slopes of piecewise linear layers do not know the constants behind the batch's deviation.
            constant = turn.name == "penalty_8" and ".head." in name and name.endswith("bias")
            assert reached == (name.startswith(turn.players[0]) and not constant), (turn.name, name)


def test_images_begin_a_fade_as_the_smaller_network_and_end_it_as_the_larger() -> None:
    model = build().eval()
    z = model.draw_latent(4)
    small = model.generate(z, None)
    model.after("generator_8", Clock(2, 8))  # α = 0
    assert torch.equal(model.generate(z, None), small)
    model.after("generator_8", Clock(6, 8))
    w = model.generator.mapping(z)[:, None].expand(4, 4, -1)
    assert torch.equal(model.generate(z, None), model.generator.synthesis(w, Stage(1, 1.0), 0.0))


def test_noise_varies_samples_but_not_the_decoder() -> None:
    model = grown(build()).eval()
    z = model.draw_latent(3)
    assert torch.equal(model.decode(z), model.decode(z))
    w = model.generator.mapping(z)[:, None].expand(3, 4, -1)
    assert not torch.equal(model.draw(w, 1.0), model.draw(w, 1.0))
    with pytest.raises(DataMismatch, match="noise -1"):
        model.sample(2, noise=-1.0)


def test_defaults_are_the_papers_schedule() -> None:
    """From 8 pixels on, 600,000 images a phase, batches that shrink as the resolution grows."""
    spec = DataSpec("image", (3, 32, 32), 256)
    config, recipe = StyleGAN.defaults(spec)
    fade16, fade32 = 600_000 // 256, 600_000 // 256 + 2 * (600_000 // 128)
    assert [round(a * recipe.steps) for a, _ in config.growth] == [fade16, fade32]
    assert [size for _, size in recipe.batch_size] == [256, 128, 64]  # type: ignore[union-attr]
    with torch.device("meta"):
        model = StyleGAN(config, spec)
    assert [t.name for t in model.turns()][::2] == ["discriminator_8", "discriminator_16", "discriminator_32"]
    for turn in model.turns()[::2]:
        sizes = {8: 256, 16: 128, 32: 64}
        assert recipe.batch_size_at(turn.window[0]) == sizes[int(turn.name.split("_")[1])]
    assert recipe.optimizers["generator"].ema == pytest.approx(0.5 ** (64 / 10_000))


def test_256_pixels_are_the_papers_generator() -> None:
    """Fourteen styled layers; counted by hand from the architecture (section 2 and ProGAN's table 2)."""
    spec = DataSpec("image", (3, 256, 256), 256)
    with torch.device("meta"):
        generator = StyleGAN(StyleGAN.defaults(spec)[0], spec).generator
    layers = [512] * 8 + [256] * 2 + [128] * 2 + [64] * 2
    styled = sum(512 * 2 * width + 2 * width + 2 * width for width in layers)  # the affine map; noise and bias
    pairs = itertools.pairwise(layers)
    convolutions = sum(9 * a * b for a, b in pairs)  # none in front of the first layer
    pixels = sum(width * 3 + 3 for width in (512, 512, 512, 256, 128, 64))
    assert sum(p.numel() for p in generator.synthesis.parameters()) == 512 * 16 + styled + convolutions + pixels
    assert sum(p.numel() for p in generator.mapping.parameters()) == 8 * (512 * 512 + 512)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (4, 32, 8), (2, 16, 128)])
def test_images_of_every_size(shape: tuple[int, int, int]) -> None:
    spec = DataSpec("image", shape, 256)
    small = {"features": 4, "latents": 5, "mapping": 2, "penalty_every": 2}
    with torch.device("meta"):
        model = StyleGAN(StyleGAN.defaults(spec)[0].merged(small), spec)
        batch = Batch(torch.zeros(4, *shape, dtype=torch.uint8))
        for turn in model.turns():
            assert model.loss(batch, turn.name, Clock(0, 10)).value.shape == ()
        assert model.generate(model.draw_latent(4), None).shape == (4, *shape)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec("image", (1, 28, 28), 256), "powers of two"),
        (DataSpec("vector", (6,), 2), "makes images"),
        (DataSpec("codes", (8, 8), 4), "kind 'codes'"),
    ],
)
def test_refuses_what_it_cannot_model(spec: DataSpec, message: str) -> None:
    config, _ = StyleGAN.defaults(spec)
    with pytest.raises(DataMismatch, match=message):
        StyleGAN(config, spec)
