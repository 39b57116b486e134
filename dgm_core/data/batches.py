"""Batches: a position in an endless stream of epochs is all there is to remember.

Every epoch's order is a permutation seeded by (seed, epoch), and the noise of batch-time transforms (dynamic
binarisation, flips) is a function of (seed, epoch, example). A batch is a pure function of its arguments: it can be
found again after an interruption, on another number of ranks, or by another process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dgm_core.contract import Batch, DataMismatch
from dgm_core.data import noise
from dgm_core.data.shards import Split
from dgm_core.distributed import share


class Stream:
    """The endless concatenation of a split's epochs, each in its own order."""

    def __init__(self, split: Split, *, seed: int, augment: Sequence[str] = ()) -> None:
        for name in augment:
            if name != "hflip":
                raise DataMismatch(f"augmentation {name!r} is not known; accepted: hflip")
            if split.spec.kind != "image" or split.spec.context:
                raise DataMismatch("hflip mirrors images without context; remove it from the recipe's `augment`")
        self.split, self.seed, self.augment = split, seed, tuple(augment)
        self._held: tuple[int, np.ndarray] | None = None

    def at(self, position: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        """Examples `position` … `position + size − 1` of the stream; of them, the share of one rank.

        A batch may cross an epoch's end. A rank's share may be empty.
        """
        mine, n = share(size, rank, world), len(self.split)
        start, stop = position + mine.start, position + mine.stop
        pieces = []
        for epoch in range(start // n, max(start, stop - 1) // n + 1):
            within = slice(max(start - epoch * n, 0), min(stop - epoch * n, n))
            pieces.append(self._piece(epoch, self._order(epoch)[within].copy()))
        return pieces[0] if len(pieces) == 1 else _joined(pieces)

    def _piece(self, epoch: int, indices: np.ndarray) -> Batch:
        batch = self.split.rows(indices, draw=(noise.DYNAMIC, self.seed, epoch))
        if "hflip" in self.augment:
            flipped = torch.from_numpy(noise.coins((noise.FLIP, self.seed, epoch), indices))
            batch = batch._replace(x=torch.where(flipped[:, None, None, None], batch.x.flip(-1), batch.x))
        return batch

    def _order(self, epoch: int) -> np.ndarray:
        """One order is held, 4 bytes an example: a batch that crosses into the next epoch has taken its indices."""
        held = self._held
        if held is None or held[0] != epoch:
            self._held = held = None  # before the next is made
            order = np.arange(len(self.split), dtype=np.int32)
            np.random.default_rng((noise.ORDER, self.seed, epoch)).shuffle(order)
            self._held = held = epoch, order
        return held[1]


def one_pass(split: Split, size: int, *, rank: int = 0, world: int = 1, seed: int = 0) -> Iterator[Batch]:
    """The split once, in the stored order, in batches of `size` (the last may be shorter); of each, a rank's share.

    A rank whose share of a batch is empty skips it. Under dynamic binarisation `seed` fixes the draw, example by
    example, whatever the batch size.
    """
    for start in range(0, len(split), size):
        mine = share(min(size, len(split) - start), rank, world)
        if mine.stop > mine.start:
            yield split.rows(np.arange(start + mine.start, start + mine.stop), draw=(noise.PASS, seed))


def _joined(pieces: Sequence[Batch]) -> Batch:
    first = pieces[0]
    return Batch(
        torch.cat([p.x for p in pieces]),
        None if first.y is None else torch.cat([p.y for p in pieces if p.y is not None]),
        {name: torch.cat([p.context[name] for p in pieces]) for name in first.context},
        torch.cat([p.index for p in pieces if p.index is not None]),
    )
