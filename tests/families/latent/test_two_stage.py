"""A code model and its priors as one model: the order of the draws, what is passed on, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dgm_core.capabilities import HasLikelihood
from dgm_core.config import Recipe, Strict
from dgm_core.contract import Clock, DataMismatch, DataSpec, GenerativeModel, Loss
from dgm_core.models.latent.ppca import PPCA
from dgm_core.models.latent.vq_vae2 import VQVAE2
from dgm_core.models.two_stage import TwoStage
from tests.support import Tensors, examples

GREY = DataSpec("image", (1, 8, 8), 256, classes=2, class_shares=(0.25, 0.75))
K = 4


class Copies(GenerativeModel, HasLikelihood):
    """Draws the class at the top; below, the code above: everything that it was given shows in its samples."""

    Config = Strict
    exact = True

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Strict, Recipe]:
        return Strict(), Recipe(steps=1)

    tiny = defaults

    def loss(self, batch, turn: str, clock: Clock) -> Loss:
        return Loss(torch.zeros(()))

    def log_prob(self, x, y=None, context: Mapping[str, Tensor] = {}, *, samples: int = 1) -> Tensor:
        assert set(context) == set(self.data.context)
        return x.new_full((len(x),), -self.data.dims * math.log(K), dtype=torch.float64)

    def sample(self, n: int, y=None, context: Mapping[str, Tensor] = {}) -> Tensor:
        assert set(context) == set(self.data.context)
        assert y is not None
        shape = self.data.shape
        if not context:
            return y[:, None, None].expand(n, *shape).to(self.data.dtype)
        top = context["top"]
        return top.repeat_interleave(shape[0] // top.shape[1], 1).repeat_interleave(shape[1] // top.shape[2], 2)


class Shifts(Copies):
    """With an option."""

    def sample(self, n: int, y=None, context: Mapping[str, Tensor] = {}, *, shift: int = 0) -> Tensor:
        return super().sample(n, y, context) + shift


def code_model(**config) -> VQVAE2:
    torch.manual_seed(0)
    small = {"codes": K, "code_features": 4, "hidden": 8, "residual": 4, "depth": 1, "downsample": 2}
    model = VQVAE2(VQVAE2.Config(**{**small, **config}), GREY).double()
    model.enter("model", Tensors(examples(GREY, 40)).one_pass(8))
    return model.eval()


def priors(model: VQVAE2, **kinds: type[Copies]) -> dict[str, GenerativeModel]:
    kinds = {"top": Copies, "bottom": Copies, **kinds}
    return {level: kinds[level](Strict(), spec) for level, spec in model.code_specs().items()}


def test_samples_pass_labels_and_context_down_and_decode():
    model = code_model(conditional=True)
    whole = TwoStage(model, priors(model))
    y = torch.tensor([0, 1, 1])
    ones = torch.ones(3, dtype=torch.uint8) * y.to(torch.uint8)
    codes = {"top": ones[:, None, None].expand(3, 2, 2), "bottom": ones[:, None, None].expand(3, 4, 4)}
    expected = model.decode_codes(codes, y).round().to(torch.uint8)
    assert torch.equal(whole.sample(3, y), expected)


def test_labels_are_drawn_once_for_all_stages_from_the_marginals(monkeypatch):
    model = code_model()
    whole = TwoStage(model, priors(model))
    seen = {}
    monkeypatch.setattr(
        VQVAE2, "decode_codes", lambda self, codes, y, context: seen.update(codes, y=y) or torch.zeros(1)
    )
    whole.sample(4000)
    assert torch.equal(seen["top"][:, 0, 0].long(), seen["y"])
    assert torch.equal(seen["bottom"][:, 0, 0].long(), seen["y"])
    # Five standard errors of a share of 0.75 among 4000.
    assert seen["y"].double().mean().item() == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / 4000))


def test_options_reach_the_priors_that_know_them():
    model = code_model()
    whole = TwoStage(model, priors(model, bottom=Shifts))
    assert whole.sample_options() == {"shift": 0}
    y = torch.zeros(1, dtype=torch.long)
    codes = {"top": torch.zeros(1, 2, 2), "bottom": torch.ones(1, 4, 4)}
    expected = model.decode_codes(codes).round().to(torch.uint8)
    assert torch.equal(whole.sample(1, y, shift=1), expected)
    assert torch.equal(whole.sample(1, y, shift={"bottom": 1}), expected)
    assert not torch.equal(whole.sample(1, y), expected)
    for options in ({"shfit": 1}, {"shift": {"top": 1}}, {"shift": {"attic": 1}}):
        with pytest.raises(TypeError, match="bottom: shift"):
            whole.sample(1, y, **options)


def test_codes_are_the_code_models():
    model = code_model()
    whole = TwoStage(model, priors(model))
    x = examples(GREY, 5).x
    assert all(torch.equal(v, model.codes(x)[k]) for k, v in whole.codes(x).items())
    assert whole.code_specs() == model.code_specs()
    assert torch.equal(whole.decode_codes(whole.codes(x)), model.decode_codes(model.codes(x)))


def test_bits_per_code():
    model = code_model()
    whole = TwoStage(model, priors(model))
    bits = whole.bits_per_code(examples(GREY, 5).x)
    assert list(bits) == ["top", "bottom"]
    for b in bits.values():  # a uniform prior needs log2 K
        torch.testing.assert_close(b, torch.full((5,), math.log2(K), dtype=torch.float64))


def test_there_is_nothing_to_train():
    model = code_model()
    whole = TwoStage(model, priors(model))
    assert whole.turns() == ()
    assert whole.players() == {}
    with pytest.raises(RuntimeError, match="one by one"):
        whole.loss(examples(GREY, 2), "model", Clock(0, 1))


def test_mismatches_are_refused():
    model = code_model()
    good = priors(model)
    with pytest.raises(DataMismatch, match="top, bottom is needed; given: top"):
        TwoStage(model, {"top": good["top"]})
    with pytest.raises(DataMismatch, match=r"'top'.*shape \(4, 4\).*shape \(2, 2\)"):
        TwoStage(model, {"top": good["bottom"], "bottom": good["top"]})
    with pytest.raises(DataMismatch, match=r"levels 4.*levels 5"):
        TwoStage(code_model(codes=5), good)
    blind = Copies(Strict(), DataSpec("codes", (4, 4), K, 2, (0.25, 0.75)))
    with pytest.raises(DataMismatch, match="context"):
        TwoStage(model, {**good, "bottom": blind})
    with pytest.raises(DataMismatch, match="has no codes"):
        TwoStage(PPCA(PPCA.Config(latents=1), DataSpec("vector", (3,), None)), good)
