"""Completions keep what was shown, and a model may refuse."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dgm_core.capabilities import HasCompletion
from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.evaluation import completions, drawing
from dgm_core.evaluation.evaluate import evaluate
from dgm_core.evaluation.record import Evaluation, EvaluationConfig
from dgm_core.models.autoregressive.made import MADE
from tests.evaluation.handmade import IMAGES, Blank, factory, images


class Filler(Blank, HasCompletion):
    """Fills in 200; asserts that the lower half is what is asked for."""

    refuses = False

    def complete(self, x: Tensor, observed: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Any:
        if self.refuses:
            raise DataMismatch("not in this order")
        assert observed.shape == x.shape
        assert observed[:, :, :2].all()
        assert not observed[:, :, 2:].any()
        return torch.where(observed, x, 200).to(x.dtype)


def run(model: Blank, batch: Batch, out: Path) -> Evaluation:
    splits = {name: factory(batch) for name in ("train", "val", "test")}
    options = EvaluationConfig(examples=40, samples=10, tiles=3)
    return evaluate(model, spec=model.data, info={}, judge=None, options=options, out=out, seed=0, **splits)


def test_a_row_has_the_original_what_was_shown_and_the_draws(tmp_path: Path):
    found = run(Filler(), images(40), tmp_path)
    assert [f.caption for f in found.figures if f.file == "completions.png"]
    sheet = np.asarray(Image.open(io.BytesIO((tmp_path / "completions.png").read_bytes())))[..., 0].astype(int)
    side, gap = 64, drawing.GAP
    columns = [gap] + [gap + i * (side + gap) + 4 * gap for i in range(1, completions.DRAWS + 2)]
    assert sheet.shape == (3 * (side + gap) + gap, columns[-1] + side + gap)
    original, seen, *draws = (sheet[gap : gap + side, left : left + side] for left in columns)
    upper = slice(0, side // 2)
    assert np.array_equal(original[upper], seen[upper])
    assert (seen[side // 2 :] == completions.VEIL[0].item()).all()
    for drawn in draws:
        assert np.array_equal(drawn[upper], original[upper])
        assert (drawn[side // 2 :] == 200).all()


def test_a_refusal_is_said_in_words(tmp_path: Path):
    model = Filler()
    model.refuses = True
    found = run(model, images(40), tmp_path)
    assert "completions.png" not in {f.file for f in found.figures}
    assert "No completions are shown: not in this order." in found.warnings


def test_a_mixture_over_orders_refuses_and_says_so(tmp_path: Path):
    spec = DataSpec("image", (1, 4, 4), 2)
    model = MADE(MADE.Config(hidden=20, orders=2), spec)
    found = run(model, Batch((images(40).x > 100).to(torch.uint8)), tmp_path)
    assert sum("mixture over 2 orders" in w for w in found.warnings) == 2  # completions, and bits of single pixels


def test_what_is_shown_comes_first():
    assert completions.shown_first(IMAGES)[0].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert completions.shown_first(DataSpec("audio", (5,), 16)).tolist() == [True, True, False, False, False]
    colour = completions.shown_first(DataSpec("image", (3, 5, 2), 256))
    assert colour.sum().item() == 3 * 2 * 2
    assert colour[:, :2].all()
