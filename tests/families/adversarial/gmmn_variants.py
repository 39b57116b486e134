"""The objectives and spaces that are not `tiny`'s, as classes, so that the contract's checks can be run over them (and
a second process can import them)."""

from __future__ import annotations

from dgm_core.config import Recipe
from dgm_core.contract import DataSpec
from dgm_core.models.adversarial.gmmn import GMMN


class InCodes(GMMN):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[GMMN.Config, Recipe]:
        config, recipe = GMMN.tiny(data)
        return config.merged({"space": "code"}), recipe.merged({"steps": 400})


class Unbiased(GMMN):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[GMMN.Config, Recipe]:
        config, recipe = GMMN.tiny(data)
        return config.merged({"estimator": "unbiased", "root": False}), recipe
