"""Drawn shapes: each factor does what its name says, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from dgm_core.contract import DataMismatch
from dgm_core.data.sources import parse
from dgm_core.data.sprites import FACTORS, RADII, REACH, SAMPLES, SHAPES, Sprites
from tests.data.builders import everything, prepared

DRAWN = Sprites(size=32, scales=3, rotations=4, positions=3)


def pictures(**values: int) -> np.ndarray:
    """(n, size, size) in [0, 1]: all combinations in which these factors have these values."""
    every = DRAWN.factors(np.arange(len(DRAWN)))
    kept = np.all([every[:, FACTORS.index(name)] == value for name, value in values.items()], axis=0)
    return DRAWN.draw(every[kept])[:, 0] / 255


@pytest.mark.parametrize(("shape", "unit"), [(0, 1.6**2), (1, np.pi / 2), (2, 3**1.5 / 4)])
def test_areas_are_those_of_the_shapes(shape, unit):
    """In units of the radius: a square of 1.6, an ellipse of 1 and ½, a triangle in a circle of 1."""
    large = Sprites(size=64, scales=2, rotations=4, positions=1)
    every = large.factors(np.arange(len(large)))
    for scale, radius in enumerate(RADII):
        chosen = every[(every[:, 0] == shape) & (every[:, 1] == scale)]
        area = (large.draw(chosen) / 255).sum((1, 2, 3))
        expected = unit * (radius * 32) ** 2  # half a side is 32 pixels
        # Along an edge a shape may be a sample longer or shorter than it is, of four in a pixel.
        assert np.abs(area / expected - 1).max() < 2 / (SAMPLES * radius * 32)


def test_positions_move_the_middle_and_nothing_else():
    for shape in range(len(SHAPES)):
        middle = (np.arange(32) + 0.5) / 16 - 1
        for x in range(3):
            picture = pictures(shape=shape, x=x)
            whole = picture.sum((1, 2))
            across = (picture.sum(1) * middle).sum(1) / whole
            assert np.abs(across - REACH * (x - 1)).max() < 0.02  # a third of a pixel, 1/16
        for y in range(3):
            picture = pictures(shape=shape, y=y)
            down = (picture.sum(2) * middle).sum(1) / picture.sum((1, 2))
            assert np.abs(down - REACH * (y - 1)).max() < 0.02


def test_rotations_turn_the_axes_by_a_share_of_a_quarter():
    """The ellipse's long axis, by second moments, starts along x and turns towards y."""
    picture = pictures(shape=1, scale=2, x=1, y=1)
    u, v = np.meshgrid(np.arange(32) - 15.5, np.arange(32) - 15.5)
    m = [(picture * w).sum((1, 2)) for w in (u * u - v * v, 2 * u * v)]
    angle = 0.5 * np.degrees(np.arctan2(m[1], m[0]))
    np.testing.assert_allclose(angle, [0, 22.5, 45, 67.5], atol=1)


def test_no_two_combinations_look_alike_and_none_is_cut_off():
    for drawn in (DRAWN, Sprites(positions=2)):  # the latter has the usual scales and rotations
        x = drawn.draw(drawn.factors(np.arange(len(drawn))))
        assert len(x) == len(drawn) == np.prod(drawn.counts)
        assert len({picture.tobytes() for picture in x}) == len(x)
        assert x.dtype == np.uint8
        assert not x[:, 0, [0, -1]].any()
        assert not x[:, 0, :, [0, -1]].any()


def test_numbers_of_combinations_are_in_order():
    every = DRAWN.factors(np.arange(len(DRAWN)))
    assert [tuple(row) for row in every[:4]] == [(0, 0, 0, 0, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 2), (0, 0, 0, 1, 0)]
    assert tuple(every[-1]) == tuple(c - 1 for c in DRAWN.counts)


def test_the_source_holds_every_combination_once(tmp_path: Path):
    dataset = prepared(tmp_path / "d", source="sprites", size=16, scales=2, rotations=2, positions=3)
    drawn = Sprites(16, 2, 2, 3)
    factors = drawn.factors(np.arange(len(drawn)))
    expected = sorted((x.tobytes(), int(f[0])) for x, f in zip(drawn.draw(factors), factors, strict=True))
    batch = everything(dataset)
    assert batch.y is not None
    assert sorted((x.numpy().tobytes(), int(y)) for x, y in zip(batch.x, batch.y, strict=True)) == expected
    assert dataset.info["factors"] == {"shape": 3, "scale": 2, "rotation": 2, "x": 3, "y": 3}
    assert dataset.info["class_names"] == list(SHAPES)


def test_the_source_refuses_what_it_cannot_draw(tmp_path: Path):
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        parse({"source": "sprites", "scales": 0})
    with pytest.raises(DataMismatch, match="comes from no file"):
        prepared(tmp_path / "d", source="sprites", path="somewhere")
