"""Shapes drawn from known factors of variation, one picture for every combination: no file, no network."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from dgm_core.contract import DataSpec
from dgm_core.data import sprites
from dgm_core.data.sources.base import Arrays, Map, Part, Plan, Source, chunks

_PART = 500  # pictures drawn at once


class SpriteSource(Source):
    source: Literal["sprites"] = "sprites"
    size: int = Field(32, ge=8, le=128, description="height and width")
    scales: int = Field(4, ge=1, description="sizes of a shape")
    rotations: int = Field(6, ge=1, description="angles, over a quarter of a turn")
    positions: int = Field(8, ge=1, description="along either axis")

    def plan(self, *, seed: int, map: Map = map, deep: bool = False) -> Plan:  # noqa: A002
        plan = Plan(class_names=list(sprites.SHAPES))
        self.embedded(plan)
        drawn = self.build()
        plan.spec = DataSpec("image", (1, self.size, self.size), 256, classes=len(sprites.SHAPES))
        plan.parts = [Part(None, len(part), (part[0], part[-1] + 1)) for part in chunks(range(len(drawn)), _PART)]
        plan.facts["factors"] = dict(zip(sprites.FACTORS, drawn.counts, strict=True))
        plan.lines.append(f"{len(drawn)} grey images of {self.size}×{self.size}, every combination of factors")
        return plan

    def decode(self, payload: Any) -> Arrays:
        drawn = self.build()
        factors = drawn.factors(np.arange(*payload))
        return Arrays(drawn.draw(factors), factors[:, 0].astype(np.int64))

    def build(self) -> sprites.Sprites:
        """The pictures, with this configuration's numbers of values."""
        return sprites.Sprites(self.size, self.scales, self.rotations, self.positions)
