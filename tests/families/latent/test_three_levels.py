"""VQ-VAE-2 of three levels and its priors: what each level is given, the chain's law, and the whole of it by class."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from dgm_core.config import Recipe
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.models.autoregressive.base import ContextMap
from dgm_core.models.autoregressive.gated_pixel_cnn import GatedPixelCNN
from dgm_core.models.autoregressive.pixel_snail import PixelSnail
from dgm_core.models.latent.vq_vae2 import VQVAE2
from dgm_core.models.two_stage import TwoStage
from dgm_core.training.trainer import Trainer
from tests.support import Tensors, every_example, examples

LEVELS = ("top", "middle", "bottom")
SMALL = {"levels": 3, "code_features": 4, "hidden": 8, "residual": 4, "depth": 1, "downsample": 2}


def code_model(side: int, **config) -> VQVAE2:
    torch.manual_seed(0)
    data = DataSpec("image", (1, side, side), 256, classes=2, class_shares=(0.5, 0.5))
    model = VQVAE2(VQVAE2.Config(**{**SMALL, **config}), data)
    model.enter("model", Tensors(examples(data, 40)).one_pass(8))
    return model.double().eval()


def untrained(spec: DataSpec, kind: type[GenerativeModel] = PixelSnail) -> GenerativeModel:
    """In double precision, with no weight left at zero, where nothing given would show."""
    torch.manual_seed(0)
    prior = kind(kind.tiny(spec)[0], spec).double().eval()
    for parameter in prior.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return prior


def random_codes(model: VQVAE2, n: int) -> dict[str, Tensor]:
    return {name: torch.randint(spec.levels, (n, *spec.shape)) for name, spec in model.code_specs().items()}


def every_place(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, shape)))


def test_each_level_is_given_all_coarser_ones_and_the_class():
    specs = code_model(16, codes=8).code_specs()
    assert tuple(specs) == LEVELS
    assert [spec.shape for spec in specs.values()] == [(2, 2), (4, 4), (8, 8)]
    assert [tuple(spec.context) for spec in specs.values()] == [(), ("top",), ("top", "middle")]
    assert [spec.classes for spec in specs.values()] == [2, 2, 2]


def test_by_default_the_top_alone_attends():
    specs = code_model(16, codes=8).code_specs()
    configs = [PixelSnail.defaults(spec)[0] for spec in specs.values()]
    assert [config.attention for config in configs] == [True, False, False]
    assert configs[0].heads > 1


@pytest.mark.parametrize("kind", [PixelSnail, GatedPixelCNN])
@torch.no_grad()
def test_a_level_hears_each_coarser_one_and_the_class_everywhere(kind):
    """Corners of each coarser level reach the codes of their own place; the class reaches them all."""
    model = code_model(16, codes=8)
    codes = random_codes(model, 1)
    for name, spec in model.code_specs().items():
        prior = untrained(spec, kind)
        context = {above: codes[above] for above in spec.context}
        y = torch.zeros(1, dtype=torch.long)
        terms = prior.log_conditionals(codes[name], y, context)[0, 0]
        assert (terms != prior.log_conditionals(codes[name], 1 - y, context)[0, 0]).all()
        for above, given in context.items():
            ratio = spec.shape[0] // given.shape[1]
            for r, c in [(0, 0), (given.shape[1] - 1, 1)]:
                other = given.clone()
                other[0, r, c] = (given[0, r, c] + 3) % 8
                changed = prior.log_conditionals(codes[name], y, {**context, above: other})[0, 0] != terms
                own = changed[r * ratio : (r + 1) * ratio, c * ratio : (c + 1) * ratio]
                assert own.all(), f"{name} given {above}"


@torch.no_grad()
def test_a_coarser_code_lies_over_its_own_place():
    """Without residual blocks, which blur, a code's features are those of its own square and of no other."""
    specs = code_model(16, codes=8).code_specs()
    for name, above in (("middle", "top"), ("bottom", "top"), ("bottom", "middle")):
        spec, coarse = specs[name], specs[name].context[above]
        lies = ContextMap(above, coarse, spec, features=3, depth=0)
        given = torch.zeros(1, *coarse.shape, dtype=torch.long)
        ratio = spec.shape[0] // coarse.shape[0]
        for r, c in every_place(coarse.shape):
            other = given.clone()
            other[0, r, c] = 1
            changed = (lies(other) != lies(given))[0].any(0)
            expected = torch.zeros(spec.shape, dtype=torch.bool)
            expected[r * ratio : (r + 1) * ratio, c * ratio : (c + 1) * ratio] = True
            assert torch.equal(changed, expected), f"{name} given {above} at {(r, c)}"


@torch.no_grad()
def test_the_probabilities_of_the_coarser_levels_and_of_each_finest_code_sum_to_one():
    """Σ_top p(top | y) Σ_middle p(middle | top, y) over all 2⁵ of them, and the finest level's factors one by one."""
    model = code_model(8, codes=2)
    specs = model.code_specs()
    assert [spec.shape for spec in specs.values()] == [(1, 1), (2, 2), (4, 4)]
    priors = {name: untrained(spec) for name, spec in specs.items()}
    for label in range(2):
        total = 0.0
        for top in every_example(specs["top"]).split(1):
            middle = every_example(specs["middle"])
            y, above = torch.full((len(middle),), label), {"top": top.expand(len(middle), 1, 1)}
            mass = priors["middle"].log_prob(middle, y, above).exp()
            total += (priors["top"].log_prob(top, y[:1]).exp() * mass.sum()).item()
            # The finest level's first code, given every pair above: its two values' masses.
            bottom = torch.zeros(len(middle), 4, 4, dtype=torch.long)
            given = {**above, "middle": middle}
            first = []
            for value in range(2):
                bottom[:, 0, 0] = value
                first.append(priors["bottom"].log_conditionals(bottom, y, given)[:, 0, 0, 0].exp())
            torch.testing.assert_close(sum(first), torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-12)
        assert abs(total - 1) <= 1e-12  # float64 sums of 32 terms


@torch.no_grad()
def test_a_joint_sample_is_drawn_level_by_level_and_decoded():
    model = code_model(16, codes=8)
    specs = model.code_specs()
    whole = TwoStage(model, {name: untrained(spec) for name, spec in specs.items()}).eval()
    y = torch.tensor([0, 1, 1])
    torch.manual_seed(3)
    drawn = whole.sample(3, y, temperature={"top": 0.5})
    torch.manual_seed(3)
    codes: dict[str, Tensor] = {}
    codes["top"] = whole.prior("top").sample(3, y, temperature=0.5)
    codes["middle"] = whole.prior("middle").sample(3, y, {"top": codes["top"]})
    codes["bottom"] = whole.prior("bottom").sample(3, y, {"top": codes["top"], "middle": codes["middle"]})
    assert torch.equal(drawn, model.decode_codes(codes, y).round().clamp(0, 255).to(torch.uint8))
    assert len(codes["bottom"].unique()) > 1
    each = whole.code_log_prob(drawn, y)
    assert tuple(each) == LEVELS
    read = model.codes(drawn)
    for name, nats in each.items():
        context = {above: read[above] for above in specs[name].context}
        assert torch.equal(nats, whole.prior(name).log_prob(read[name], y, context))


def trained(model: GenerativeModel, data: Batch, steps: int) -> GenerativeModel:
    recipe: Recipe = type(model).tiny(model.data)[1].merged({"steps": steps})
    Trainer(model, recipe, Tensors(data)).fit()
    return model.eval()


@pytest.mark.slow
def test_the_whole_chain_learns_and_samples_by_class():
    """Stripes whose phase is the class: trained, encoded, trained on the codes, joined, sampled."""
    torch.manual_seed(0)
    data = DataSpec("image", (1, 16, 16), 256, classes=2, class_shares=(0.5, 0.5))
    train, test = examples(data, 400), examples(data, 100, seed=1)
    codes_config = VQVAE2.tiny(data)[0].merged({"levels": 3})
    model = VQVAE2(codes_config, data)
    trained(model, train, 120)
    priors = {}
    with torch.no_grad():
        codes = model.codes(train.x)
    for name, spec in model.code_specs().items():
        context = {above: codes[above] for above in spec.context}
        prior = PixelSnail(PixelSnail.tiny(spec)[0], spec)
        priors[name] = trained(prior, Batch(codes[name], train.y, context, train.index), 60)
    whole = TwoStage(model, priors).eval()
    with torch.no_grad():
        bits = {name: b.mean().item() for name, b in whole.bits_per_code(test.x, test.y).items()}
        y = torch.arange(60) % 2
        drawn = whole.sample(60, y).double().flatten(1)
    # Held-out codes: the class and the coarser levels tell most of them. Untrained, every prior needs more than log2 K.
    assert max(bits.values()) < 0.25 * math.log2(codes_config.codes)
    kinds = torch.stack([train.x[train.y == k].double().mean(0).flatten() for k in range(2)])
    nearest = torch.cdist(drawn, kinds).argmin(1)
    assert (nearest == y).double().mean().item() >= 0.9  # a half by chance
    assert len(drawn.unique(dim=0)) > 2  # not one picture a class
