"""Recordings to listen to: real ones beside those that a model made of the same thing, each with its picture."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgm_core.contract import Batch, DataSpec
from dgm_core.evaluation.drawing import Display, png, recordings, waveforms
from dgm_core.evaluation.record import Sound

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from dgm_core.evaluation.work import Work

ROWS = 10
BYTES = 2**20  # of all recordings of an evaluation together, for they are put into a page


def step(work: Work) -> None:
    columns = {"real": work.test}
    if work.reconstructed is not None:
        columns["reconstructed"] = work.test._replace(x=work.reconstructed)
    if work.enough:
        columns["sampled"] = Batch(work.drawn.x, work.drawn.y)
    work.result.sounds, files = beside_each_other(columns, work.spec, work.info, work.display)
    work.files |= files


def wav(x: Float[Tensor, " T"], rate: int) -> bytes:
    """A waveform in [−1, 1] as 16-bit PCM; the same bytes every time."""
    samples = (x.cpu().double() * 2**15).round().clamp(-(2**15), 2**15 - 1)
    sink = io.BytesIO()
    with wave.open(sink, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.numpy().astype("<i2").tobytes())
    return sink.getvalue()


def beside_each_other(
    columns: Mapping[str, Batch], spec: DataSpec, info: Mapping[str, Any], display: Display | None
) -> tuple[list[Sound], dict[str, bytes]]:
    """One row a class where all columns have labels, else one an example; what to show, and the files of it.

    Nothing for data that is no audio, or whose rate is not known.
    """
    if spec.kind != "audio" or "sample_rate" not in info:
        return [], {}
    most = max(1, min(ROWS, BYTES // (2 * spec.dims * len(columns))))
    rows = _rows(list(columns.values()), spec.classes, info.get("class_names", ()), most)
    sounds: list[Sound] = []
    files: dict[str, bytes] = {}
    picked = [batch.x[[found[i] for _, found in rows]] for i, batch in enumerate(columns.values())]
    waves = waveforms(torch.cat(picked), spec, display).unflatten(0, (len(columns), len(rows)))
    drawn = recordings(waves.flatten(0, 1)).unflatten(0, (len(columns), len(rows)))  # all on one scale
    for number, (name, _) in enumerate(rows):
        for i, column in enumerate(columns):
            stem = f"sound_{number}_{column}"
            sounds.append(Sound(f"{stem}.wav", f"{stem}.png", name, column))
            files[f"{stem}.wav"] = wav(waves[i, number], info["sample_rate"])
            files[f"{stem}.png"] = png(drawn[i, number].movedim(0, 2).numpy())
    return sounds, files


def _rows(columns: Sequence[Batch], classes: int, names: Sequence[str], most: int) -> list[tuple[str, list[int]]]:
    """What a row is of, and each column's example of it: the first of a class, or examples spread over the column."""
    labels = [batch.y for batch in columns if batch.y is not None]
    if classes > 1 and len(labels) == len(columns):
        firsts = [_first_of_each(y) for y in labels]
        shared = [k for k in range(classes) if all(k in first for first in firsts)][:most]
        if shared:
            return [(names[k] if k < len(names) else str(k), [first[k] for first in firsts]) for k in shared]
    shortest = min(len(batch.x) for batch in columns)
    count = min(most, shortest)
    return [(str(i + 1), [i * shortest // count] * len(columns)) for i in range(count)]


def _first_of_each(y: Int[Tensor, " n"]) -> dict[int, int]:
    found: dict[int, int] = {}
    for i, label in enumerate(y.tolist()):
        found.setdefault(label, i)
    return found
