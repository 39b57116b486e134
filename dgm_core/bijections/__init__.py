"""Invertible maps that know their Jacobian's determinant."""

from dgm_core.bijections.actnorm import ActNorm, ActNormConv2d, StartsFromData, starting
from dgm_core.bijections.autoregressive import Autoregressive, GatedAffine, Invert, SoftAffine
from dgm_core.bijections.base import Bijection, Chain, Context, no_log_det, steer
from dgm_core.bijections.convolution import (
    InvertibleConvolution,
    LUConvolution,
    NormalizedConvolution,
    PlainConvolution,
)
from dgm_core.bijections.coupling import (
    Additive,
    BoundedAffine,
    ChannelCoupling,
    MaskedCoupling,
    SigmoidAffine,
    SplitCoupling,
    Transformer,
    alternating_mask,
    alternating_parts,
    checkerboard_mask,
    half_mask,
    half_parts,
)
from dgm_core.bijections.dequantization import Dequantizer, UniformDequantizer, VariationalDequantizer
from dgm_core.bijections.elementwise import BatchNormalization, DiagonalAffine, Rescale, ScaledLogit, Standardize
from dgm_core.bijections.memory import DeepChain, Memory
from dgm_core.bijections.permutation import Permutation, Reverse
from dgm_core.bijections.planar import Planar, planar, planar_inverse
from dgm_core.bijections.radial import Radial, radial, radial_inverse
from dgm_core.bijections.squeeze import FactorOut, Flatten, SplitPrior, Squeeze

__all__ = [
    "ActNorm",
    "ActNormConv2d",
    "Additive",
    "Autoregressive",
    "BatchNormalization",
    "Bijection",
    "BoundedAffine",
    "Chain",
    "ChannelCoupling",
    "Context",
    "DeepChain",
    "Dequantizer",
    "DiagonalAffine",
    "FactorOut",
    "Flatten",
    "GatedAffine",
    "Invert",
    "InvertibleConvolution",
    "LUConvolution",
    "MaskedCoupling",
    "Memory",
    "NormalizedConvolution",
    "Permutation",
    "PlainConvolution",
    "Planar",
    "Radial",
    "Rescale",
    "Reverse",
    "ScaledLogit",
    "SigmoidAffine",
    "SoftAffine",
    "SplitCoupling",
    "SplitPrior",
    "Squeeze",
    "Standardize",
    "StartsFromData",
    "Transformer",
    "UniformDequantizer",
    "VariationalDequantizer",
    "alternating_mask",
    "alternating_parts",
    "checkerboard_mask",
    "half_mask",
    "half_parts",
    "no_log_det",
    "planar",
    "planar_inverse",
    "radial",
    "radial_inverse",
    "starting",
    "steer",
]
