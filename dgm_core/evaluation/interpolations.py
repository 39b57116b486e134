"""What lies between two latents: as a sheet, and as pictures that move."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dgm_core.capabilities import HasDecoder, HasInverse, HasPosterior
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.evaluation.drawing import Display, animation, grid, pictures
from dgm_core.evaluation.examples import take
from dgm_core.evaluation.latents import posterior_means
from dgm_core.evaluation.sampling import decode_along

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

    from dgm_core.evaluation.work import Work

STEPS = 9  # pictures along an interpolation on the sheet
BETWEEN = 2  # frames of the animation for each of them
ROWS = 8


class Between(NamedTuple):
    """Pictures along the way from one latent to another, a row each, and in words what they are."""

    shown: UInt8[Tensor, " rows steps 3 H W"]
    caption: str


def step(work: Work) -> None:
    model, spec = work.model, work.spec
    if spec.kind == "vector" or not isinstance(model, HasDecoder):
        return
    steps = (STEPS - 1) * BETWEEN + 1 if spec.kind == "image" else STEPS
    found = interpolations(model, work.test, spec, work.display, by_labels=work.by_labels, steps=steps)
    sheet = found.shown if steps == STEPS else found.shown[:, ::BETWEEN]
    work.show("interpolations.png", (grid(sheet.flatten(0, 1), STEPS), found.caption))
    if spec.kind == "image":
        there_and_back = torch.cat([found.shown, found.shown[:, 1:-1].flip(1)], 1)
        work.show("interpolations.gif", (animation(there_and_back, 4), f"{found.caption}: the same, moving"))


def interpolations(
    model: GenerativeModel,
    examples: Batch,
    spec: DataSpec,
    display: Display | None,
    *,
    by_labels: bool = False,
    steps: int = STEPS,
) -> Between:
    """Between the latents of two test examples, along a line if they come from a posterior and along the sphere if
    from an inverse; between two draws of the latent where the model has neither.

    Args:
        by_labels: the model goes by labels, so that a row keeps to one: its ends are of one class.
    """
    assert isinstance(model, HasDecoder)
    first, second = ends(examples, by_labels)
    rows = first.x.shape[0]
    t = torch.linspace(0, 1, steps)
    if isinstance(model, HasPosterior):
        a, b = (posterior_means(model, end, rows)[0] for end in (first, second))
        path = torch.stack([a + s * (b - a) for s in t], 1)
        caption = "Interpolations between two test examples a row, along a line between their latents"
    elif isinstance(model, HasInverse):
        a, b = (model.to_latent(*end.to(model.device)[:2]).cpu() for end in (first, second))
        path = torch.stack([_slerp(a, b, s) for s in t.tolist()], 1)
        caption = "Interpolations between two test examples a row, along the sphere between their latents"
    else:
        a, b = model.draw_latent(2 * rows).cpu().chunk(2)
        path = torch.stack([_slerp(a, b, s) for s in t.tolist()], 1)
        caption = "Interpolations between two draws of the latent a row, along the sphere"
    shown = pictures(decode_along(model, path, first, spec), spec, display)
    return Between(shown.unflatten(0, (rows, steps)), caption)


def ends(examples: Batch, by_labels: bool) -> tuple[Batch, Batch]:
    """Two examples a row."""
    if by_labels and examples.y is not None:
        classes = [(examples.y == label).nonzero()[:, 0] for label in examples.y.unique()]
        pairs = torch.stack([members[[0, -1]] for members in classes])[:ROWS]
        return examples.rows(pairs[:, 0]), examples.rows(pairs[:, 1])
    rows = min(ROWS, examples.x.shape[0] // 2)
    examples = take(iter([examples]), 2 * rows)  # ends far apart in a split that is stored class by class
    return examples.rows(slice(0, rows)), examples.rows(slice(rows, 2 * rows))


def _slerp(a: Tensor, b: Tensor, t: float) -> Float[Tensor, " rows *latent"]:
    """Along the great circle: a straight line between two Gaussian draws passes where no draws are."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.arccos(cosine)[:, None]
    mixed = (torch.sin((1 - t) * angle) * flat_a + torch.sin(t * angle) * flat_b) / torch.sin(angle)
    return mixed.view_as(a)
