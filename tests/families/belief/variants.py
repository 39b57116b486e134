"""The ways of learning that are no model's `tiny`, each as a class, so that the contract's checks can be run over them
(and a second process can import them)."""

from __future__ import annotations

from typing import Any

from dgm_core.config import Recipe
from dgm_core.contract import DataSpec
from dgm_core.models.belief.base import Layered
from dgm_core.models.belief.helmholtz import Helmholtz
from dgm_core.models.belief.nvil import NVIL
from dgm_core.models.belief.sbn import SBN


def _changed(model: Any, data: DataSpec, **config: Any) -> tuple[Layered, Recipe]:
    usual, recipe = model.tiny(data)
    return usual.merged(config), recipe


class MeanField(SBN):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Any, Recipe]:
        return _changed(SBN, data, inference="mean_field", e_sweeps=4)


class Reweighted(Helmholtz):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Any, Recipe]:
        return _changed(Helmholtz, data, objective="rws", samples=3, recognition_turn="both")


class Vimco(NVIL):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Any, Recipe]:
        return _changed(NVIL, data, objective="vimco", samples=3)


class ControlVariate(NVIL):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Any, Recipe]:
        return _changed(NVIL, data, objective="control_variate", samples=2)


class Global(NVIL):
    """One signal for all layers."""

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Any, Recipe]:
        return _changed(NVIL, data, local_signals=False)


class Wide(NVIL):
    """Too many hidden units to enumerate."""

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Any, Recipe]:
        return _changed(NVIL, data, hidden=(12, 6))


VARIANTS = (MeanField, Reweighted, Vimco, ControlVariate, Global, Wide)
