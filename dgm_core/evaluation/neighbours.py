"""Memorisation: samples that lie much nearer to training examples than held-out examples do were learnt by heart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.contract import DataSpec
from dgm_core.evaluation.examples import take, unit
from dgm_core.evaluation.record import Metric

if TYPE_CHECKING:
    from jaxtyping import Float

    from dgm_core.evaluation.work import Work

QUERIES = 64  # samples whose nearest neighbours are looked for


def step(work: Work) -> None:
    """Leaves `nearest`, the numbers of the training examples that lie nearest to the first samples."""
    if not work.enough:
        return
    spec, queries = work.spec, work.drawn.x[:QUERIES]
    # Codes are names: what counts is how many of them differ.
    order = 0.0 if spec.kind == "codes" else 2.0
    train, real = _flat(work.train.x, spec), _flat(take(iter([work.test]), QUERIES).x, spec)
    distance, work.nearest = torch.cdist(_flat(queries, spec), train, p=order).topk(
        min(work.options.neighbours, len(train)), largest=False
    )
    floor = torch.cdist(real, train, p=order).amin(1).median().clamp_min(1e-12)
    ratio = (distance[:, 0].median() / floor).item()
    about = "median distance of samples to their nearest training example, over that of held-out examples"
    work.add({"nearest_train_ratio": Metric.of(ratio, 1.0, n=len(queries), n_train=len(train), unit=about)})
    if ratio < 0.25 and spec.kind != "codes":  # a small grid of codes recurs without being learnt by heart
        work.warn(
            f"Samples lie {ratio:.2f} times as far from training examples as held-out examples do: the model may "
            "have learnt examples by heart, or it makes only the plainest ones. Look at the nearest neighbours."
        )


def _flat(x: Tensor, spec: DataSpec) -> Float[Tensor, " B D"]:
    return unit(x, spec).flatten(1).float()
