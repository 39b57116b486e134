"""What a model fills in where an example is hidden: the lower half of an image, the second half of a recording."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.capabilities import HasCompletion
from dgm_core.contract import Batch, DataMismatch, DataSpec, GenerativeModel
from dgm_core.evaluation.drawing import Display, grid, pictures
from dgm_core.evaluation.examples import chunks, take

if TYPE_CHECKING:
    from jaxtyping import Bool, Shaped

    from dgm_core.evaluation.work import Work

DRAWS = 5  # of each example
ROWS = {"image": 8, "audio": 4}
VEIL = torch.tensor([166, 196, 226], dtype=torch.uint8)  # over what is hidden: no grey of the data's own
HIDDEN = {"image": "the lower half", "audio": "the second half"}


def step(work: Work) -> None:
    model, spec, o = work.model, work.spec, work.options
    if not isinstance(model, HasCompletion) or spec.kind not in ROWS:
        return
    examples = take(iter([work.test]), min(ROWS[spec.kind], o.tiles))
    try:
        drawn = complete(model, examples, spec, DRAWS, o.batch_size)
    except DataMismatch as refusal:  # the model's own: an order in which what is shown does not come first
        work.warn(f"No completions are shown: {refusal}.")
        return
    hidden = HIDDEN[spec.kind]
    caption = f"Completions: the original (left), the same with {hidden} hidden, and {DRAWS} draws of what was hidden"
    work.show("completions.png", (sheet(examples.x, drawn, spec, work.display), caption))


def shown_first(spec: DataSpec) -> Bool[Tensor, " *shape"]:
    """True for the first half of an image's rows, or of a recording's samples."""
    axis = 1 if spec.kind == "image" else 0
    length = spec.shape[axis]
    seen = torch.arange(length) < length // 2
    return seen.view(-1, *(1,) * (len(spec.shape) - 1 - axis)).expand(spec.shape)


def complete(
    model: GenerativeModel, examples: Batch, spec: DataSpec, draws: int, batch_size: int
) -> Shaped[Tensor, " B draws *shape"]:
    """Each example's first half and so many draws of the rest, as stored, on the CPU."""
    assert isinstance(model, HasCompletion)
    seen = shown_first(spec).to(model.device)
    parts = [
        model.complete(b.x, seen.expand(b.x.shape), b.y if spec.classes else None, b.context).cpu()
        for b in chunks(examples.map(lambda t: t.repeat_interleave(draws, 0)), batch_size, model.device)
    ]
    return torch.cat(parts).unflatten(0, (-1, draws))


def sheet(x: Tensor, drawn: Tensor, spec: DataSpec, display: Display | None) -> bytes:
    """A row an example: the original, what the model was shown of it, its draws."""
    count, draws = drawn.shape[:2]
    whole = pictures(torch.cat([x.to(drawn.dtype), drawn.flatten(0, 1)]), spec, display)  # all on one scale
    original = whole[:count, None]
    seen = original.clone()
    axis = 3 if spec.kind == "image" else 4  # of a picture: down, or along the recording
    half = seen.shape[axis] // 2
    seen.narrow(axis, half, seen.shape[axis] - half).copy_(VEIL[:, None, None])
    rows = torch.cat([original, seen, whole[count:].unflatten(0, (count, draws))], 1)
    return grid(rows.flatten(0, 1), draws + 2, headed=True)
