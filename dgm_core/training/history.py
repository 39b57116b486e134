"""What is said about training: sums kept on the device, read now and then, and the file they end up in."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dgm_core import distributed
from dgm_core.contract import Loss, Turn

_NEVER = torch.iinfo(torch.int64).max


class NonFiniteLoss(FloatingPointError):
    """A loss became NaN or infinite; the message names the round, the turn and the last good checkpoint."""


class Window:
    """Numbers since the last report. Nothing is read from the device until `read`."""

    def __init__(self, turns: Sequence[Turn], device: torch.device, step: int, position: int) -> None:
        self.device = device
        self.started = (time.perf_counter(), step, position)
        self.sums: dict[str, Tensor] = {}
        self.plays = {turn.name: 0.0 for turn in turns}
        self.first_bad = {turn.name: torch.full((), _NEVER, device=device) for turn in turns}

    def note(self, turn: str, loss: Loss, weight: float, step: int) -> None:
        """Add one microbatch, `weight` being its share of the global batch."""
        value = loss.value.detach()
        bad = self.first_bad[turn]
        torch.minimum(bad, torch.where(value.isfinite(), _NEVER, step), out=bad)
        self.plays[turn] += weight
        for name, metric in {"loss": value, **loss.metrics}.items():
            key, term = f"train/{turn}/{name}", metric.detach() * weight
            self.sums[key] = self.sums[key] + term if key in self.sums else term

    def check_finite(self, last_checkpoint: Path | None) -> None:
        """Raise `NonFiniteLoss` on every rank if a loss was not finite on any. A collective."""
        firsts = -torch.stack(list(self.first_bad.values())) if self.first_bad else torch.zeros(0)
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(firsts, torch.distributed.ReduceOp.MAX)
        for turn, first in zip(self.first_bad, (-firsts).tolist(), strict=True):
            if first != _NEVER:
                kept = last_checkpoint is not None and last_checkpoint.exists()
                where = f"the last good checkpoint is {last_checkpoint}" if kept else "there is no checkpoint"
                raise NonFiniteLoss(
                    f"the loss of turn {turn!r} became NaN or infinite in round {first}; {where}. Lower the learning "
                    "rate, set clip_norm, or add warm-up."
                )

    def read(self, step: int, position: int) -> dict[str, float]:
        """Means over the window's plays and all ranks, and the rates. A collective."""
        numbers: dict[str, float] = {}
        names = sorted(self.sums)
        if names:
            sums = torch.stack([self.sums[name].double() for name in names])
            plays = torch.tensor([self.plays[name.split("/")[1]] for name in names], dtype=sums.dtype)
            plays = plays.to(self.device)
            distributed.sum_(sums, plays)
            numbers = dict(zip(names, (sums / plays).tolist(), strict=True))
        started, first_step, first_position = self.started
        seconds = time.perf_counter() - started
        numbers["train/rounds_per_second"] = (step - first_step) / seconds
        numbers["train/examples_per_second"] = (position - first_position) / seconds
        numbers["train/peak_memory_mib"] = _peak_memory(self.device) / 2**20
        return numbers


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def append(path: Path, step: int, numbers: Mapping[str, float]) -> None:
    """Add one line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps({"step": step, **numbers}) + "\n")


def read(path: Path) -> list[dict[str, float]]:
    """Every whole line; one cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def truncate(path: Path, step: int) -> None:
    """Drop what was logged after `step`: those rounds are played again."""
    if path.exists():
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in read(path) if row["step"] <= step))
        os.replace(aside, path)
