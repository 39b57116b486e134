"""Back from a data set's variant to what it was made from: pictures, waveforms, and bits per dimension.

`info["transforms"]` lists what was done to the data, in order, with everything needed to undo it; `info["original"]`
is the spec from before. Written by `transforms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgm_core.contract import DataMismatch, DataSpec

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

_BINARY = ("static", "dynamic", "threshold")


def undo(x: Tensor, info: Mapping[str, Any]) -> Float[Tensor, " B *original"]:
    """In the original's units, float64 and smooth: levels (dequantised ones not rounded down), or its real numbers.

    A binarised value comes back as the lowest or highest level: what it was drawn from is not in it.
    """
    x = x.to("cpu", torch.float64)
    for record in reversed(info.get("transforms", ())):
        x = _undo(x, record)
    return x


def log_det(x: Tensor, info: Mapping[str, Any]) -> Float[Tensor, " B"]:
    """ln |det d stored / d original| of real-valued variants, float64; zero where nothing was stretched."""
    x = x.to("cpu", torch.float64)
    total = x.new_zeros(len(x))
    for record in reversed(info.get("transforms", ())):
        match record["name"]:
            case "standardize":
                total -= torch.log(_table(record, "sd", x)).expand_as(x).flatten(1).sum(1)
            case "dequantize":
                total -= math.log(record["levels"]) * x[0].numel()
            case "logit":
                inside = torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x)
                scale = math.log((1 - 2 * record["lam"]) / record["levels"])
                total += (scale - inside).flatten(1).sum(1)
        x = _undo(x, record)
    return total


def bits_per_dim(log_prob: Float[Tensor, " B"], x: Tensor, info: Mapping[str, Any]) -> Float[Tensor, " B"]:
    """Of the original integers, or of the levels that real numbers were made (µ-law), from nats of the stored data.

    For logit data this is −log p(z) / (D ln 2) − log₂(1 − 2λ) + 8 + mean_i[log₂ σ(z_i) + log₂(1 − σ(z_i))]
    (Papamakarios et al. 2017, appendix), for dequantised data (NLL / D + ln 256) / ln 2. With integer variants the
    volume term is zero. D counts the stored coordinates.
    """
    quantised = any(record["name"] == "mu_law" for record in info.get("transforms", ()))
    # Codes have no original: they are integers that were made of nothing else.
    if info.get("original", {"levels": 2})["levels"] is None and not quantised:
        raise DataMismatch("bits per dimension need data that was made of integers; report nats for real-valued data")
    return -(log_prob.to("cpu", torch.float64) + log_det(x, info)) / (x[0].numel() * math.log(2))


def to_display(x: Tensor, info: Mapping[str, Any]) -> UInt8[Tensor, " B C H W"]:
    """Pictures, from stored data, from samples, or from means in the data's units."""
    original = DataSpec.from_dict(info["original"])
    if original.kind not in ("image", "codes") or (original.kind == "codes" and len(original.shape) != 2):
        raise DataMismatch(
            f"{original.kind} of shape {original.shape} is no picture; images and 2-D codes can be shown"
        )
    grey = undo(x, info)
    if original.levels is None:
        low, high = info["range"]
        grey = (grey - low) / max(high - low, 1e-12) * 255
    else:
        if any(record["name"] in ("dequantize", "logit") for record in info["transforms"]):
            grey = grey.floor()
        grey = grey * (255 / (original.levels - 1))
    grey = grey.nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)
    return grey[:, None] if original.kind == "codes" else grey


def to_waveform(x: Tensor, info: Mapping[str, Any]) -> Float[Tensor, " B T"]:
    """Float32 in [−1, 1], to be played at `info["sample_rate"]`."""
    original = DataSpec.from_dict(info["original"])
    if original.kind != "audio":
        raise DataMismatch(f"{original.kind} cannot be played; audio can")
    return undo(x, info).clamp(-1, 1).float()


def _undo(x: Tensor, record: Mapping[str, Any]) -> Tensor:
    match record["name"]:
        case "pad":
            top, bottom, left, right = record["margins"]
            return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
        case "static" | "dynamic" | "threshold":
            return x * (record["levels"] - 1)
        case "dequantize":
            return x * record["levels"]
        case "logit":
            return (torch.sigmoid(x) - record["lam"]) / (1 - 2 * record["lam"]) * record["levels"]
        case "standardize":
            return x * _table(record, "sd", x) + _table(record, "mean", x)
        case "mu_law":
            mu = record["levels"] - 1
            compressed = 2 * x / mu - 1
            return compressed.sign() * torch.expm1(compressed.abs() * math.log1p(mu)) / mu
    raise DataMismatch(f"transform {record['name']!r} is not known to this version; prepare the data set again")


def _table(record: Mapping[str, Any], key: str, x: Tensor) -> Tensor:
    """Statistics of shape (D,) for vectors, (C, 1, 1) for images, () for audio."""
    return torch.tensor(record[key], dtype=x.dtype)


def how_to_show(info: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a data set's info that travels with a trained model, so that its samples can be shown."""
    keys = ("name", "source", "variant", "original", "transforms", "range", "class_names", "sample_rate")
    return {key: info[key] for key in keys if key in info}


def display_of(info: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """Stored data to uint8 pictures, or to waveforms; None for vectors and for codes that have no original."""
    original = info.get("original")
    if original is None or original["kind"] in ("vector", "codes"):
        return None
    return partial(to_waveform if original["kind"] == "audio" else to_display, info=info)
