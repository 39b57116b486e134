"""VQ-VAE and VQ-VAE-2: sizes, levels, the loss as printed, starts level by level, and what they refuse."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgm_core import distributed
from dgm_core.config import Recipe
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.evaluation import codes
from dgm_core.models.latent import base
from dgm_core.models.latent.base import level_names, spread
from dgm_core.models.latent.vq_vae import VQVAE
from dgm_core.models.latent.vq_vae2 import VQVAE2
from dgm_core.nn.quantiser import VectorQuantiser, nearest
from dgm_core.training.trainer import Trainer
from tests.support import CommonNoise, Tensors, equal_states, examples

GREY = DataSpec("image", (1, 8, 8), 256, classes=2, class_shares=(0.25, 0.75))
START = Clock(0, 10)
SMALL = {"codes": 6, "code_features": 4, "hidden": 8, "residual": 4, "depth": 1, "downsample": 2}


def build(levels: int = 2, data: DataSpec = GREY, **config) -> VQVAE2:
    torch.manual_seed(0)
    return VQVAE2(VQVAE2.Config(**{**SMALL, "levels": levels, **config}), data).double()


def entered(model: VQVAE2, n: int = 40) -> VQVAE2:
    model.enter("model", Tensors(examples(model.data, n)).one_pass(8))
    return model


def test_level_names():
    assert [level_names(n) for n in (1, 2, 3, 5)] == [
        ("top",),
        ("top", "bottom"),
        ("top", "middle", "bottom"),
        ("top", "middle1", "middle2", "middle3", "bottom"),
    ]


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 48)])
def test_levels_halve_and_decode_to_the_image(levels, shape):
    data = DataSpec("image", shape, 256, classes=2)
    model = build(levels, data)
    x = torch.randint(256, (3, *shape)).to(torch.uint8)
    codes = model.codes(x)
    for i, name in enumerate(reversed(level_names(levels))):
        assert codes[name].shape == (3, shape[1] // 2 ** (i + 1), shape[2] // 2 ** (i + 1))
        assert codes[name].dtype == torch.uint8
        assert codes[name].max() < 6
    assert list(codes) == list(level_names(levels))
    mean = model.decode_codes(codes)
    assert mean.shape == x.shape
    assert mean.dtype == torch.float64
    assert 0 <= mean.min() <= mean.max() <= 255
    sample = model.sample(2)
    assert sample.shape == (2, *shape)
    assert sample.dtype == torch.uint8


@pytest.mark.parametrize(
    ("shape", "bottom"),
    [((1, 16, 16), (8, 8)), ((1, 28, 28), (14, 14)), ((1, 32, 32), (8, 8)), ((3, 64, 48), (16, 12)),
     ((3, 256, 256), (64, 64))],
)  # fmt: skip
def test_defaults_fit_the_usual_sizes(shape, bottom):
    data = DataSpec("image", shape, 256)
    with torch.device("meta"):
        model = VQVAE2(VQVAE2.defaults(data)[0], data)
    assert model.grids == {"top": (bottom[0] // 2, bottom[1] // 2), "bottom": bottom}


def test_sizes_that_do_not_divide_name_the_nearest_that_do():
    data = DataSpec("image", (1, 28, 30), 256)
    with pytest.raises(DataMismatch, match=r"28 × 30 do not divide by 8 .* 24 × 24 and 32 × 32.*pad"):
        VQVAE2(VQVAE2.Config(), data)
    with pytest.raises(DataMismatch, match="power of two"):
        VQVAE2(VQVAE2.Config(downsample=3), data)
    with pytest.raises(DataMismatch, match="models images"):
        VQVAE2(VQVAE2.Config(), DataSpec("vector", (4,), 2))
    with pytest.raises(DataMismatch, match="needs classes"):
        VQVAE(VQVAE.Config(conditional=True), DataSpec("image", (1, 8, 8), 2))


def test_reduction_is_the_papers():
    data = DataSpec("image", (3, 128, 128), 256)
    with torch.device("meta"):
        model = VQVAE(VQVAE.defaults(data)[0], data)
    assert model.grids == {"top": (32, 32)}
    assert model.reduction == pytest.approx(128 * 128 * 3 * 8 / (32 * 32 * 9))


def test_code_specs_carry_context_and_classes():
    specs = build(3).code_specs()
    assert [(s.kind, s.shape, s.levels) for s in specs.values()] == [("codes", (n, n), 6) for n in (1, 2, 4)]
    assert all(s.classes == 2 and s.class_shares == (0.25, 0.75) for s in specs.values())
    assert {name: list(s.context) for name, s in specs.items()} == {
        "top": [], "middle": ["top"], "bottom": ["top", "middle"]
    }  # fmt: skip
    assert specs["bottom"].context["middle"] == DataSpec("codes", (2, 2), 6)
    assert all(DataSpec.from_dict(s.to_dict()) == s for s in specs.values())


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_loss_is_equation_3_over_all_levels(codebook):
    model = entered(build(2, codebook=codebook, beta=0.7))
    batch = examples(GREY, 10)
    x = 2 * batch.x.double() / 255 - 1
    loss = model.loss(batch, "model", START)
    # Algorithm 1, written out.
    h_bottom = model.encoders[0](x)
    h_top = model.encoders[1](h_bottom)
    e, gaps = {}, []
    z = model.to_codes[0](h_top)
    for name in ("top", "bottom"):
        if name == "bottom":
            z = model.to_codes[1](torch.cat([model.conditioners[0](e["top"]), h_bottom], 1))
        rows = z.movedim(1, -1).reshape(-1, 4)
        codebook_ = model.quantiser(name).codebook
        e[name] = codebook_[nearest(rows, codebook_)].view(10, *model.grids[name], 4).movedim(-1, 1)
        gaps.append((z - e[name]).square().mean())
    x_hat = model.decoder(torch.cat([model.upsamplers[0](e["top"]), e["bottom"]], 1))
    mse = (x - x_hat).square().mean()
    expected = mse + (0.7 if codebook == "ema" else 1.7) * sum(gaps)
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.metrics["mse"], mse.detach())
    codes = model.codes(batch.x)
    torch.testing.assert_close(model.decode_codes(codes), ((x_hat.detach() + 1) * 127.5).clamp(0, 255))


def test_gradients_pass_the_quantisers_to_every_network():
    model = entered(build(3))
    model.train().loss(examples(GREY, 10), "model", START).value.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_k_means_sees_each_level_through_the_coarser_ones_new_codes(levels, monkeypatch):
    model = build(levels, codes=16)  # for which all 40 images are looked at
    seen = []
    original = VectorQuantiser.start_from

    def record(self, rows, iterations=10):
        original(self, rows, iterations)
        seen.append(rows)

    monkeypatch.setattr(VectorQuantiser, "start_from", record)
    entered(model)
    assert len(seen) == levels
    x = 2 * examples(GREY, 40).x.double() / 255 - 1
    for i, rows in enumerate(seen):  # features with all codebooks as they are now: the coarser ones were final then
        z = model._project_level(x, i).movedim(1, -1).reshape(-1, 4)
        torch.testing.assert_close(rows, z)  # 16 positions at most: all are looked at, in the order of the pass
        codebook = model.quantiser(model.names[i]).codebook
        spread_of_rows = (z - z.mean(0)).square().sum()
        left = (z - codebook[nearest(z, codebook)]).square().sum()
        assert left < 0.5 * spread_of_rows


def test_start_can_be_the_papers():
    model = build(start="uniform")
    before = model.quantiser("top").codebook.clone()
    entered(model)
    assert torch.equal(model.quantiser("top").codebook, before)
    assert before.abs().max() <= 1 / 6


def test_training_moves_codebooks_once_a_play_and_evaluation_nothing():
    model, batch = entered(build()), examples(GREY, 10)
    model.eval()
    before = {k: v.clone() for k, v in dict(model.named_buffers()).items()}
    model.loss(batch, "model", START)
    model.sample(3)
    model.decode_codes(model.codes(batch.x))
    model.after("model", START)
    assert not equal_states(before, dict(model.named_buffers()))
    model.train()
    model.loss(batch, "model", START)
    assert torch.equal(model.quantiser("top").codebook, before["quantisers.top.codebook"])
    model.after("model", START)
    moved = equal_states(before, dict(model.named_buffers()))
    assert {"quantisers.top.codebook", "quantisers.bottom.codebook", "quantisers.bottom.usage"} <= set(moved)


def test_metrics_report_the_last_plays_whole_batch():
    model, batch = entered(build()), examples(GREY, 12)
    model.train()
    codes = model.codes(batch.x)
    for part in (slice(0, 4), slice(4, 12)):
        model.loss(batch.rows(part), "model", START)
    model.after("model", START)
    metrics = model.loss(batch.rows(slice(0, 1)), "model", START).metrics
    for name in ("top", "bottom"):
        share = torch.bincount(codes[name].flatten().long(), minlength=6).double()
        share = share / share.sum()
        assert metrics[f"perplexity/{name}"].item() == pytest.approx(math.exp(torch.special.entr(share).sum()))
        assert metrics[f"usage/{name}"].item() == pytest.approx((share > 0).double().mean().item())


def test_samples_draw_codes_by_their_use():
    """With all use on one code, every sample is that code's image."""
    model = entered(build(1))
    model.quantiser("top").usage.copy_(F.one_hot(torch.tensor(4), 6))
    expected = model.decode_codes({"top": torch.full((1, 4, 4), 4)}).round().to(torch.uint8)
    assert torch.equal(model.sample(3), expected.expand(3, -1, -1, -1))


def test_conditional_decoding():
    model = entered(build(conditional=True))
    batch = examples(GREY, 4)
    codes = model.codes(batch.x)
    images = [model.decode_codes(codes, torch.full((4,), k)) for k in (0, 1)]
    assert not torch.allclose(*images)
    with pytest.raises(DataMismatch, match="give y"):
        model.decode_codes(codes)
    assert model.sample(3).shape == (3, 1, 8, 8)
    with pytest.raises(DataMismatch, match="labels lie in"):
        model.sample(1, torch.tensor([2]))


def test_spread_keeps_enough_of_the_whole_pass_in_bounded_memory():
    held = 0

    def batches(n: int):
        for i in range(n):
            yield Batch(torch.full((10, 1), i))

    for n in (1, 3, 8, 9, 100, 1000):
        kept = [int(b.x[0]) for b in spread(batches(n), 40)]
        held = max(held, len(kept))
        assert len(kept) >= min(n, 4)
        strides = {b - a for a, b in pairwise(kept)}
        assert len(strides) <= 1  # even
        assert kept[0] == 0
        assert kept[-1] > n - 1 - max(strides or {1})  # to the end
    assert held <= 8


def test_an_empty_pass_is_refused():
    with pytest.raises(DataMismatch, match="at least one"):
        build().enter("model", iter([]))


def test_real_valued_images_keep_their_units():
    data = DataSpec("image", (1, 8, 8), None)
    model = build(data=data)
    x = 50 * torch.randn(4, 1, 8, 8)
    codes = model.codes(x)
    model.decoder[-1].bias.data.fill_(300.0)
    assert model.decode_codes(codes).mean() > 200  # not clipped
    assert model.sample(2).dtype == torch.float32
    assert model.reduction == 64 * 32 / ((16 + 4) * math.log2(6))


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (VQVAE, (3, 128, 128), 128 * 128 * 3 * 8 / (32 * 32 * 9)),  # 42.7: the paper's "approximately 42.6"
        (VQVAE2, (3, 256, 256), 256 * 256 * 3 * 8 / ((64 * 64 + 32 * 32) * 9)),
    ],
)
def test_evaluation_reports_the_models_reduction(model, shape, expected):
    data = DataSpec("image", shape, 256)
    with torch.device("meta"):
        instance = model(model.defaults(data)[0], data)
    assert instance.reduction == pytest.approx(expected)
    assert codes.reduction(data, instance.code_specs()) == pytest.approx(expected)


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_two_ranks_start_move_and_revive_the_codebooks_of_one(codebook, two_ranks):
    one = rounds_with_revivals(codebook, 0, 1)
    for level in ("top", "bottom"):
        usage = one[f"quantisers.{level}.usage"]
        revived = (usage == 1 / 24).sum().item()  # to the bit: what a code is given that has just been revived
        assert 0 < revived < 24
    for two in two_ranks.run(share_of_rounds_with_revivals, codebook):
        for name, expected in one.items():
            # Sums in another order.
            torch.testing.assert_close(two[name], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def share_of_rounds_with_revivals(codebook: str) -> dict[str, Tensor]:
    return rounds_with_revivals(codebook, distributed.rank(), distributed.world_size())


def rounds_with_revivals(codebook: str, rank: int, world: int) -> dict[str, Tensor]:
    """Twenty-four codes, more than two kinds of image need, that must be used nearly alike to stay where they are."""
    model = build(2, codebook=codebook, codes=24, decay=0.5, revive_below=0.9)
    sgd = {"model": {"algorithm": "sgd", "lr": 1e-3}}
    recipe = Recipe.model_validate({"batch_size": 10, "steps": 3, "optimizers": sgd, "precision": "fp64"})
    trainer = Trainer(model, recipe, Tensors(examples(GREY, 30)))
    torch.manual_seed(7)
    mine = distributed.share(10, rank, world)
    with CommonNoise(mine.start, mine.stop - mine.start, 10):
        trainer.fit()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_base_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        base.QuantisedAutoencoder(base.CodebookConfig(), GREY, 1, 4)
