"""scikit-learn's handwritten digits (1,797 of 8 × 8), embedded: no file, no network."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from dgm_core.contract import DataSpec
from dgm_core.data.sources.base import Arrays, Map, Part, Plan, Source


class Digits(Source):
    source: Literal["digits"] = "digits"
    size: int = Field(16, ge=8, le=256, description="height and width after bicubic resizing")

    def plan(self, *, seed: int, map: Map = map, deep: bool = False) -> Plan:  # noqa: A002
        plan = Plan(class_names=[str(digit) for digit in range(10)])
        self.embedded(plan)
        count = len(_digits()[0])
        plan.parts = [Part(None, count, None)]
        plan.spec = DataSpec("image", (1, self.size, self.size), 256, classes=10)
        plan.lines.append(f"{count} grey images of {self.size}×{self.size}, embedded in scikit-learn")
        return plan

    def decode(self, payload: Any) -> Arrays:
        images, labels = _digits()
        pictures = [Image.fromarray(image) for image in images]
        resized = [p.resize((self.size, self.size), Image.Resampling.BICUBIC) for p in pictures]
        x = np.stack([np.asarray(p) for p in resized])[:, None] * (255 / 16)
        return Arrays(x.round().clip(0, 255).astype(np.uint8), labels)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) float32 in 0 … 16, and labels."""
    from sklearn.datasets import load_digits  # here: it takes a second, and every stage imports the sources

    x, y = load_digits(return_X_y=True)
    return np.asarray(x, np.float32).reshape(-1, 8, 8), np.asarray(y, np.int64)
