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
_OPTIONS: dict[str, dict[str, Any]] = {  # density -> its options and their defaults
    "eight_gaussians": {"modes": 8, "radius": 4.0, "sd": 0.5, "divide": 1.414},  # Grathwohl et al. 2019
    "ring": {"modes": 8, "radius": 2.0, "sd": 0.02},  # Gulrajani et al. 2017
    "grid": {"side": 5, "spacing": 2.0, "sd": 0.05},
    "checkerboard": {},
    "moons": {"noise": 0.1, "scale": 1.0},
    "banana": {},
    "u1": {}, "u2": {}, "u3": {}, "u4": {},
}  # fmt: skip


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
        plan = Plan(spec=DataSpec("vector", (2,), None))
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
        known = _OPTIONS[self.density]
        every = {name for options in _OPTIONS.values() for name in options}
        given = {name: value for name in every if (value := getattr(self, name)) is not None}
        strange = sorted(given.keys() - known.keys())
        if strange:
            told = ", ".join(known) or "none"
            raise DataMismatch(f"density {self.density!r} has no option {strange[0]!r}; its options: {told}")
        o = {**known, **given}
        match self.density:
            case "eight_gaussians":
                return densities.Mixture(densities.circle(o["modes"], o["radius"] / o["divide"]), o["sd"] / o["divide"])
            case "ring":
                return densities.Mixture(densities.circle(o["modes"], o["radius"]), o["sd"])
            case "grid":
                return densities.Mixture(densities.grid(o["side"], o["spacing"]), o["sd"])
            case "checkerboard":
                return densities.Checkerboard()
            case "moons":
                return densities.Moons(o["noise"], o["scale"])
            case "banana":
                return densities.Banana()
        return densities.Energy(int(self.density[1]))
