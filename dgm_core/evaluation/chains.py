"""Gibbs chains over time: how fast a chain forgets where it started, and whether it goes from mode to mode."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.capabilities import HasGibbs
from dgm_core.contract import GenerativeModel
from dgm_core.evaluation.drawing import blocks, pictures
from dgm_core.evaluation.examples import take

if TYPE_CHECKING:
    from jaxtyping import Shaped

    from dgm_core.evaluation.work import Work

STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
ROWS = 4  # chains of each kind


def step(work: Work) -> None:
    model, spec = work.model, work.spec
    if not isinstance(model, HasGibbs) or spec.kind == "vector":
        return
    starts = {
        "from held-out examples": take(iter([work.test]), ROWS).x,
        "from noise: each coordinate of another training example": independent(work.train.x, ROWS),
    }
    shown = [(name, pictures(over_time(model, x).flatten(0, 1), spec, work.display)) for name, x in starts.items()]
    caption = "Gibbs chains, one a row, after " + ", ".join(str(k) for k in STEPS) + " steps"
    work.show("chains.png", (blocks(shown, len(STEPS)), caption))


def independent(x: Shaped[Tensor, " n *shape"], rows: int) -> Shaped[Tensor, " rows *shape"]:
    """Each coordinate by itself as in the data."""
    flat = x.flatten(1)
    return flat.gather(0, torch.randint(len(x), (rows, flat.shape[1]))).unflatten(1, x.shape[1:])


def over_time(model: GenerativeModel, x: Tensor) -> Shaped[Tensor, " rows steps *shape"]:
    """Chains from `x` after each of STEPS, as stored, on the CPU."""
    assert isinstance(model, HasGibbs)
    kept = [x]
    for k, state in zip(count(1), model.chain(x.to(model.device)), strict=False):
        if k in STEPS:
            kept.append(state.cpu().to(x.dtype))
        if k == STEPS[-1]:
            break
    return torch.stack(kept, 1)
