"""Examples to evaluate on, and the quiet in which a model is looked at: no gradient, no trace left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

Batches = Callable[[], Iterator[Batch]]  # each call gives a fresh pass over a split


def take(batches: Iterable[Batch], n: int) -> Batch:
    """At most `n` examples, evenly spaced over one whole pass, on the CPU.

    The first n would be of one class where a split is stored class by class. At most 2n are held at a time: every
    stride-th example is kept, and the stride doubles when they grow too many.
    """
    kept: list[Batch] = []
    held = position = 0
    stride = 1
    for batch in batches:
        size = batch.x.shape[0]
        rows = torch.tensor(range(-position % stride, size, stride), dtype=torch.int64)
        position += size
        if len(rows):
            kept.append(batch.to("cpu").rows(rows))
            held += len(rows)
        while held >= 2 * n:
            kept = [concatenate(kept).rows(slice(None, None, 2))]
            held, stride = kept[0].x.shape[0], 2 * stride
    if not held:
        raise DataMismatch("the split gave no example: there is nothing to evaluate on")
    whole = concatenate(kept)
    if held <= n:
        return whole
    return whole.rows(torch.linspace(0, held - 1, n, dtype=torch.float64).round().long())


def concatenate(batches: list[Batch]) -> Batch:
    """One batch of many."""
    first = batches[0]
    if len(batches) == 1:
        return first
    return Batch(
        torch.cat([b.x for b in batches]),
        None if first.y is None else torch.cat([b.y for b in batches if b.y is not None]),
        {name: torch.cat([b.context[name] for b in batches]) for name in first.context},
        None if first.index is None else torch.cat([b.index for b in batches if b.index is not None]),
    )


def chunks(batch: Batch, size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """The batch in pieces of at most `size` rows, on `device`."""
    for start in range(0, batch.x.shape[0], size):
        yield batch.rows(slice(start, start + size)).to(device)


def unit(x: Shaped[Tensor, " B *shape"], spec: DataSpec) -> Float[Tensor, " B *shape"]:
    """Discrete data as floats in [0, 1], so that an error reads alike at any number of levels; others unchanged."""
    x = promote(x)
    return x if spec.levels is None else x / (spec.levels - 1)


def nearest_stored(x: Float[Tensor, " B *shape"], spec: DataSpec) -> Shaped[Tensor, " B *shape"]:
    """Means as what would be stored of them: a judge sees stored values in training, and no others."""
    return x if spec.levels is None else x.round().clamp(0, spec.levels - 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random streams start from `seed` inside, and go on outside as if nothing had happened."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, its own random stream; each submodule's mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with seeded(seed), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
