"""Checkpoints: atomic on disk, loaded without running foreign code, complete down to every rank's random stream."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgm_core import distributed
from dgm_core.contract import GenerativeModel

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written, or is not this model's."""


def save_atomically(value: Any, path: Path, waits: Sequence[float] = (1, 2, 4, 8, 15, 30)) -> None:
    """Write beside `path`, flush to disk, rename: a reader sees the old file or the new one, never half of one.

    A full disk may be somebody else's doing and pass: it is tried again after each of `waits` seconds.

    Raises:
        CheckpointError: it stayed full; what was at `path` is still there.
    """
    for wait in (*waits, None):
        try:
            _save(value, path)
            return
        except (OSError, RuntimeError) as error:
            if not _is_full(error):
                raise
            if wait is None:
                raise CheckpointError(
                    f"{path} cannot be written: the disk is full. The checkpoint before it is whole: free some space "
                    "and start again, training goes on from there"
                ) from error
            log.warning("%s: the disk is full; trying again in %g s", path, wait)
            time.sleep(wait)


def _is_full(error: BaseException) -> bool:
    """torch's writer says something else, and keeps the disk's own word as the context."""
    context = error if isinstance(error, OSError) else error.__context__
    return isinstance(context, OSError) and context.errno in (errno.ENOSPC, errno.EDQUOT)


def _save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """Tensors and plain values only (`weights_only=True`).

    Raises:
        CheckpointError: the file is not a whole checkpoint.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({error}); delete it to start afresh") from error


def model_state(model: GenerativeModel) -> dict[str, Tensor]:
    """The model's tensors, with every rank's chains gathered. A collective where the model has chains."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name in sorted(model.chains):
        state[name] = distributed.gather_rows(state[name])
    return state


def load_model_state(model: GenerativeModel, state: Mapping[str, Tensor]) -> None:
    """The inverse of `model_state`: chains are split over the ranks there are now."""
    local = dict(state)
    for name in model.chains:
        local[name] = local[name][distributed.share(local[name].shape[0])]
    try:
        model.load_state_dict(local)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit this model: {error}") from error


def random_state(device: torch.device) -> list[dict[str, Tensor]]:
    """The random streams of every rank, in rank order. A collective."""
    mine = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    return distributed.gather_objects(mine)


def restore_random_state(states: list[dict[str, Tensor]], device: torch.device, seed: int, step: int) -> None:
    """Put this rank's streams back; on another number of ranks seed new ones from (seed, round, rank)."""
    if len(states) != distributed.world_size():
        seed_rank(seed + 1_000_003 * step)
        return
    mine = states[distributed.rank()]
    torch.set_rng_state(mine["cpu"].cpu())
    if device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"].cpu(), device)


def seed_rank(seed: int) -> None:
    """Seed torch's default generators, differently on every rank."""
    torch.manual_seed((seed * 0x9E3779B1 + distributed.rank() * 0x85EBCA77) % 2**63)
