"""SAGAN: attention, conditional normalisation and projection by formula, the paper's networks, and the hinge game."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.adversarial.sagan import SAGAN, Generator
from dgm_core.nn.biggan_blocks import (
    ConditionalBatchNorm,
    DiscriminatorBlock,
    GeneratorBlock,
    ProjectionDiscriminator,
    SelfAttention,
    attended,
    by_label,
    double,
    halve,
)
from dgm_core.nn.dcgan import grids
from dgm_core.nn.spectral_norm import SpectralNorm

GREY = DataSpec("image", (1, 8, 8), 256, classes=3)
CLOCK = Clock(0, 10)
Y = torch.tensor([0, 2, 1, 1, 0, 2])
# The same float64 operations but for the order of sums.
EXACT = {"rtol": 0, "atol": 1e-12}


def build(spec: DataSpec = GREY, **overrides: object) -> SAGAN:
    torch.manual_seed(0)
    model = SAGAN(SAGAN.tiny(spec)[0].merged(overrides), spec).double()
    with torch.no_grad():  # at 0 nothing behind it would matter
        for part in model.modules():
            if isinstance(part, SelfAttention):
                part.gamma.fill_(0.5)
    return model


def images(n: int = 6) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 256, (n, 1, 8, 8)).to(torch.uint8)


@pytest.mark.parametrize("pooled", [False, True])
def test_attention_is_equations_1_to_3(pooled: bool) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(16, pooled=pooled).double()
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    assert torch.equal(layer(x), x)  # γ starts at zero
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    f, g, h = (part.weight.flatten(1) @ x.flatten(2) for part in (layer.f, layer.g, layer.h))
    assert f.shape[1] == 2
    assert h.shape[1] == (8 if pooled else 2)
    if pooled:
        f, h = (F.max_pool2d(t.unflatten(2, (5, 4)), 2, ceil_mode=True).flatten(2) for t in (f, h))
    o = torch.zeros(2, 16, 20, dtype=torch.float64)
    for b in range(2):
        for j in range(20):
            s = torch.stack([f[b, :, i] @ g[b, :, j] for i in range(f.shape[2])])
            mixed = (s.exp() / s.exp().sum()) @ h[b].T
            o[b, :, j] = layer.v.weight.flatten(1) @ mixed
    torch.testing.assert_close(layer(x), x + 0.7 * o.unflatten(2, (5, 4)), **EXACT)


def test_attention_reaches_every_position_and_every_parameter() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(8).double()
    with torch.no_grad():
        layer.gamma.fill_(1.0)
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 0, 0].sum(), x, retain_graph=True)
    assert (gradient[0].abs().sum(0) > 0).all()
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_conditional_batch_norm_by_formula_per_class() -> None:
    torch.manual_seed(0)
    norm = by_label(3)(4).double()
    x = 3 + 2 * torch.randn(6, 4, 5, 5, dtype=torch.float64)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    plain = (x - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(norm(x, Y), plain, **EXACT)  # gains of 1, shifts of 0
    with torch.no_grad():
        norm.gain.weight.normal_()  # type: ignore[union-attr, operator]
        norm.shift.weight.normal_()  # type: ignore[union-attr, operator]
    found = norm(x, Y)
    for i, label in enumerate(Y):
        gain, shift = norm.gain.weight[label], norm.shift.weight[label]  # type: ignore[union-attr, index]
        wanted = (1 + gain[:, None, None]) * plain[i] + shift[:, None, None]
        torch.testing.assert_close(found[i], wanted, **EXACT)


def test_projection_is_by_formula() -> None:
    torch.manual_seed(0)
    network = ProjectionDiscriminator([], 5, 3, lambda network: None).double()
    x = torch.randn(6, 5, 2, 2, dtype=torch.float64)
    phi = x.clamp_min(0).sum((2, 3))
    w, b, e = network.score.weight[0], network.score.bias[0], network.classes.weight
    wanted = torch.stack([w @ p + b + e[y] @ p for p, y in zip(phi, Y, strict=True)])
    torch.testing.assert_close(network(x, Y), wanted, **EXACT)


def test_blocks_are_their_formulae() -> None:
    """With the shortcut in the paper's order, behind doubling and in front of halving; odd sides too."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 4, 3, dtype=torch.float64)
    up = GeneratorBlock(4, 3, by_label(3), (7, 6)).double()
    h = up.conv1(double(up.norm1(x, Y).relu(), (7, 6)))
    wanted = up.conv2(up.norm2(h, Y).relu()) + up.shortcut(double(x, (7, 6)))
    torch.testing.assert_close(up(x, Y), wanted, **EXACT)
    assert wanted.shape == (6, 3, 7, 6)
    x = torch.randn(6, 4, 5, 6, dtype=torch.float64)
    for first in (True, False):
        down = DiscriminatorBlock(4, 3, down=True, first=first).double()
        h = down.conv2(down.conv1(x if first else x.relu()).relu())
        torch.testing.assert_close(down(x), halve(h) + halve(down.shortcut(x)), **EXACT)
    flat = DiscriminatorBlock(4, 4, down=False).double()
    torch.testing.assert_close(flat(x), x + flat.conv2(flat.conv1(x.relu()).relu()), **EXACT)


def test_halving_averages_what_there_is() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert torch.equal(halve(x), torch.tensor([[[[(0 + 1 + 3 + 4) / 4, (2 + 5) / 2]]]]))
    assert torch.equal(double(torch.tensor([[[[1.0, 2.0]]]]), (1, 3)), torch.tensor([[[[1.0, 1.0, 2.0]]]]))


def test_the_game_is_hinge_losses_of_both_batches() -> None:
    model, x = build(), images()
    torch.manual_seed(1)
    loss = model.loss(Batch(x, Y), "discriminator", CLOCK)
    torch.manual_seed(1)
    theirs = model.loss(Batch(x, Y), "generator", CLOCK)
    torch.manual_seed(1)
    fake = model.generator(torch.randn(6, model.latents, dtype=torch.float64), Y)
    real = (x + torch.rand(x.shape, dtype=torch.float64)) / 128 - 1
    d_real, d_fake = model.discriminator(real, Y), model.discriminator(fake, Y)
    wanted = (1 - d_real).clamp_min(0).mean() + (1 + d_fake).clamp_min(0).mean()
    torch.testing.assert_close(loss.value, wanted, **EXACT)
    torch.testing.assert_close(theirs.value, -d_fake.mean(), **EXACT)


def test_turns_are_one_play_each_at_two_rates() -> None:
    assert [(t.name, t.repeat) for t in build().turns()] == [("discriminator", 1), ("generator", 1)]
    recipe = SAGAN.defaults(GREY)[1]
    assert {name: (o.lr, o.betas) for name, o in recipe.optimizers.items()} == {
        "discriminator": (4e-4, (0.0, 0.9)),
        "generator": (1e-4, (0.0, 0.9)),
    }


def test_a_turn_reaches_every_parameter_of_its_player_and_no_other() -> None:
    model = build()
    for turn in model.turns():
        model.zero_grad()
        model.requires_grad_(False)
        for p in model.players()[turn.name]:
            p.requires_grad_(True)
        model.loss(Batch(images(12), Y.repeat(2)), turn.name, CLOCK).value.backward()
        for name, p in model.named_parameters():
            reached = p.grad is not None and bool(p.grad.any())
            assert reached == name.startswith(turn.name), (turn.name, name)


def test_every_layer_but_the_class_tables_is_normalised() -> None:
    model = build()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
            table = isinstance(layer, nn.Embedding) and name.startswith("generator")
            assert parametrize.is_parametrized(layer) != table, name


def test_power_iteration_is_taken_once_a_play_of_the_player() -> None:
    model = build().train()

    def vectors(player: str) -> list[Tensor]:
        parts = model.get_submodule(player).modules()
        return [part.u.clone() for part in parts if isinstance(part, SpectralNorm) and part.u.numel() > 1]

    before = {player: vectors(player) for player in ("discriminator", "generator")}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.loss(Batch(images(), Y), "discriminator", CLOCK)
    assert all(torch.equal(a, b) for a, b in zip(vectors("discriminator"), before["discriminator"], strict=True))
    model.after("discriminator", CLOCK)
    moved = [not torch.equal(a, b) for a, b in zip(vectors("discriminator"), before["discriminator"], strict=True)]
    assert all(moved)
    assert all(torch.equal(a, b) for a, b in zip(vectors("generator"), before["generator"], strict=True))


def test_calibration_follows_weights_that_no_play_has_seen() -> None:
    """An average's layers are of norm one again, and its batch statistics those of its own samples."""
    model = build().eval()
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.calibrate(iter([]), passes=4, batch_size=200)
        for layer in model.generator.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                value = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
                # Fifty iterations leave a few per cent where two singular values are close.
                assert value.item() == pytest.approx(1, abs=0.05)
        z, y = model.draw_latent(300), model.draw_labels(300)
        gap = (model.generate(z, y) - model.train().generate(z, y)).abs().mean()
    assert gap < 0.06  # statistics of 800 draws against those of 300: some 1/√300 of a unit, then a tanh


def test_labels_decide_what_is_made_and_how_it_is_judged() -> None:
    model = build().eval()
    with torch.no_grad():
        for part in model.generator.modules():
            if isinstance(part, ConditionalBatchNorm):
                part.shift.weight.normal_()  # type: ignore[union-attr, operator]
        z = model.draw_latent(6)
        x = model.generate(z, Y)
        assert not torch.allclose(x, model.generate(z, (Y + 1) % 3))
        assert not torch.allclose(model.discriminator(x, Y), model.discriminator(x, (Y + 1) % 3))


def test_128_pixels_are_the_authors_networks() -> None:
    spec = DataSpec("image", (3, 128, 128), 256, classes=1000)
    with torch.device("meta"):
        model = SAGAN(SAGAN.defaults(spec)[0], spec)
    generator = model.generator
    assert isinstance(generator, Generator)
    assert generator.grid == (1024, 4, 4)
    ups = [(b.conv1.in_channels, b.conv1.out_channels, b.size[0]) for b in generator.blocks]  # type: ignore[union-attr, index]
    assert ups == [(1024, 1024, 8), (1024, 512, 16), (512, 256, 32), (256, 128, 64), (128, 64, 128)]
    assert generator.attended == 3
    assert generator.attention is not None
    assert generator.attention.v.out_channels == 256
    layers: list[object] = []
    for m in model.discriminator.body:
        if isinstance(m, SelfAttention):
            layers.append(m.v.out_channels)
        else:
            assert isinstance(m, DiscriminatorBlock)
            layers.append((m.conv1.in_channels, m.conv1.out_channels, m.down))
    assert layers == [
        (3, 64, True), (64, 128, True), 128, (128, 256, True), (256, 512, True), (512, 1024, True), (1024, 1024, False)
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (2, 12, 20), (1, 36, 8), (3, 64, 64), (1, 252, 100)])
def test_images_of_every_size(shape: tuple[int, int, int]) -> None:
    spec = DataSpec("image", shape, 256, classes=3)
    with torch.device("meta"):
        model = SAGAN(SAGAN.tiny(spec)[0], spec)
        batch = Batch(torch.zeros(4, *shape, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
        for turn in model.turns():
            assert model.loss(batch, turn.name, CLOCK).value.shape == ()
        assert model.generate(model.draw_latent(4), batch.y).shape == (4, *shape)


def test_where_attention_stands() -> None:
    assert attended(grids(128, 128), 32) == 2
    assert attended(grids(32, 32), 32) == 1  # never at the image itself
    assert attended(grids(8, 8), 2) == 1  # the coarsest, where none is as small
    assert attended(grids(64, 64), 0) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec("image", (1, 8, 8), 256), "the data has no classes"),
        (DataSpec("image", (1, 4, 8), 256, classes=2), "at least 8"),
        (DataSpec("vector", (4,), None, classes=2), "makes images"),
    ],
)
def test_refuses_what_it_cannot_model(spec: DataSpec, message: str) -> None:
    with pytest.raises(DataMismatch, match=message):
        SAGAN(SAGAN.Config(), spec)
