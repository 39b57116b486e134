"""The forms that are not `tiny`'s, as classes, so that the contract's checks can be run over them (and a second process
can import them)."""

from __future__ import annotations

from dgm_core.config import Recipe
from dgm_core.contract import DataSpec
from dgm_core.models.adversarial.predictability import Predictability


class Semilinear(Predictability):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Predictability.Config, Recipe]:
        config, recipe = Predictability.tiny(data)
        field = 5.0 if data.kind == "image" else None
        return config.merged({"networks": "semilinear", "receptive_field": field}), recipe


class AllTerms(Predictability):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Predictability.Config, Recipe]:
        config, recipe = Predictability.tiny(data)
        return config.merged({"conditioned_variance": 0.5, "variance": 1.0, "predictability": 1.0}), recipe
