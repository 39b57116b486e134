"""Figures, by what a model can do: PNG bytes and a caption each, or None where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.capabilities import (
    HasDecoder,
    HasEnergy,
    HasInverse,
    HasLikelihood,
    HasPosterior,
    HasReceptiveFields,
)
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.data import densities
from dgm_core.evaluation.drawing import Display, bars, blocks, coloured, grid, overlays, pictures, scatters
from dgm_core.evaluation.latents import posterior_means
from dgm_core.evaluation.sampling import decode_along

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Drawing = tuple[bytes, str] | None
SIDE = 200  # points along an edge of a density's heat map
STEPS = 9  # pictures along a traversal
ROWS = 8
REACH = 3.0  # standard deviations of the prior that a traversal spans on either side
TEMPERATURES = (0.7, 0.85, 1.0)


def tiled(x: Tensor, spec: DataSpec, tiles: int, display: Display | None, what: str) -> Drawing:
    """The first `tiles`² as a square sheet; of recordings, which are wide, half as many either way."""
    if spec.kind == "vector":
        return None
    tiles = max(2, tiles // 2) if spec.kind == "audio" else tiles
    shown = pictures(x[: tiles**2], spec, display)
    return grid(shown, tiles), f"{what} ({len(shown)})"


def by_class(x: Tensor, classes: int, spec: DataSpec, display: Display | None) -> Drawing:
    """Samples that were drawn class by class, a row each."""
    if spec.kind == "vector":
        return None
    return grid(pictures(x, spec, display), len(x) // classes), f"Samples by class: one row each, 0 to {classes - 1}"


def plane(
    model: GenerativeModel,
    real: Tensor,
    samples: Tensor,
    spec: DataSpec,
    *,
    by_labels: bool = False,
    batch_size: int = 4096,
) -> Drawing:
    """Vectors: on the plane, data, samples, the density that the data was drawn from, if it is known, and the model's;
    elsewhere, histograms of coordinates.

    Args:
        by_labels: the model goes by labels; its density is the mixture of them, by their shares.
    """
    if spec.kind != "vector":
        return None
    real, samples = real.double(), samples.double()
    if spec.dims != 2:
        return overlays(real, samples), "Histograms of the first coordinates: data and samples"
    left, right, bottom, top = box = _frame(real)
    points = torch.cartesian_prod(torch.linspace(bottom, top, SIDE), torch.linspace(left, right, SIDE)).flip(1)
    truth = densities.named(**spec.density).log_prob(points.double()) if spec.density else None
    shown = [] if truth is None else [("the true density", truth)]
    if spec.levels is None and isinstance(model, HasEnergy | HasLikelihood):
        parts = (part.to(model.device, spec.dtype) for part in points.split(batch_size))
        log_p = torch.cat([_log_density(model, x, spec, by_labels).double().cpu() for x in parts])
        shown.append(("the model's density", log_p.nan_to_num(-math.inf)))
    # Likelihoods are densities on the truth's own scale; an energy has a scale of its own.
    brightest = None if truth is None or isinstance(model, HasEnergy) else truth.max()
    heats = [(name, _heat(log_p, brightest).view(SIDE, SIDE)) for name, log_p in shown]
    alike = "" if brightest is None else " in the same colours"
    caption = "Data and samples" + "".join(f", {name}" for name, _ in heats) + alike * (len(heats) > 1)
    count = min(len(real), len(samples))  # as many of both: what is denser is then not a matter of numbers
    return scatters([("data", real[:count]), ("samples", samples[:count])], box, heats), caption


def temperatures(
    model: GenerativeModel,
    draw_at: Callable[[float], Tensor],
    real: Tensor,
    spec: DataSpec,
    columns: int,
    display: Display | None,
) -> Drawing:
    """Of models with an inverse whose `sample` takes a temperature: the same draws of the latent at each one.

    Args:
        draw_at: temperature -> samples, from one and the same random stream.
        real: vectors whose frame is used.
    """
    if not isinstance(model, HasInverse) or "temperature" not in model.sample_options():
        return None
    if spec.kind != "image" and (spec.kind != "vector" or spec.dims != 2):
        return None
    drawn = [(f"temperature {t:g}", draw_at(t)) for t in TEMPERATURES]
    caption = "The same draws of the latent at temperatures " + ", ".join(f"{t:g}" for t in TEMPERATURES)
    if spec.kind == "vector":
        return scatters([(name, x.double()) for name, x in drawn], _frame(real.double())), caption
    return blocks([(name, pictures(x, spec, display)) for name, x in drawn], columns), caption


def traversals(
    model: GenerativeModel, examples: Batch, spec: DataSpec, display: Display | None, kl: Tensor | None = None
) -> Drawing:
    """One latent dimension a row, from −3 to 3 of the prior's standard deviations, the others as they are."""
    if spec.kind == "vector" or not isinstance(model, HasDecoder):
        return None
    one = examples.rows(slice(0, 1))
    z = posterior_means(model, one, 1)[0] if isinstance(model, HasPosterior) else model.draw_latent(1).cpu()
    if z.ndim != 2 or (kl is None and z.shape[1] > 64):
        return None  # a flow's or a large generator's coordinates mean nothing one by one
    order = torch.arange(z.shape[1]) if kl is None else kl.argsort(descending=True)
    dims = order[: min(ROWS, z.shape[1])]
    path = z.repeat(len(dims), STEPS, 1)
    path[torch.arange(len(dims)), :, dims] = torch.linspace(-REACH, REACH, STEPS, dtype=z.dtype)
    which = ", ".join(str(d) for d in dims.tolist())
    by = "those of the greatest KL" if kl is not None else "the first"
    caption = f"Traversals from {-REACH:g} to {REACH:g} of latent dimensions {which} ({by}), one a row"
    return grid(pictures(decode_along(model, path, one, spec), spec, display), STEPS), caption


def code_usage(counts: Mapping[str, Int[Tensor, " size"]]) -> Drawing:
    """How often each code is used, most used first; the dashed line is equal use."""
    if not counts:
        return None
    panels = [(level, c.sort(descending=True).values / c.sum() * len(c)) for level, c in counts.items()]
    return bars(panels, "code, most used first", "use, of an equal share", mark=1.0), "Code usage by level"


def kl_bars(kl: Float[Tensor, " latents"]) -> Drawing:
    """KL a latent dimension, greatest first."""
    panels = [("KL(q(z | x) ‖ p(z))", kl.sort(descending=True).values)]
    return bars(panels, "latent dimension, greatest first", "nats"), "KL by latent dimension, mean over test examples"


def receptive_fields(model: GenerativeModel, spec: DataSpec, tiles: int) -> Drawing:
    """Of hidden units that a matrix joins to an image's pixels, longest first."""
    fields = model.receptive_fields() if isinstance(model, HasReceptiveFields) and spec.kind == "image" else None
    if fields is None:
        return None
    fields = fields.detach().cpu().double()
    fields = fields[fields.flatten(1).norm(dim=1).argsort(descending=True, stable=True)[: tiles**2]].mean(1)
    fields = fields / fields.abs().amax((1, 2), keepdim=True).clamp_min(1e-12)
    caption = f"Receptive fields of {len(fields)} hidden units: red excites, blue inhibits, each on its own scale"
    return grid(coloured(0.5 - 0.5 * fields, "RdBu"), tiles), caption


def neighbours(
    samples: Tensor, train: Tensor, found: Int[Tensor, " n k"], spec: DataSpec, display: Display | None
) -> Drawing:
    """Samples in the first column, their nearest training examples beside them."""
    if spec.kind == "vector":
        return None
    rows = torch.cat([samples[:, None].to(train.dtype), train[found]], 1).flatten(0, 1)
    shown = pictures(rows, spec, display)
    return grid(shown, found.shape[1] + 1, headed=True), "Samples (left) and their nearest training examples"


def _frame(points: Float[Tensor, " n 2"]) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a picture of these points, with some room."""
    low, high = points.amin(0), points.amax(0)
    room = 0.15 * (high - low).clamp_min(1e-6)
    (left, bottom), (right, top) = (low - room).tolist(), (high + room).tolist()
    return left, right, bottom, top


def _log_density(model: HasEnergy | HasLikelihood, x: Tensor, spec: DataSpec, by_labels: bool) -> Float[Tensor, " B"]:
    """Nats, up to a constant if it is an energy's."""
    if isinstance(model, HasEnergy):
        return -model.free_energy(x)
    if not by_labels:
        return model.log_prob(x)
    shares = x.new_tensor(spec.class_shares or [1 / spec.classes] * spec.classes)
    labels = torch.arange(spec.classes, device=x.device)
    parts = [model.log_prob(x, label.expand(len(x))) + share.log() for label, share in zip(labels, shares, strict=True)]
    return torch.stack(parts).logsumexp(0)


def _heat(log_p: Float[Tensor, " n"], brightest: Tensor | None) -> Float[Tensor, " n"]:
    """The density over its greatest value, or over e to the power of `brightest`."""
    return (log_p - (log_p.max() if brightest is None else brightest)).exp().clamp(0, 1)
