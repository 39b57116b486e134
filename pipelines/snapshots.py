"""What a training draws at its validations, always for the same noise: kept with its checkpoints, in the end a film."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from dgm_core.evaluation.drawing import film
from dgm_core.evaluation.files import write_atomically

FILE = "snapshots.npz"  # in the job's folder: round -> PNG
FILM = "training.gif"  # in the finished run
MOST = 40  # frames of a film, as evenly spaced as the validations allow


def keep(folder: Path, step: int, picture: bytes) -> None:
    """Add a picture. One that a training makes again, going on from an earlier checkpoint, replaces its own."""
    found = _read(folder) | {step: picture}
    buffer = io.BytesIO()
    np.savez(buffer, **{str(step): np.frombuffer(png, np.uint8) for step, png in found.items()})  # pyright: ignore
    write_atomically(folder / FILE, buffer.getvalue())


def film_of(folder: Path) -> bytes | None:
    """A GIF of at most `MOST` of them, first and last included; None where there are fewer than two."""
    found = sorted(_read(folder).items())
    if len(found) < 2:
        return None
    chosen = np.unique(np.linspace(0, len(found) - 1, MOST).round().astype(int))
    return film([(f"round {found[i][0]:,}", found[i][1]) for i in chosen])


def _read(folder: Path) -> dict[int, bytes]:
    if not (folder / FILE).exists():
        return {}
    with np.load(folder / FILE, allow_pickle=False) as found:
        return {int(name): found[name].tobytes() for name in found.files}
