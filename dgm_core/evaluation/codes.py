"""Codebooks: how much of them is used, and what a prior that knew only the histogram would pay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.capabilities import HasCodes
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.evaluation.examples import chunks
from dgm_core.evaluation.record import Metric

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from dgm_core.evaluation.work import Work


def step(work: Work) -> None:
    """Leaves `counts`."""
    if isinstance(work.model, HasCodes):
        codes = encode(work.model, work.test, work.options.batch_size)
        metrics, work.counts, warnings = code_metrics(work.model, work.spec, codes)
        work.add(metrics)
        work.warn(*warnings)
        work.result.details["code_counts"] = {level: c.tolist() for level, c in work.counts.items()}


def histogram(codes: Int[Tensor, " B *grid"], size: int) -> Int[Tensor, " size"]:
    """How often each code occurs."""
    return torch.bincount(codes.reshape(-1).long(), minlength=size)


def usage(counts: Int[Tensor, " size"]) -> float:
    """Share of the codes that occur at all."""
    return (counts > 0).double().mean().item()


def entropy(counts: Int[Tensor, " size"]) -> float:
    """Of the histogram, in nats."""
    p = counts.double() / counts.sum()
    return torch.special.entr(p).sum().item()


def perplexity(counts: Int[Tensor, " size"]) -> float:
    """exp(entropy): as if so many codes were used equally often."""
    return math.exp(entropy(counts))


def marginal_bits(train: Int[Tensor, " size"], test: Int[Tensor, " size"]) -> float:
    """Bits a code that the training histogram (one added to every count) needs on test codes: what a prior must
    beat, in its own `bits_per_dim`."""
    p = (train.double() + 1) / (train.sum() + len(train))
    q = test.double() / test.sum()
    return -(q * p.log2()).sum().item()


def reduction(data: DataSpec, levels: Mapping[str, DataSpec]) -> float:
    """Bits of an example (32 a real number) over the bits of its codes."""
    own = data.dims * (32.0 if data.levels is None else math.log2(data.levels))
    return own / sum(spec.dims * math.log2(spec.levels or 2) for spec in levels.values())


def encode(model: HasCodes, examples: Batch, batch_size: int) -> dict[str, Tensor]:
    """Level -> codes of all examples, on the CPU."""
    device = model.device if isinstance(model, GenerativeModel) else "cpu"
    parts = [model.codes(part.x, part.y) for part in chunks(examples, batch_size, device)]
    return {level: torch.cat([part[level].cpu() for part in parts]) for level in model.code_specs()}


def code_metrics(
    model: HasCodes, data: DataSpec, codes: Mapping[str, Tensor]
) -> tuple[dict[str, Metric], dict[str, Tensor], list[str]]:
    """Metrics, histograms and warnings of `codes` (from `encode`), a level each."""
    specs = model.code_specs()
    metrics: dict[str, Metric] = {}
    counts: dict[str, Tensor] = {}
    warnings: list[str] = []
    for level, spec in specs.items():
        size, n = spec.levels or 0, len(codes[level])
        counts[level] = histogram(codes[level], size)
        seen = int(counts[level].sum())
        context = {"n": n, "codebook": size, "grid": list(spec.shape)}
        metrics[f"codes/{level}/usage"] = Metric.of(usage(counts[level]), **context)
        metrics[f"codes/{level}/perplexity"] = Metric.of(perplexity(counts[level]), **context)
        metrics[f"codes/{level}/entropy_bits"] = Metric.of(
            entropy(counts[level]) / math.log(2), unit="bits a code", **context
        )
        used, effective = (
            metrics[f"codes/{level}/usage"].value or 0.0,
            metrics[f"codes/{level}/perplexity"].value or 0.0,
        )
        # With few codes seen, an unused one says nothing of the codebook.
        if seen >= 10 * size and (used < 0.5 or effective < size / 10):
            warnings.append(
                f"The codebook of level {level!r} has collapsed: {used:.0%} of its {size} codes are used, as if "
                f"{effective:.1f} were used equally often. Check its start (k-means) and revival, or make it smaller."
            )
    metrics["codes/reduction"] = Metric.of(reduction(data, specs), unit="bits of the data over bits of the codes")
    return metrics, counts, warnings


def marginal_metric(train: Float[Tensor, " B *grid"], test: Float[Tensor, " B *grid"], spec: DataSpec) -> Metric:
    """For data that are codes themselves: what their histogram alone costs."""
    size = spec.levels or 0
    bits = marginal_bits(histogram(train, size), histogram(test, size))
    return Metric.of(bits, n=len(test), unit="bits a code", histogram="train, one added to each count")
