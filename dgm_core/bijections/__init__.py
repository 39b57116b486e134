"""Invertible maps that know their Jacobian's determinant."""

from dgm_core.bijections.base import Bijection, Chain, Context, no_log_det, promote, steer
from dgm_core.bijections.coupling import (
    BoundedAffine,
    ChannelCoupling,
    MaskedCoupling,
    Transformer,
    alternating_mask,
    checkerboard_mask,
    half_mask,
)
from dgm_core.bijections.elementwise import BatchNormalization, ScaledLogit, Standardize
from dgm_core.bijections.squeeze import FactorOut, Flatten, Squeeze

__all__ = [
    "BatchNormalization",
    "Bijection",
    "BoundedAffine",
    "Chain",
    "ChannelCoupling",
    "Context",
    "FactorOut",
    "Flatten",
    "MaskedCoupling",
    "ScaledLogit",
    "Squeeze",
    "Standardize",
    "Transformer",
    "alternating_mask",
    "checkerboard_mask",
    "half_mask",
    "no_log_det",
    "promote",
    "steer",
]
