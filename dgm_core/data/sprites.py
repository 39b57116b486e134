"""Pictures of one white shape on black whose factors of variation are known, one picture for every combination.

The factors are those of I. Higgins et al.'s 2DShapes (2017): shape, scale, rotation and the two coordinates. A quarter
of a turn is shared out over the rotations, so that no two of them look alike, the square's included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

SHAPES = ("square", "ellipse", "triangle")
FACTORS = ("shape", "scale", "rotation", "x", "y")
SAMPLES = 4  # of a pixel's side: a grey is the share of them that lie within
REACH = 0.45  # of a shape's middle to either side; half a picture is 1
RADII = (0.2, 0.4)  # so that no shape is cut off
AT_ONCE = 64  # pictures: their samples are held in memory


@dataclass(frozen=True)
class Sprites:
    """How many values each factor takes, and the pictures of their combinations."""

    size: int = 32  # pixels of a side
    scales: int = 4
    rotations: int = 6
    positions: int = 8  # along either axis

    @property
    def counts(self) -> tuple[int, ...]:
        """Of the values of FACTORS, in that order."""
        return len(SHAPES), self.scales, self.rotations, self.positions, self.positions

    def __len__(self) -> int:
        return math.prod(self.counts)

    def factors(self, index: np.ndarray) -> np.ndarray:
        """(n,) numbers of combinations, in which the last factor changes fastest -> (n, 5) numbers of values."""
        return np.stack(np.unravel_index(index, self.counts), 1)

    def draw(self, factors: np.ndarray) -> np.ndarray:
        """(n, 5) numbers of values -> (n, 1, size, size) uint8."""
        factors = np.asarray(factors, np.int64)
        return np.concatenate([self._draw(factors[i : i + AT_ONCE]) for i in range(0, len(factors), AT_ONCE)])

    def _draw(self, factors: np.ndarray) -> np.ndarray:
        shape, scale, rotation, x, y = factors.T[..., None, None]
        axis = (np.arange(self.size * SAMPLES) + 0.5) / (self.size * SAMPLES) * 2 - 1
        u = axis[None, None, :] - _spread(x, self.positions, -REACH, REACH)
        v = axis[None, :, None] - _spread(y, self.positions, -REACH, REACH)
        angle = rotation * (0.5 * math.pi / self.rotations)
        radius = _spread(scale, self.scales, *RADII)
        a = (np.cos(angle) * u + np.sin(angle) * v) / radius
        b = (np.cos(angle) * v - np.sin(angle) * u) / radius
        inside = np.choose(np.broadcast_to(shape, a.shape), [_square(a, b), _ellipse(a, b), _triangle(a, b)])
        tiles = inside.reshape(len(inside), self.size, SAMPLES, self.size, SAMPLES)
        return (tiles.mean((2, 4)) * 255).round().astype(np.uint8)[:, None]


def _spread(value: Any, count: int, low: float, high: float) -> Any:
    """Number `value` of so many even steps from low to high; the middle where there is but one."""
    return 0.5 * (low + high) if count == 1 else low + (high - low) * value / (count - 1)


def _square(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(a), np.abs(b)) < 0.8


def _ellipse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a**2 + (2 * b) ** 2 < 1


def _triangle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equilateral, its corners on the unit circle."""
    facing = [math.cos(k) * a + math.sin(k) * b for k in (math.pi / 3, math.pi, -math.pi / 3)]
    return np.maximum.reduce(facing) < 0.5
