"""Truncations, crossed styles, and interpolations that move."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dgm_core.capabilities import HasDecoder, HasStyles
from dgm_core.contract import DataSpec
from dgm_core.evaluation import drawing, interpolations, styles
from dgm_core.evaluation.evaluate import evaluate
from dgm_core.evaluation.record import EvaluationConfig
from dgm_core.models.adversarial.stylegan import StyleGAN
from tests.evaluation.handmade import IMAGES, Blank, factory, images

SIDE, GAP = 64, drawing.GAP


class Styled(Blank, HasDecoder, HasStyles):
    """The upper half shows the coarse latent and the lower half the fine one; a sample shows its truncation."""

    style_layers = 4

    def __init__(self) -> None:
        super().__init__(IMAGES)
        self.drawn = 0

    def sample(
        self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, truncation: float | None = None
    ) -> Tensor:
        value = 200 if truncation is None else round(100 * truncation)
        return torch.full((n, 1, 4, 4), value, dtype=torch.uint8)

    def draw_latent(self, n: int) -> Tensor:
        self.drawn += n
        return torch.arange(self.drawn - n, self.drawn)[:, None] * 10.0

    def decode(self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        return self.decode_mixed(z, z, 0)

    def decode_mixed(self, coarse: Tensor, fine: Tensor, cut: int) -> Tensor:
        halves = torch.stack([coarse, coarse, fine, fine], 1)
        return halves[:, None].expand(-1, 1, 4, 4)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    splits: dict[str, Any] = {name: factory(images(40)) for name in ("train", "val", "test")}
    options = EvaluationConfig(samples=20, tiles=3)
    found = evaluate(Styled(), spec=IMAGES, info={}, judge=None, options=options, out=folder, seed=0, **splits)
    captions = {f.file: f.caption for f in found.figures}
    assert {"truncations.png", "style_mixing.png", "interpolations.png", "interpolations.gif"} <= set(captions)
    return folder


def sheet(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))[..., 0].astype(int)


def test_each_truncation_has_a_block_and_the_models_own_is_the_last(out: Path):
    found = sheet(out / "truncations.png")
    block = drawing.HEADING + styles.ROWS_OF_A_TRUNCATION * (SIDE + GAP) + GAP
    assert len(found) == 4 * block
    inside = [found[i * block + drawing.HEADING + GAP + 8, GAP + 8] for i in range(4)]
    assert inside == [20, 50, 100, 200]


def test_rows_give_the_coarse_styles_and_columns_the_fine_ones(out: Path):
    found = sheet(out / "style_mixing.png")
    block = drawing.HEADING + (styles.COARSE + 1) * (SIDE + GAP) + GAP
    assert len(found) == 3 * block
    at = GAP + (SIDE + GAP) * np.arange(1 + max(styles.COARSE, styles.FINE))
    for cut in range(3):
        below = found[cut * block + drawing.HEADING : (cut + 1) * block]
        upper, lower = (below[np.ix_(at[: styles.COARSE + 1] + offset, at + 8)] for offset in (8, SIDE - 8))
        assert (upper[1:, 1:] == upper[1:, :1]).all()
        assert (lower[1:, 1:] == lower[:1, 1:]).all()
        assert len(np.unique(upper[1:, 0])) == styles.COARSE
        assert len(np.unique(lower[0, 1:])) == styles.FINE


def test_an_animation_starts_as_the_sheet_and_comes_back(out: Path):
    moving = Image.open(out / "interpolations.gif")
    steps = (interpolations.STEPS - 1) * interpolations.BETWEEN + 1
    assert moving.n_frames == 2 * steps - 2
    assert moving.info["loop"] == 0
    frames = []
    for i in range(moving.n_frames):
        moving.seek(i)
        frames.append(np.asarray(moving.convert("RGB"))[..., 0].astype(int))
    assert frames[0].shape == (2 * (SIDE + GAP) + GAP, 4 * (SIDE + GAP) + GAP)  # eight rows, four side by side
    still = sheet(out / "interpolations.png")
    for row in range(2):  # the first two rows of the sheet: their first and last pictures
        y, x = GAP + row * (SIDE + GAP) + 8, GAP + row * (SIDE + GAP) + 8
        assert frames[0][GAP + 8, x] == still[y, GAP + 8]
        assert frames[steps - 1][GAP + 8, x] == still[y, -GAP - 8]
    assert np.array_equal(frames[1], frames[-1])


def test_colours_of_an_animation_are_those_of_its_pictures():
    shown = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    shown[0, 0, 0], shown[0, 1, 2] = 250, 120
    moving = Image.open(io.BytesIO(drawing.animation(shown, 1)))
    for i, colour in enumerate([(250, 0, 0), (0, 0, 120)]):
        moving.seek(i)
        assert np.abs(np.asarray(moving.convert("RGB"))[20, 20].astype(int) - colour).max() <= 1


def test_a_style_gan_mixes_as_its_own_layers_do():
    spec = DataSpec("image", (1, 8, 8), 256)
    torch.manual_seed(0)
    model = StyleGAN(StyleGAN.tiny(spec)[0], spec).double().eval()
    coarse, fine = model.draw_latent(2), model.draw_latent(2)
    with torch.no_grad():
        ends = [model.decode_mixed(coarse, fine, cut) for cut in (0, model.style_layers)]
        assert torch.allclose(ends[0], model.decode(fine))
        assert torch.allclose(ends[1], model.decode(coarse))
        between = model.decode_mixed(coarse, fine, model.style_layers // 2)
    assert not torch.allclose(between, ends[0])
    assert not torch.allclose(between, ends[1])
