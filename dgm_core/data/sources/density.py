"""Two-dimensional densities with known entropy, drawn exactly (see `dgm_core.data.densities`)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.data import densities
from dgm_core.data.shards import SPLITS
from dgm_core.data.sources.base import Amount, Arrays, Map, Part, Plan, Source

_PART = 50_000


class DensitySource(Source):
    source: Literal["density"] = "density"
    density: Literal["eight_gaussians", "ring", "grid", "checkerboard", "moons", "banana", "u1", "u2", "u3", "u4"]
    train: int = Field(50_000, ge=1, description="examples")
    val: Amount = Field(10_000, ge=1, description="examples")
    test: Amount = Field(10_000, ge=1, description="examples")
    modes: int | None = Field(None, ge=1)
    radius: float | None = Field(None, ge=0)
    sd: float | None = Field(None, gt=0)
    divide: float | None = Field(None, gt=0)
    side: int | None = Field(None, ge=1)
    spacing: float | None = Field(None, gt=0)
    noise: float | None = Field(None, ge=0.01)
    scale: float | None = Field(None, gt=0)

    def plan(self, *, seed: int, map: Map = map, deep: bool = False) -> Plan:  # noqa: A002
        plan = Plan(spec=DataSpec("vector", (2,), None, density={"name": self.density, **self._options()}))
        self.embedded(plan)
        try:
            density = self.build()
        except DataMismatch as problem:
            plan.problems.append(str(problem))
            return plan
        facts = {"name": self.density, "entropy": density.entropy(), **density.facts()}
        plan.facts["density"] = facts
        plan.lines.append(f"{self.density}: entropy {facts['entropy']:.4f} nats")
        for split, count in zip(SPLITS, (self.train, self.val, self.test), strict=True):
            for start in range(0, int(count), _PART):
                size = min(_PART, int(count) - start)
                plan.parts.append(Part(split, size, (size, (seed, SPLITS.index(split), start))))
        return plan

    def decode(self, payload: Any) -> Arrays:
        size, key = payload
        return Arrays(self.build().sample(size, np.random.default_rng(key)).astype(np.float32))

    def build(self) -> densities.Density:
        """The density, with this configuration's options."""
        return densities.named(self.density, **self._options())

    def _options(self) -> dict[str, Any]:
        every = {name for options in densities.OPTIONS.values() for name in options}
        return {name: value for name in sorted(every) if (value := getattr(self, name)) is not None}
