"""Samples to look at and to measure, with the labels and contexts they were drawn for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dgm_core.capabilities import HasDecoder, HasPosterior
from dgm_core.contract import Batch, DataMismatch, DataSpec, GenerativeModel
from dgm_core.evaluation.examples import seeded
from dgm_core.evaluation.record import Metric

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from dgm_core.evaluation.work import Work

PROBES = 16


class Drawn(NamedTuple):
    """(n, *shape) as stored, on the CPU; the labels, where the model goes by them; the time it took."""

    x: Tensor
    y: Tensor | None
    seconds: float


def step(work: Work) -> None:
    """Leaves `by_labels`, `drawn`, `enough` and `means`."""
    model, test, o = work.model, work.test, work.options
    work.by_labels = goes_by_labels(model, test, o.sampling, work.seed)
    drawn = work.given or draw(
        model, o.samples, test, o.sampling, o.batch_size, by_labels=work.by_labels, progress=work.progress
    )
    context = {"n": o.samples, "sampling": dict(o.sampling), "batch_size": o.batch_size}
    work.add({"seconds_per_sample": Metric.of(drawn.seconds / o.samples, **context)})
    finite = torch.isfinite(drawn.x.double()).flatten(1).all(1)
    if not finite.all():
        work.warn(f"{int((~finite).sum())} of {len(finite)} samples are NaN or infinite.")
    work.drawn = Drawn(drawn.x[finite], None if drawn.y is None else drawn.y[finite], drawn.seconds)
    # Enough for every statistic; a model with fewer good samples has nothing worth measuring.
    work.enough = int(finite.sum()) > o.neighbours + 1
    if isinstance(model, HasPosterior) and isinstance(model, HasDecoder):
        work.means = draw_means(model, o.samples, test, o.batch_size, by_labels=work.by_labels)
    if work.enough and len(work.drawn.x.unique(dim=0)) < 0.1 * len(test.x[: o.samples].unique(dim=0)):
        work.warn("The samples have collapsed: most of them are copies of a few.")


def goes_by_labels(model: GenerativeModel, examples: Batch, options: Mapping[str, Any], seed: int) -> bool:
    """Whether the labels change what is drawn from one and the same random stream.

    The contract has no flag for it: a model without use for labels ignores them, or refuses them.
    """
    if model.data.classes < 2:
        return False
    found = []
    for label in (0, model.data.classes - 1):
        y = torch.full((PROBES,), label, device=model.device)
        try:
            with seeded(seed):
                found.append(model.sample(PROBES, y, contexts(examples, PROBES, model.device), **options))
        except DataMismatch:
            return False
    return not torch.equal(found[0], found[1])


def draw(
    model: GenerativeModel,
    n: int,
    examples: Batch,
    options: Mapping[str, Any],
    batch_size: int,
    *,
    labels: Tensor | None = None,
    by_labels: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Drawn:
    """`n` samples, `batch_size` at a time.

    Where the model goes by labels, those given, else draws from the training marginals. Contexts are the examples' own,
    in turn, and then so are the labels: the two belong together.
    """
    y = labels_for(model, n, examples) if by_labels and labels is None else labels
    whole = contexts(examples, n, "cpu")
    parts = []
    started = time.perf_counter()
    for start in range(0, n, batch_size):
        rows = slice(start, min(start + batch_size, n))
        context = {name: c[rows].to(model.device) for name, c in whole.items()}
        given = None if y is None else y[rows].to(model.device)
        parts.append(model.sample(rows.stop - rows.start, given, context, **options).cpu())
        if progress is not None:
            progress(rows.stop, n, "samples")
    return Drawn(torch.cat(parts), y, time.perf_counter() - started)


def draw_part(
    model: GenerativeModel, start: int, stop: int, examples: Batch, options: Mapping[str, Any], *, by_labels: bool
) -> Drawn:
    """Samples number `start` … `stop − 1` of a larger draw, which several workers share."""
    rows = torch.arange(start, stop)
    y = None
    if by_labels:
        paired = examples.context and examples.y is not None
        y = examples.y[rows % examples.y.shape[0]] if paired else model.draw_labels(stop - start).cpu()  # type: ignore[index, union-attr]
    context = {name: c[rows % c.shape[0]].to(model.device) for name, c in examples.context.items()}
    started = time.perf_counter()
    x = model.sample(stop - start, None if y is None else y.to(model.device), context, **options).cpu()
    return Drawn(x, y, time.perf_counter() - started)


def draw_means(
    model: GenerativeModel, n: int, examples: Batch, batch_size: int, *, by_labels: bool
) -> Float[Tensor, " n *shape"]:
    """Means decoded from `n` draws of the prior, on the CPU: samples without the observation's noise."""
    assert isinstance(model, HasDecoder)
    y = labels_for(model, n, examples) if by_labels else None
    whole = contexts(examples, n, "cpu")
    parts = []
    for start in range(0, n, batch_size):
        rows = slice(start, min(start + batch_size, n))
        context = {name: c[rows].to(model.device) for name, c in whole.items()}
        given = None if y is None else y[rows].to(model.device)
        parts.append(model.decode(model.draw_latent(rows.stop - rows.start), given, context).cpu())
    return torch.cat(parts)


def decode_along(
    model: GenerativeModel, path: Float[Tensor, " rows steps *latent"], examples: Batch, spec: DataSpec
) -> Float[Tensor, " rows*steps *shape"]:
    """Means of latents, a row's with the label and context of its example, on the CPU."""
    assert isinstance(model, HasDecoder)
    rows, steps = path.shape[:2]
    decoded = []
    for i in range(rows):
        one = examples.map(lambda t, i=i: t[i % len(t)].expand(steps, *t.shape[1:])).to(model.device)
        decoded.append(model.decode(path[i].to(model.device), one.y if spec.classes else None, one.context).cpu())
    return torch.cat(decoded)


def labels_for(model: GenerativeModel, n: int, examples: Batch) -> Int[Tensor, " n"]:
    """Draws from the training marginals, or the examples' own where there are contexts that they belong to."""
    if examples.context and examples.y is not None:
        return cycled(examples.y, n)
    return model.draw_labels(n).cpu()


def contexts(examples: Batch, n: int, device: torch.device | str) -> dict[str, Tensor]:
    """n contexts, the examples' own in turn."""
    return {name: cycled(c, n).to(device) for name, c in examples.context.items()}


def cycled(x: Tensor, n: int) -> Tensor:
    """n rows, from the start again where there are fewer."""
    return x[torch.arange(n) % x.shape[0]]
