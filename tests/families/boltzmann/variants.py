"""Ways of learning an RBM that are no `tiny`, each as a class, so that the contract's checks can be run over them (and
a second process can import them)."""

from __future__ import annotations

from typing import Any

from dgm_core.config import Recipe
from dgm_core.contract import DataSpec
from dgm_core.models.boltzmann.rbm import RBM


def _changed(data: DataSpec, **config: Any) -> tuple[RBM.Config, Recipe]:
    usual, recipe = RBM.tiny(data)
    return usual.merged(config), recipe


class Tempered(RBM):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[RBM.Config, Recipe]:
        return _changed(data, negative="tempering", temperatures=4)


class Sparse(RBM):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[RBM.Config, Recipe]:
        return _changed(data, sparsity_cost=0.01, sparsity_target=0.3, weight_cost=1e-3)


class Diverging(RBM):
    """CD, whose samples start at the data."""

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[RBM.Config, Recipe]:
        return _changed(data, negative="cd")


VARIANTS = (Tempered, Sparse, Diverging)
