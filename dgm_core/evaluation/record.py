"""What an evaluation says: numbers with everything needed to read them, figures with captions, warnings in words."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from dgm_core.config import Strict
from dgm_core.evaluation.files import write_atomically

FILE = "evaluation.json"


class EvaluationConfig(Strict):
    """How much is measured. The defaults take seconds on data of the digits' size."""

    split: Literal["val", "test"] = Field(default="test", description="what is scored; a search must not look at test")
    examples: int = Field(default=1000, ge=2, description="of the split, at most, evenly spaced over it")
    samples: int = Field(default=500, ge=2, description="drawn from the model")
    batch_size: int = Field(default=250, ge=1, description="examples or samples put through the model at once")
    sampling: dict[str, Any] = Field(default_factory=dict, description="options for the model's `sample`")
    elbo_draws: int = Field(default=4, ge=1, description="single-sample bounds averaged an example")
    importance_samples: int = Field(default=32, ge=0, description="K of nll_isK_nats; 0 leaves it out")
    importance_examples: int = Field(
        default=128, ge=2, description="examples that nll_isK_nats is measured on, at most"
    )
    importance_chunk: int = Field(default=50, ge=1, description="importance samples drawn at once")
    ais_chains: int = Field(default=100, ge=2)
    ais_temperatures: int = Field(default=2000, ge=2)
    ais_schedule: Literal["piecewise", "linear", "geometric"] = "linear"
    ais_burn_in: int = Field(default=500, ge=0, description="transitions before reverse annealing")
    energy_draws: int = Field(
        default=200_000, ge=2, description="of a model whose log-densities come with its draws, against a known density"
    )
    neighbours: int = Field(default=5, ge=1, description="k of precision, recall, density and coverage")
    chunk: int = Field(default=1024, ge=1, description="rows of a table of distances held at once")
    mutual_information_examples: int = Field(default=500, ge=2)
    tiles: int = Field(default=8, ge=2, description="rows and columns of a grid of pictures")
    figures: bool = True


@dataclass(frozen=True)
class Metric:
    """A number and how to read it.

    `value` is None where it came out NaN or infinite. `floor` is what the data itself gets: training against test
    examples for distances, the known entropy for likelihoods, originals for reconstructions. `error` is one standard
    error.
    """

    value: float | None
    context: Mapping[str, Any] = field(default_factory=dict)
    floor: float | None = None
    error: float | None = None

    @classmethod
    def of(cls, value: float, floor: float | None = None, error: float | None = None, **context: Any) -> Self:
        """Numbers that are not finite become None: JSON has no word for them."""
        return cls(_finite(value), context, _finite(floor), _finite(error))

    def within(self, context: Mapping[str, Any]) -> Metric:
        """With `context` around its own."""
        return Metric(self.value, {**context, **self.context}, self.floor, self.error)


@dataclass(frozen=True)
class Figure:
    """A PNG, or a GIF where it moves, beside `evaluation.json`."""

    file: str
    caption: str


@dataclass(frozen=True)
class Sound:
    """A WAV beside `evaluation.json`, and a PNG of it: `column` (real, sampled …) of the `row` that shows one thing."""

    file: str
    picture: str
    row: str
    column: str


@dataclass
class Evaluation:
    """All that was found out about one trained model."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)  # lists behind the numbers: KL a dimension, code counts
    environment: dict[str, str] = field(default_factory=dict)
    sounds: list[Sound] = field(default_factory=list)

    def flat(self) -> dict[str, float]:
        """Name -> number, for a metrics file that is the same each time: what was not finite is left out (a warning
        says so), and so are timings."""
        known = {name: metric.value for name, metric in self.metrics.items() if metric.value is not None}
        return {name: value for name, value in known.items() if not name.startswith("seconds_")}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + os.linesep

    @property
    def files(self) -> set[str]:
        """All that lies beside `evaluation.json`."""
        return {f.file for f in self.figures} | {name for s in self.sounds for name in (s.file, s.picture)}

    def write(self, folder: Path, files: Mapping[str, bytes]) -> None:
        """The files first, `evaluation.json` last; those of an earlier evaluation that are not made again go."""
        folder.mkdir(parents=True, exist_ok=True)
        stale = self.read(folder).files if (folder / FILE).exists() else set()
        (folder / FILE).unlink(missing_ok=True)
        for name in stale - set(files):
            (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
        write_atomically(folder / FILE, self.to_json().encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The inverse of `write`."""
        given = json.loads((folder / FILE).read_text())
        given["metrics"] = {name: Metric(**metric) for name, metric in given["metrics"].items()}
        given["figures"] = [Figure(**figure) for figure in given["figures"]]
        given["sounds"] = [Sound(**sound) for sound in given.get("sounds", ())]
        return cls(**given)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
