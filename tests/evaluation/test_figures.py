"""Figures, pixel by pixel where that can be said."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dgm_core.capabilities import HasReceptiveFields
from dgm_core.contract import Batch, DataSpec
from dgm_core.evaluation import drawing, figures, interpolations
from dgm_core.models import CATALOG
from dgm_core.models.belief.nvil import NVIL
from dgm_core.models.boltzmann.base import DeepMachine
from dgm_core.models.boltzmann.rbm import RBM
from dgm_core.models.latent.vae import VAE
from tests.evaluation.handmade import IMAGES, Blank, Everything, images

GREY = DataSpec("image", (1, 16, 16), 256)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_small_pictures_are_enlarged_by_whole_pixels():
    x = torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8)
    sheet = pixels(drawing.grid(drawing.pictures(x, GREY), 3))
    side, gap = 64, drawing.GAP
    assert sheet.shape == (2 * (side + gap) + gap, 3 * (side + gap) + gap, 3)
    for i in range(6):
        top, left = gap + (i // 3) * (side + gap), gap + (i % 3) * (side + gap)
        tile = sheet[top : top + side, left : left + side]
        assert np.array_equal(tile, x[i, 0].numpy().repeat(4, 0).repeat(4, 1)[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    ("spec", "x"),
    [
        (DataSpec("image", (1, 2, 2), 2), torch.tensor([[[[0, 1], [1, 0]]]])),
        (DataSpec("image", (1, 2, 2), None), torch.tensor([[[[-3.0, 7.0], [7.0, -3.0]]]])),
        (DataSpec("image", (1, 2, 2), 256), torch.tensor([[[[-4.0, 255.0], [300.0, 0.4]]]])),
    ],
)
def test_levels_are_spread_from_black_to_white(spec: DataSpec, x: Tensor):
    shown = drawing.pictures(x, spec)
    assert shown.shape == (1, 3, 2, 2)
    assert shown[0, 0].tolist() == [[0, 255], [255, 0]]


def test_a_display_of_ones_own_is_used():
    shown = drawing.pictures(
        torch.zeros(2, 1, 4, 4), IMAGES, lambda x: torch.full((len(x), 1, 5, 5), 77).to(torch.uint8)
    )
    assert shown.shape == (2, 3, 5, 5)
    assert (shown == 77).all()


def test_codes_have_colours_of_their_own():
    x = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    shown = drawing.pictures(x, DataSpec("codes", (4, 4), 16))
    assert len(shown[0].flatten(1).T.unique(dim=0)) == 16
    line = drawing.pictures(torch.arange(16)[None], DataSpec("codes", (16,), 16))
    assert line.shape == (1, 3, 1, 16)


def test_a_tone_lies_where_its_frequency_is():
    """An eighth of the sampling rate: a quarter of the way up to Nyquist. The wave fills its frame, and next to one
    that is `factor` times as loud it is enlarged by no more than `LOUDER`."""
    t = torch.arange(4096)
    tone, factor = 0.5 * torch.sin(2 * torch.pi * t / 8), 2 * drawing.LOUDER
    both = torch.stack([tone, tone / factor])
    shown = drawing.pictures(both, DataSpec("audio", (4096,), None), lambda x: x).float().sum(1)
    height = drawing.WAVE[0]
    for one, half in zip(shown, (height / 2, height / 4), strict=True):
        brightest = one[height:].mean(1).argmax().item()
        assert brightest == pytest.approx(drawing.SPECTRUM * (1 - 0.25), abs=1.5)
        drawn = (one[:height] < 3 * 255).any(1).nonzero()[:, 0]
        assert drawn.min().item() == pytest.approx(height / 2 - half, abs=1.5)
        assert drawn.max().item() == pytest.approx(height / 2 + half - 1, abs=1.5)


def test_bytes_depend_on_the_input_alone():
    x = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8)
    chart = [("top", torch.tensor([1.0, 2.0]))]
    for make in (lambda: drawing.grid(drawing.pictures(x, GREY), 2), lambda: drawing.bars(chart, "x", "y", 1.0)):
        first, second = make(), make()
        assert first == second
        assert not Image.open(io.BytesIO(first)).info.keys() & {"Software", "Creation Time", "date:create"}


def test_interpolations_run_between_two_reconstructions():
    model, batch, steps = Everything(), images(40), 7
    shown = interpolations.interpolations(model, batch, IMAGES, None, steps=steps).shown
    assert shown.shape == (8, steps, 3, 4, 4)
    left = shown[0, :, 0, 0, 0].int().tolist()
    ends = model.decode(model.posterior(batch.x[:1]).mean)[0, 0, 0, 0].item()
    assert left[0] == pytest.approx(ends, abs=1)
    # A line between latents is a line in this model's pictures: equal steps, up to rounding.
    assert np.abs(np.diff(left) - (left[-1] - left[0]) / (steps - 1)).max() <= 1


def test_draws_are_joined_along_the_sphere():
    a, b = torch.randn(2, 50, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    for t in (0.0, 0.3, 0.5, 1.0):
        between = interpolations._slerp(a, b, t)
        assert torch.allclose(between.norm(dim=1), torch.ones(2, dtype=torch.float64))
        angle = torch.arccos((a * b).sum(1))
        assert torch.allclose(torch.arccos((a * between).sum(1).clamp(-1, 1)), t * angle, atol=1e-6)


def test_traversals_vary_the_dimensions_of_the_greatest_kl_first():
    model, batch = Everything(), images(8)
    drawn = figures.traversals(model, batch, IMAGES, None, torch.tensor([0.1, 5.0]))
    assert drawn is not None
    assert "dimensions 1, 0" in drawn[1]
    sheet, side, gap = pixels(drawn[0]), 64, drawing.GAP
    first_row = sheet[gap : gap + side]
    lefts, rights = first_row[0, gap :: side + gap], first_row[0, gap + side - 1 :: side + gap]
    assert len(np.unique(lefts, axis=0)) == 1  # latent 1 is the right half
    assert len(np.unique(rights, axis=0)) > 2


def test_receptive_fields_are_the_columns_of_the_matrix():
    spec = DataSpec("image", (1, 2, 2), 2)

    class Units(Blank, HasReceptiveFields):
        def receptive_fields(self) -> Tensor:
            weight = torch.zeros(4, 3)
            weight[1, 2], weight[0, 0], weight[:, 1] = -2.0, 1.0, 0.1
            return weight.T.unflatten(1, (1, 2, 2))

    drawn = figures.receptive_fields(Units(spec), spec, 2)
    assert drawn is not None
    sheet = pixels(drawn[0]).astype(int)
    side, gap = 64, drawing.GAP
    tile = sheet[gap : gap + side, gap : gap + side]  # the longest column: −2 at the top right
    assert tile[4, 60, 2] > tile[4, 60, 0] + 50  # blue
    second = sheet[gap : gap + side, 2 * gap + side : 2 * gap + 2 * side]
    assert second[4, 4, 0] > second[4, 4, 2] + 50  # red
    assert figures.receptive_fields(Everything(), IMAGES, 2) is None


def test_neighbours_stand_beside_their_samples():
    train = images(30).x
    found = torch.tensor([[3, 4], [7, 1]])
    drawn = figures.neighbours(train[[3, 7]], train, found, IMAGES, None)
    assert drawn is not None
    sheet, side, gap = pixels(drawn[0]), 64, drawing.GAP
    query, first = (
        sheet[gap : gap + side, gap : gap + side],
        sheet[gap : gap + side, 6 * gap + side : 6 * gap + 2 * side],
    )
    assert np.array_equal(query, first)


def test_vectors_of_many_coordinates_are_histograms():
    spec = DataSpec("vector", (5,), None)
    drawn = figures.plane(Everything(), torch.randn(50, 5), torch.randn(40, 5), spec)
    assert drawn is not None
    assert pixels(drawn[0]).std() > 10  # something is on the paper
    assert figures.tiled(torch.randn(4, 5), spec, 2, None, "x") is None


def test_by_class_has_a_row_a_class():
    batch = Batch(images(12).x)
    drawn = figures.by_class(batch.x, 3, IMAGES, None)
    assert drawn is not None
    assert pixels(drawn[0]).shape[0] == 3 * (64 + drawing.GAP) + drawing.GAP


@pytest.mark.parametrize("name", ["rbm", "dbm", "dbn", "nvil", "vae"])
def test_models_name_the_weights_of_their_units(name: str):
    """What a unit of the first hidden layer gains, or a belief net's pixel, where the other is lit."""
    spec = DataSpec("image", (1, 2, 3), 2, 2)
    torch.manual_seed(0)
    model_class = CATALOG[name]
    model = model_class(model_class.tiny(spec)[0], spec).double()
    assert isinstance(model, HasReceptiveFields)
    fields = model.receptive_fields()
    assert fields is not None
    assert fields.shape[1:] == spec.shape
    flat, off, on = fields.flatten(1), torch.zeros(1, 6).double(), torch.eye(6).double()
    if isinstance(model, RBM):
        gained = model.layer.hidden_input(on) - model.layer.hidden_input(off)
    elif isinstance(model, DeepMachine):
        gained = model.layer(0).hidden_input(on) - model.layer(0).hidden_input(off)
    elif isinstance(model, NVIL):
        units = torch.eye(len(flat)).double()
        gained = (model.generative.inputs(0, units) - model.generative.inputs(0, 0 * units)).T
    else:
        assert isinstance(model, VAE)
        first = model.encoder[0]  # pyright: ignore[reportIndexIssue]
        label = torch.zeros(1, first.in_features - 6).double()
        gained = first(torch.cat([on, label.expand(6, -1)], 1)) - first(torch.cat([off, label], 1))
    assert torch.allclose(gained.T, flat, atol=1e-12)  # float64 differences of numbers near one
