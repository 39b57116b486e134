"""Figures of densities and of inverses: heat maps beside the truth, temperatures, paths between examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_core.capabilities import HasDecoder, HasInverse, HasLikelihood
from dgm_core.contract import DataSpec
from dgm_core.evaluation import drawing, figures, interpolations
from dgm_core.evaluation.examples import take
from dgm_core.models.latent.ppca import PPCA
from tests.evaluation.handmade import IMAGES, Blank, images
from tests.evaluation.test_figures import pixels


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `scatters` was given last."""
    given: dict[str, Any] = {}

    def remember(panels, box, heats=()):
        given.update(panels=panels, box=box, heats=heats)
        return b"drawn"

    monkeypatch.setattr(figures, "scatters", remember)
    return given


def peak(heat: Tensor, box: tuple[float, float, float, float]) -> tuple[float, float]:
    left, right, bottom, top = box
    row, column = divmod(int(heat.argmax()), figures.SIDE)  # rows go up, columns to the right
    return (left + (right - left) * column / (figures.SIDE - 1), bottom + (top - bottom) * row / (figures.SIDE - 1))


def gaussian(spec: DataSpec) -> PPCA:
    """N((1, −2), e⁻³ I)."""
    model = PPCA(PPCA.Config(latents=1), spec)
    model.mean.copy_(torch.tensor([1.0, -2.0]))
    model.weight.zero_()
    model.log_variance.fill_(-3.0)
    return model


def test_density_has_its_peak_at_the_mode(seen: dict[str, Any]):
    model = gaussian(DataSpec("vector", (2,), None))
    real = torch.randn(200, 2) * 2
    figures.plane(model, real, model.sample(50), model.data)
    assert [name for name, _ in seen["heats"]] == ["the model's density"]
    assert peak(seen["heats"][0][1], seen["box"]) == pytest.approx((1.0, -2.0), abs=0.1)
    assert seen["heats"][0][1].max() == 1
    assert [name for name, _ in seen["panels"]] == ["data", "samples"]
    assert torch.equal(seen["panels"][0][1], real[:50].double())  # as many as there are samples


def test_the_true_density_stands_beside_in_the_same_colours(seen: dict[str, Any]):
    """Heat is the density over the truth's greatest one, so that a model twice as flat is half as bright."""
    truth = {"name": "ring", "modes": 1, "radius": 0.0, "sd": 0.1}
    model = gaussian(DataSpec("vector", (2,), None, density=truth))
    model.mean.zero_()
    model.log_variance.fill_(2 * math.log(0.1 * math.sqrt(2)))
    drawn = figures.plane(model, 0.1 * torch.randn(200, 2), model.sample(50), model.data)
    assert drawn is not None
    assert "in the same colours" in drawn[1]
    (first, true), (second, modelled) = seen["heats"]
    assert (first, second) == ("the true density", "the model's density")
    # Between two points of the grid the peak is missed by less than a part in a thousand.
    assert modelled.max().item() == pytest.approx(0.5, abs=1e-3)
    left, right, bottom, top = seen["box"]
    x = torch.cartesian_prod(
        torch.linspace(bottom, top, figures.SIDE), torch.linspace(left, right, figures.SIDE)
    ).double()
    expected = torch.exp(-0.5 * x.square().sum(1) / 0.01).view(figures.SIDE, figures.SIDE)
    assert torch.allclose(true, expected, atol=1e-3)


def test_an_unnormalised_truth_is_drawn_as_the_energy_says(seen: dict[str, Any]):
    """exp(−U), over its greatest value, whatever log Z is; a model without a density leaves it alone."""
    model = Blank(DataSpec("vector", (2,), None, density={"name": "u2"}))
    figures.plane(model, torch.tensor([[-4.0, -2.0], [4.0, 2.0]]), torch.randn(9, 2), model.data)
    ((name, heat),) = seen["heats"]
    assert name == "the true density"
    assert heat.max() == 1
    left, right, bottom, top = seen["box"]
    column = round((1.0 - left) / (right - left) * (figures.SIDE - 1))  # U₂'s ridge at z₁ = 1 lies at z₂ = 1
    row = int(heat[:, column].argmax())
    assert bottom + (top - bottom) * row / (figures.SIDE - 1) == pytest.approx(1.0, abs=0.05)


def test_a_conditional_models_density_is_the_mixture_of_its_labels(seen: dict[str, Any]):
    """N((±2, 0), I) by label, in shares of 3 : 1."""

    class ByLabel(Blank, HasLikelihood):
        exact = True

        def log_prob(
            self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
        ) -> Tensor:
            assert y is not None
            centre = torch.stack([2.0 - 4.0 * y, torch.zeros(len(y))], 1)
            return -0.5 * (x - centre).square().sum(1)

    model = ByLabel(DataSpec("vector", (2,), None, classes=2, class_shares=(0.75, 0.25)))
    real = torch.tensor([[-4.0, -2.0], [4.0, 2.0]])
    figures.plane(model, real, torch.randn(9, 2), model.data, by_labels=True)
    ((_, heat),) = seen["heats"]
    assert peak(heat, seen["box"]) == pytest.approx((2.0, 0.0), abs=0.05)
    left = heat[:, : figures.SIDE // 2]
    # Two centres four standard deviations apart add e⁻⁸ to each other; the grid misses a peak by as little.
    assert left.max().item() == pytest.approx(1 / 3, abs=2e-3)


class Shift(Blank, HasDecoder, HasInverse):
    """z = x − 20 y, pixel by pixel."""

    def to_latent(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        return x.flatten(1).float() - 20 * y[:, None]

    def inverse_error(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.zeros(len(x))

    def draw_latent(self, n: int) -> Tensor:
        raise AssertionError("the ends are test examples")

    def decode(self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        assert y is not None
        return (z + 20 * y[:, None]).view(-1, 1, 4, 4)

    def sample(
        self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, temperature: float = 1.0
    ) -> Tensor:
        return (128 + 20 * temperature * torch.randn(n, *self.data.shape)).clamp(0, 255).to(self.data.dtype)


def corners(sheet: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The upper left pixel of each picture of 4 × 4."""
    at = drawing.GAP + (64 + drawing.GAP) * np.arange(max(rows, columns)) + 8
    return sheet[at[:rows, None], at[None, :columns], 0].astype(int)


@pytest.mark.parametrize("by_labels", [False, True])
def test_interpolations_by_an_inverse_run_between_test_examples(by_labels: bool):
    batch = images(40)
    drawn = interpolations.interpolations(Shift(), batch, IMAGES, None, by_labels=by_labels)
    assert "along the sphere between their latents" in drawn.caption
    # By labels one row a class: an end of another class would not be reproduced.
    one_a_class = batch.rows(torch.tensor([0, 1, 38, 39]))
    ends = one_a_class if by_labels else take(iter([batch]), 2 * interpolations.ROWS)
    rows = len(ends.x) // 2
    shown, stored = drawn.shown[:, :, 0, 0, 0].int().numpy(), ends.x[:, 0, 0, 0].int().numpy()
    assert len(shown) == rows
    # Great-circle arithmetic in float32 on pixels of up to 255, cut to whole levels.
    assert np.abs(shown[:, 0] - stored[:rows]).max() <= 1
    assert np.abs(shown[:, -1] - stored[rows:]).max() <= 1


def test_the_same_latents_are_drawn_at_three_temperatures(seen: dict[str, Any]):
    spec = DataSpec("vector", (2,), None)

    def draw_at(temperature: float) -> Tensor:
        torch.manual_seed(0)
        return temperature * torch.randn(30, 2)

    real = torch.tensor([[-2.0, -1.0], [2.0, 1.0]])
    drawn = figures.temperatures(Shift(spec), draw_at, real, spec, 3, None)
    assert drawn == (b"drawn", "The same draws of the latent at temperatures 0.7, 0.85, 1")
    assert [name for name, _ in seen["panels"]] == ["temperature 0.7", "temperature 0.85", "temperature 1"]
    assert seen["box"] == pytest.approx((-2.6, 2.6, -1.3, 1.3))
    assert torch.allclose(seen["panels"][0][1], 0.7 * seen["panels"][2][1])

    assert figures.temperatures(Blank(spec), draw_at, real, spec, 3, None) is None  # takes no temperature
    flat = DataSpec("vector", (5,), None)
    assert figures.temperatures(Shift(flat), draw_at, real, flat, 3, None) is None  # is not on the plane


def test_images_at_three_temperatures_are_three_blocks_under_their_names():
    def draw_at(temperature: float) -> Tensor:
        return torch.full((6, 1, 4, 4), round(100 * temperature), dtype=torch.uint8)

    drawn = figures.temperatures(Shift(), draw_at, images(4).x, IMAGES, 3, None)
    assert drawn is not None
    sheet, block = pixels(drawn[0]), drawing.HEADING + 2 * (64 + drawing.GAP) + drawing.GAP
    assert sheet.shape[:2] == (3 * block, 3 * (64 + drawing.GAP) + drawing.GAP)
    for i, grey in enumerate((70, 85, 100)):
        name, below = np.split(sheet[i * block : (i + 1) * block], [drawing.HEADING])
        assert (corners(below, 2, 3) == grey).all()
        assert name.min() < 100  # something is written
        assert name.max() == 255
    headings = sheet.reshape(3, block, *sheet.shape[1:])[:, : drawing.HEADING]
    assert not np.array_equal(headings[0], headings[1])


@pytest.mark.parametrize("box", [(-6.0, 6.0, -3.0, 3.0), (-1.0, 1.0, -1.0, 1.0)])
def test_a_sheet_of_planes_is_as_tall_as_its_frames(box: tuple[float, float, float, float]):
    heat = torch.eye(8)
    points = torch.zeros(1, 2)
    side_by_side = pixels(drawing.scatters([("a", points), ("b", points), ("c", points)], box))
    square = pixels(drawing.scatters([("a", points), ("b", points)], box, [("c", heat), ("d", heat)]))
    assert square.shape[1] == pytest.approx(2 / 3 * side_by_side.shape[1], abs=2)
    assert square.shape[0] == pytest.approx(2 * side_by_side.shape[0], abs=2)
    # Paper outside the frames is a small part: the rest of the heat's quarters is coloured.
    upper = square[: square.shape[0] // 2].astype(int)
    coloured = (upper.max(2) - upper.min(2)) > 20
    assert coloured.mean() > 0.6
