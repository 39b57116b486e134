"""An evaluation as it goes on: what is looked at, what was found, and what a step leaves to those after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.evaluation.drawing import Display
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.record import Evaluation, EvaluationConfig, Figure, Metric
from dgm_core.evaluation.sampling import Drawn

Progress = Callable[[int, int, str], None]


@dataclass
class Work:
    """What every step is given. `context` is said in every metric's own."""

    model: GenerativeModel
    spec: DataSpec
    info: Mapping[str, Any]
    judge: Judge | None
    options: EvaluationConfig
    seed: int
    train: Batch
    test: Batch  # of the split that is scored
    context: Mapping[str, Any]
    result: Evaluation
    display: Display | None = None
    given: Drawn | None = None  # samples that were drawn elsewhere
    progress: Progress | None = None
    files: dict[str, bytes] = field(default_factory=dict)  # pictures and recordings, by name

    # Left by `samples`: those that are finite, and whether they are enough for statistics.
    drawn: Drawn = field(init=False)
    by_labels: bool = False
    enough: bool = False
    means: Tensor | None = None
    # Left by the step of that subject.
    counts: dict[str, Tensor] = field(default_factory=dict)  # of codes, by level
    kl: Tensor | None = None
    reconstructed: Tensor | None = None
    nearest: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    def add(self, metrics: Mapping[str, Metric]) -> None:
        self.result.metrics |= {name: metric.within(self.context) for name, metric in metrics.items()}

    def show(self, file: str, drawing: tuple[bytes, str] | None) -> None:
        """A picture and its caption; None where there is nothing to show."""
        if drawing is not None:
            self.files[file] = drawing[0]
            self.result.figures.append(Figure(file, drawing[1]))

    def warn(self, *words: str) -> None:
        self.result.warnings.extend(words)
