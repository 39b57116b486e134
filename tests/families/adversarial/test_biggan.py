"""BigGAN and BigGAN-deep: penalty, truncation, standing statistics, who is told what, and the paper's networks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.adversarial.biggan import BigGAN
from dgm_core.models.adversarial.biggan import Generator as WideGenerator
from dgm_core.models.adversarial.biggan_deep import BigGANDeep
from dgm_core.models.adversarial.biggan_deep import Generator as DeepGenerator
from dgm_core.models.adversarial.spectral import LargeScaleGAN
from dgm_core.nn.biggan_blocks import (
    ConditionalBatchNorm,
    DeepDiscriminatorBlock,
    DeepGeneratorBlock,
    DiscriminatorBlock,
    SelfAttention,
    by_vector,
    double,
    halve,
)
from dgm_core.nn.norm import Moments
from dgm_core.objectives.gan import hinge_generator

GREY = DataSpec("image", (1, 8, 8), 256, classes=3)
REAL = DataSpec("image", (2, 8, 8), None, classes=3)
IMAGENET = DataSpec("image", (3, 128, 128), 256, classes=1000)
CLOCK = Clock(0, 10)
Y = torch.tensor([0, 2, 1, 1, 0, 2])
BOTH = (BigGAN, BigGANDeep)
Model = type[BigGAN] | type[BigGANDeep]
# The same float64 operations but for the order of sums.
EXACT = {"rtol": 0, "atol": 1e-12}


def build(model: Any, spec: DataSpec = GREY, **overrides: object) -> LargeScaleGAN:
    torch.manual_seed(0)
    instance = model(model.tiny(spec)[0].merged(overrides), spec).double()
    with torch.no_grad():  # at 0 nothing behind it would matter
        for part in instance.modules():
            if isinstance(part, SelfAttention):
                part.gamma.fill_(0.5)
    return instance


def _inputs(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Conv2d)
    return layer.in_channels


def millions(module: nn.Module) -> float:
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)


def images(n: int = 6) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 256, (n, 1, 8, 8)).to(torch.uint8)


def test_norms_take_gain_and_shift_from_a_vector() -> None:
    torch.manual_seed(0)
    norm = by_vector(5)(4).double()
    x, c = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    gain, shift = ((c @ part.weight.T)[:, :, None, None] for part in (norm.gain, norm.shift))  # type: ignore[union-attr]
    torch.testing.assert_close(norm(x, c), (1 + gain) * (x - mean) / (var + 1e-5).sqrt() + shift, **EXACT)


def test_deep_blocks_are_their_formulae() -> None:
    torch.manual_seed(0)
    c = torch.randn(6, 5, dtype=torch.float64)
    x = torch.randn(6, 8, 4, 3, dtype=torch.float64)
    up = DeepGeneratorBlock(8, 4, by_vector(5), (7, 6)).double()
    h = up.convs[0](up.norms[0](x, c).relu())
    h = up.convs[1](double(up.norms[1](h, c).relu(), (7, 6)))
    h = up.convs[3](up.norms[3](up.convs[2](up.norms[2](h, c).relu()), c).relu())
    torch.testing.assert_close(up(x, c), h + double(x[:, :4], (7, 6)), **EXACT)
    assert [conv.out_channels for conv in up.convs] == [2, 2, 2, 4]
    flat = DeepGeneratorBlock(8, 8, by_vector(5)).double()
    assert flat(x, c).shape == x.shape

    x = torch.randn(6, 4, 5, 6, dtype=torch.float64)
    down = DeepDiscriminatorBlock(4, 12, down=True).double()
    h = x
    for conv in down.convs:
        h = conv(h.relu())
    assert down.more is not None
    wanted = down.last(halve(h.relu())) + torch.cat([halve(x), down.more(halve(x))], 1)
    torch.testing.assert_close(down(x), wanted, **EXACT)
    assert [conv.out_channels for conv in down.convs] == [3, 3, 3]
    assert DeepDiscriminatorBlock(4, 4, down=False).more is None


@pytest.mark.parametrize("model", BOTH)
def test_the_generator_pays_equation_3_on_all_weights_but_the_embedding(model: Model) -> None:
    instance, x = build(model, orthogonal=0.01), images()
    torch.manual_seed(1)
    loss = instance.loss(Batch(x, Y), "generator", CLOCK)
    torch.manual_seed(1)
    fake = instance.generator(torch.randn(6, instance.latents, dtype=torch.float64), Y)
    game, penalty = hinge_generator(instance.discriminator(fake, Y)), torch.zeros((), dtype=torch.float64)
    for layer in instance.generator.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            w = layer.parametrizations.weight.original.flatten(1).T  # type: ignore[union-attr]
            gram = w.T @ w
            penalty = penalty + (gram * (1 - torch.eye(len(gram), dtype=gram.dtype))).square().sum()
    assert penalty > 0
    torch.testing.assert_close(loss.value, game + 0.01 * penalty, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss.metrics["orthogonal_penalty"], penalty.detach(), rtol=1e-9, atol=0)
    without = build(model, orthogonal=0.0)
    torch.manual_seed(1)
    torch.testing.assert_close(without.loss(Batch(x, Y), "generator", CLOCK).value, game, **EXACT)


@pytest.mark.parametrize("model", BOTH)
def test_weights_start_orthogonal(model: Model) -> None:
    instance = build(model)
    for layer in instance.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
            normed = parametrize.is_parametrized(layer)
            w = (layer.parametrizations.weight.original if normed else layer.weight).flatten(1)  # type: ignore[union-attr]
            gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
            # A factorisation in float32.
            torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", BOTH)
def test_truncation_at_zero_is_one_image_for_each_class(model: Model) -> None:
    instance = build(model, REAL).eval()
    with torch.no_grad():
        first, second = instance.sample(6, Y, truncation=0.0), instance.sample(6, Y, truncation=0.0)
        wanted = instance.generate(torch.zeros(6, instance.latents, dtype=torch.float64), Y)
        free = instance.sample(6, Y)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, instance.to_stored(wanted), rtol=0, atol=0)
    for label in range(3):
        same = first[label == Y]
        assert torch.equal(same[0], same[1])
        assert not torch.equal(free[label == Y][0], free[label == Y][1])
    assert not torch.allclose(first[0], first[1])


def test_latents_are_of_the_truncated_normal() -> None:
    """Its moments by formula: variance 1 − 2 t φ(t) / (2 Φ(t) − 1)."""
    instance, t = build(BigGAN), 0.8
    torch.manual_seed(1)
    z = instance.draw_latent(20_000, t).flatten()
    assert z.abs().max() <= t
    density, mass = math.exp(-0.5 * t**2) / math.sqrt(2 * math.pi), math.erf(t / math.sqrt(2))
    # 160,000 numbers within ±0.8: standard errors of 0.0011 and 0.0005.
    assert abs(z.mean().item()) < 0.006
    assert z.var().item() == pytest.approx(1 - 2 * t * density / mass, abs=0.003)
    wide = instance.draw_latent(20_000, 50.0)  # where nothing is cut off, though P rounds to one
    assert wide.isfinite().all()
    assert wide.var().item() == pytest.approx(1, abs=0.02)
    torch.manual_seed(1)
    plain = instance.draw_latent(5)
    torch.manual_seed(1)
    assert torch.equal(plain, torch.randn(5, instance.latents, dtype=torch.float64))


def test_a_negative_truncation_is_refused() -> None:
    with pytest.raises(DataMismatch, match="0 or more"):
        build(BigGAN).sample(2, truncation=-1.0)


@pytest.mark.parametrize("model", BOTH)
def test_standing_statistics_are_the_averages_over_the_passes(model: Model) -> None:
    instance = build(model).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    first = next(part for part in instance.generator.modules() if isinstance(part, ConditionalBatchNorm))
    hook = first.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3))))
    )
    torch.manual_seed(3)
    with torch.no_grad():
        instance.calibrate(iter([]), passes=5, batch_size=7)
    hook.remove()
    assert len(seen) == 5
    moments = first.norm.moments
    torch.testing.assert_close(moments.running_mean, torch.stack([mean for mean, _ in seen]).mean(0), **EXACT)
    torch.testing.assert_close(moments.running_var, torch.stack([var for _, var in seen]).mean(0), **EXACT)
    others = [m.running_var for m in instance.generator.modules() if isinstance(m, Moments)]
    assert len(others) >= 3
    assert not any(torch.equal(var, torch.ones_like(var)) for var in others)


def test_each_block_is_told_the_class_and_a_chunk_of_its_own() -> None:
    instance = build(BigGAN, DataSpec("image", (1, 16, 16), 256, classes=3)).eval()
    generator = instance.generator
    assert isinstance(generator, WideGenerator)
    assert instance.latents == 3 * generator.chunk
    told: list[Tensor] = []
    for block in generator.blocks:
        block.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    z = instance.draw_latent(6)
    with torch.no_grad():
        generator(z, Y)
    pieces, of_class = z.split(generator.chunk, 1), generator.embedding(Y)
    assert len(told) == 2
    for given, piece in zip(told, pieces[1:], strict=True):
        assert torch.equal(given, torch.cat([of_class, piece], 1))


def test_each_deep_block_is_told_all_of_the_latents() -> None:
    instance = build(BigGANDeep).eval()
    generator = instance.generator
    assert isinstance(generator, DeepGenerator)
    told: list[Tensor] = []
    blocks = [part for part in generator.modules() if isinstance(part, DeepGeneratorBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    z = instance.draw_latent(6)
    with torch.no_grad():
        generator(z, Y)
    assert len(told) == len(blocks) == 2
    assert all(torch.equal(given, torch.cat([generator.embedding(Y), z], 1)) for given in told)


@pytest.mark.parametrize("model", BOTH)
def test_a_turn_reaches_every_parameter_of_its_player_and_no_other(model: Model) -> None:
    instance = build(model, orthogonal=0.0)  # the penalty alone would reach most of them
    for turn in instance.turns():
        reached: set[str] = set()
        for _ in range(3):  # a ReLU may shut a path in one batch
            instance.zero_grad()
            instance.requires_grad_(False)
            for p in instance.players()[turn.name]:
                p.requires_grad_(True)
            instance.loss(Batch(images(24), Y.repeat(4)), turn.name, CLOCK).value.backward()
            reached |= {name for name, p in instance.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {name for name, _ in instance.named_parameters() if name.startswith(turn.name)}


def test_128_pixels_are_the_papers_networks() -> None:
    config, recipe = BigGAN.defaults(IMAGENET)
    with torch.device("meta"):
        model = BigGAN(config, IMAGENET)
    generator = model.generator
    assert isinstance(generator, WideGenerator)
    assert model.latents == 120
    assert generator.grid == (16 * 96, 4, 4)
    ups = [(b.conv1.in_channels // 96, b.conv1.out_channels // 96) for b in generator.blocks]  # type: ignore[union-attr, operator]
    assert ups == [(16, 16), (16, 8), (8, 4), (4, 2), (2, 1)]
    assert generator.attended == 4  # behind the block that makes 64 × 64
    layers = [
        (m.conv1.in_channels, m.conv1.out_channels // 96, m.down) if isinstance(m, DiscriminatorBlock) else "attention"
        for m in model.discriminator.body
    ]
    assert layers == [
        (3, 1, True), "attention", (96, 2, True), (192, 4, True), (384, 8, True), (768, 16, True), (1536, 16, False)
    ]  # fmt: skip
    # As published in appendix B, to the digits given.
    assert millions(generator) == 70.4
    assert millions(model.discriminator) == 88.0
    assert (recipe.batch_size, recipe.microbatch, recipe.optimizers["generator"].ema) == (2048, 256, 0.9999)


def test_128_pixels_are_the_papers_deep_networks() -> None:
    with torch.device("meta"):
        model = BigGANDeep(BigGANDeep.defaults(IMAGENET)[0], IMAGENET)
    generator = model.generator
    assert isinstance(generator, DeepGenerator)
    blocks = [part for part in generator.modules() if isinstance(part, DeepGeneratorBlock)]
    widths = [(_inputs(b.convs[0]) // 128, b.out // 128, b.size is not None) for b in blocks]
    assert widths == [
        (16, 16, False), (16, 16, True), (16, 16, False), (16, 8, True), (8, 8, False), (8, 4, True),
        (4, 4, False), (4, 2, True), (2, 2, False), (2, 1, True),
    ]  # fmt: skip
    assert generator.attended == 4
    body = list(model.discriminator.body)
    assert isinstance(body[3], SelfAttention)  # behind the convolution and the two blocks that end at 64 × 64
    widths = [(_inputs(m.convs[0]) // 128, m.last.out_channels // 128, m.down) for m in body
              if isinstance(m, DeepDiscriminatorBlock)]  # fmt: skip
    assert widths == [
        (1, 2, True), (2, 2, False), (2, 4, True), (4, 4, False), (4, 8, True), (8, 8, False),
        (8, 16, True), (16, 16, False), (16, 16, True), (16, 16, False),
    ]  # fmt: skip
    # As published, but that the authors' last convolution has 128 outputs, of which three are the image.
    more = sum(p.numel() for p in nn.Conv2d(128, 125, 3, device="meta").parameters()) / 1e6
    assert round(sum(p.numel() for p in generator.parameters()) / 1e6 + more, 1) == 50.4
    assert millions(model.discriminator) == 34.6


def test_32_pixels_are_the_authors_cifar_network() -> None:
    spec = DataSpec("image", (3, 32, 32), 256, classes=10)
    config, recipe = BigGAN.defaults(spec)
    with torch.device("meta"):
        model = BigGAN(config, spec)
    body = [(m.conv1.out_channels, m.down) for m in model.discriminator.body if isinstance(m, DiscriminatorBlock)]
    assert body == [(256, True), (256, True), (256, False), (256, False)]
    assert model.latents == 80
    assert not any(isinstance(m, SelfAttention) for m in model.modules())
    assert (model.turns()[0].repeat, recipe.batch_size, recipe.optimizers["generator"].lr) == (4, 50, 2e-4)


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 28, 28), (2, 12, 20), (1, 36, 8), (3, 64, 64), (1, 252, 100), (3, 256, 256)]
)
@pytest.mark.parametrize("model", BOTH)
def test_images_of_every_size(model: Any, shape: tuple[int, int, int]) -> None:
    spec = DataSpec("image", shape, 256, classes=3)
    with torch.device("meta"):
        instance = model(model.tiny(spec)[0], spec)
        batch = Batch(torch.zeros(4, *shape, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
        for turn in instance.turns():
            assert instance.loss(batch, turn.name, CLOCK).value.shape == ()
        assert instance.generate(instance.draw_latent(4), batch.y).shape == (4, *shape)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec("image", (1, 8, 8), 256), "the data has no classes"),
        (DataSpec("image", (1, 4, 8), 256, classes=2), "at least 8"),
        (DataSpec("vector", (4,), None, classes=2), "makes images"),
        (DataSpec("audio", (16,), 16, classes=2), "kind 'audio'"),
        (DataSpec("image", (1, 1024, 1024), 256, classes=2), "at most 512"),
    ],
)
@pytest.mark.parametrize("model", BOTH)
def test_refuses_what_it_cannot_model(model: Any, spec: DataSpec, message: str) -> None:
    with pytest.raises(DataMismatch, match=message):
        model(model.tiny(spec)[0], spec)
