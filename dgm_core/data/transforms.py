"""Named variants of a data set: what changes the task is done to the data, once, and recorded.

Every transform knows what it makes of a spec, how to apply itself to arrays, and what must be recorded to undo it
(`display.py` does). Noise is a function of (seed, split, example), so a variant can be prepared again bit by bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from dgm_core.config import Strict
from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.data import noise


@dataclass(frozen=True)
class Moments:
    """Of the training split, coordinate by coordinate, over what is observed."""

    mean: np.ndarray
    variance: np.ndarray
    low: float
    high: float


class Transform(Strict, ABC):
    """One step from the data as found towards the data as modelled."""

    name: Any  # each transform's own literal

    @abstractmethod
    def after(self, data: DataSpec) -> DataSpec:
        """The spec after this step; data that it does not fit is refused."""

    def record(self, data: DataSpec, moments: Moments | None) -> dict[str, Any]:
        """What applying and undoing it takes, as JSON; `data` is the spec before."""
        return {**self.model_dump(), "levels": data.levels}

    @staticmethod
    @abstractmethod
    def apply(x: np.ndarray, record: dict[str, Any], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
        """(B, *before) -> (B, *after); `index` and `key` say which examples these are."""

    def label(self) -> str:
        """Name and options, for a metric's context."""
        options = ", ".join(f"{k}={v}" for k, v in self.model_dump(exclude={"name"}).items())
        return f"{self.name}({options})" if options else self.name


class Pad(Transform):
    """Add a border, equal on both sides: 28 → 32."""

    name: Literal["pad"] = "pad"
    to: int | tuple[int, int] = Field(32, description="height and width after")
    value: int = Field(0, ge=0)

    def after(self, data: DataSpec) -> DataSpec:
        height, width = self._target()
        if data.kind != "image" or data.levels is None or self.value >= data.levels:
            raise DataMismatch("pad takes images of integers, and a value among their levels; put it before the others")
        if data.shape[1] > height or data.shape[2] > width:
            raise DataMismatch(
                f"pad to {height}×{width} would cut images of {data.shape[1]}×{data.shape[2]}; pad to more"
            )
        return replace(data, shape=(data.shape[0], height, width))

    def record(self, data: DataSpec, moments: Moments | None) -> dict[str, Any]:
        height, width = self._target()
        top, left = (height - data.shape[1]) // 2, (width - data.shape[2]) // 2
        margins = [top, height - data.shape[1] - top, left, width - data.shape[2] - left]
        return {**self.model_dump(), "margins": margins}

    @staticmethod
    def apply(x: np.ndarray, record: dict[str, Any], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
        top, bottom, left, right = record["margins"]
        return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=record["value"])

    def _target(self) -> tuple[int, int]:
        return (self.to, self.to) if isinstance(self.to, int) else self.to


class _Binary(Transform):
    def after(self, data: DataSpec) -> DataSpec:
        if data.levels is None or data.levels == 2 or data.kind == "codes":
            raise DataMismatch(f"{self.name} binarises grey integers; {_told(data)} is not that; leave it out")
        return replace(data, levels=2)


class Static(_Binary):
    """x ~ Bernoulli(x / 255), drawn once."""

    name: Literal["static"] = "static"

    @staticmethod
    def apply(x: np.ndarray, record: dict[str, Any], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
        return noise.bernoulli((noise.STATIC, *key), index, x, record["levels"])


class Dynamic(_Binary):
    """x ~ Bernoulli(x / 255), drawn anew every epoch: greys are stored, `shards.Split` draws."""

    name: Literal["dynamic"] = "dynamic"

    @staticmethod
    def apply(x: np.ndarray, record: dict[str, Any], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
        return x


class Threshold(_Binary):
    """1 where x / 255 > `at`."""

    name: Literal["threshold"] = "threshold"
    at: float = Field(0.5, ge=0, lt=1)

    @staticmethod
    def apply(x: np.ndarray, record: dict[str, Any], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
        return (x > record["at"] * (record["levels"] - 1)).astype(np.uint8)


class _Real(Transform):
    def after(self, data: DataSpec) -> DataSpec:
        if data.levels is None or data.levels > 256 or data.kind == "codes":
            raise DataMismatch(f"{self.name} takes up to 256 integer levels; {_told(data)} is not that; leave it out")
        return replace(data, levels=None)


class Dequantize(_Real):
    """(x + u) / 256 with u ~ U[0, 1), drawn once: real numbers in [0, 1)."""

    name: Literal["dequantize"] = "dequantize"

    @staticmethod
    def apply(x: np.ndarray, record: dict[str, Any], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
        return _dequantized(x, record, index, key).astype(np.float32)


class Logit(_Real):
    """logit(λ + (1 − 2λ) (x + u) / 256) (Papamakarios et al. 2017: λ = 1e-6 for MNIST, 0.05 for CIFAR-10)."""

    name: Literal["logit"] = "logit"
    lam: float = Field(1e-6, gt=0, lt=0.5, description="λ")

    @staticmethod
    def apply(x: np.ndarray, record: dict[str, Any], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
        p = record["lam"] + (1 - 2 * record["lam"]) * _dequantized(x, record, index, key)
        return (np.log(p) - np.log1p(-p)).astype(np.float32)


class Standardize(Transform):
    """(x − mean) / sd of the training split: by coordinate for vectors, by channel for images, as one for audio.

    A coordinate that never varies keeps its scale. Where values may be missing only the observed ones count, and a
    missing one is 0, the mean.
    """

    name: Literal["standardize"] = "standardize"

    def after(self, data: DataSpec) -> DataSpec:
        if data.levels is not None:
            raise DataMismatch(f"standardize takes real numbers; {_told(data)} is not that; put dequantize before it")
        return replace(data, density={})  # its units are no longer the density's

    def record(self, data: DataSpec, moments: Moments | None) -> dict[str, Any]:
        assert moments is not None
        axes = {"vector": (), "image": (1, 2), "audio": (0,)}[data.kind]
        mean = moments.mean.mean(axis=axes, keepdims=data.kind == "image")
        second = (moments.variance + moments.mean**2).mean(axis=axes, keepdims=data.kind == "image")
        sd = np.sqrt(np.maximum(second - mean**2, 0))
        sd = np.where(sd > 1e-6 * np.maximum(1, np.abs(mean)), sd, 1.0)
        return {"name": self.name, "mean": mean.tolist(), "sd": sd.tolist()}

    @staticmethod
    def apply(x: np.ndarray, record: dict[str, Any], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
        return ((x - np.asarray(record["mean"])) / np.asarray(record["sd"])).astype(np.float32)


class MuLaw(Transform):
    """sign(x) ln(1 + µ|x|) / ln(1 + µ), in µ + 1 levels (van den Oord et al. 2016, sec. 2.2)."""

    name: Literal["mu_law"] = "mu_law"
    levels: int = Field(256, ge=2, le=65536, description="µ + 1")

    def after(self, data: DataSpec) -> DataSpec:
        if data.kind != "audio" or data.levels is not None:
            raise DataMismatch(f"mu_law takes real-valued audio; {_told(data)} is not that; leave it out")
        return replace(data, levels=self.levels)

    def record(self, data: DataSpec, moments: Moments | None) -> dict[str, Any]:
        return self.model_dump()

    @staticmethod
    def apply(x: np.ndarray, record: dict[str, Any], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
        mu = record["levels"] - 1
        x = np.clip(x.astype(np.float64), -1, 1)
        compressed = np.sign(x) * np.log1p(mu * np.abs(x)) / np.log1p(mu)
        return np.floor((compressed + 1) / 2 * mu + 0.5).astype(np.uint8 if mu < 256 else np.int64)


_ALL: tuple[type[Transform], ...] = (Pad, Static, Dynamic, Threshold, Dequantize, Logit, Standardize, MuLaw)
_APPLY = {kind.model_fields["name"].default: kind.apply for kind in _ALL}


def _named(given: Any) -> Any:
    return {"name": given} if isinstance(given, str) else given


def _listed(given: Any) -> Any:
    return given if isinstance(given, list | tuple) else () if given is None else (given,)


AnyTransform = Annotated[
    Annotated[
        Pad | Static | Dynamic | Threshold | Dequantize | Logit | Standardize | MuLaw, Field(discriminator="name")
    ],
    BeforeValidator(_named),
]
Transforms = Annotated[tuple[AnyTransform, ...], BeforeValidator(_listed)]  # one, or several in order; a name will do


def follow(data: DataSpec, transforms: Sequence[Transform]) -> DataSpec:
    """The spec after all steps; a step that does not fit is refused."""
    drawn = False
    for transform in transforms:
        if drawn:
            raise DataMismatch(
                f"dynamic draws batch by batch, so nothing can follow it; put {transform.name} before it"
            )
        data, drawn = transform.after(data), transform.name == "dynamic"
    return data


def records(data: DataSpec, transforms: Sequence[Transform], moments: Moments | None) -> list[dict[str, Any]]:
    """What `info["transforms"]` holds; `moments` are those before `standardize`, if it is among them."""
    result = []
    for transform in transforms:
        result.append(transform.record(data, moments))
        data = transform.after(data)
    return result


def apply_all(x: np.ndarray, steps: Sequence[dict[str, Any]], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    for record in steps:
        x = _APPLY[record["name"]](x, record, index, key)
    return x


def variant(transforms: Sequence[Transform]) -> str:
    """The variant's name, part of every metric's context."""
    return "+".join(t.label() for t in transforms) or "plain"


def _dequantized(x: np.ndarray, record: dict[str, Any], index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    return (x + noise.dequantization((noise.DEQUANTIZE, *key), index, x.shape[1:])) / record["levels"]


def _told(data: DataSpec) -> str:
    return f"{data.kind} of {data.levels} levels" if data.levels else f"real-valued {data.kind}"
