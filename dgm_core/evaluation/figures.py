"""Figures, by what a model can do: PNG bytes and a caption each, or None where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.capabilities import HasDecoder, HasEnergy, HasInverse, HasLikelihood, HasPosterior
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.data import densities
from dgm_core.evaluation.drawing import Display, bars, blocks, coloured, grid, overlays, pictures, scatters
from dgm_core.evaluation.examples import take
from dgm_core.evaluation.latents import posterior_means
from dgm_core.evaluation.sampling import cycled

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Drawing = tuple[bytes, str] | None
SIDE = 200  # points along an edge of a density's heat map
STEPS = 9  # pictures along an interpolation or a traversal
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


def interpolations(
    model: GenerativeModel, examples: Batch, spec: DataSpec, display: Display | None, *, by_labels: bool = False
) -> Drawing:
    """Between the latents of two test examples, along a line if they come from a posterior and along the sphere if
    from an inverse; between two draws of the latent where the model has neither.

    Args:
        by_labels: the model goes by labels, so that a row keeps to one: its ends are of one class.
    """
    if spec.kind == "vector" or not isinstance(model, HasDecoder):
        return None
    first, second = _ends(examples, by_labels)
    rows = first.x.shape[0]
    t = torch.linspace(0, 1, STEPS)
    if isinstance(model, HasPosterior):
        a, b = (posterior_means(model, ends, rows)[0] for ends in (first, second))
        path = torch.stack([a + s * (b - a) for s in t], 1)
        caption = "Interpolations between two test examples a row, along a line between their latents"
    elif isinstance(model, HasInverse):
        a, b = (model.to_latent(*ends.to(model.device)[:2]).cpu() for ends in (first, second))
        path = torch.stack([_slerp(a, b, s) for s in t.tolist()], 1)
        caption = "Interpolations between two test examples a row, along the sphere between their latents"
    else:
        a, b = model.draw_latent(2 * rows).cpu().chunk(2)
        path = torch.stack([_slerp(a, b, s) for s in t.tolist()], 1)
        caption = "Interpolations between two draws of the latent a row, along the sphere"
    return _decoded(model, path, first, spec, display), caption


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
    return _decoded(model, path, one, spec, display), caption


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
    """Of an energy model's hidden units: the columns of its matrix between data and hidden units, longest first."""
    if not isinstance(model, HasEnergy) or spec.kind != "image":
        return None
    for parameter in model.parameters():
        if parameter.ndim == 2 and spec.dims in parameter.shape:
            weight = parameter.detach().cpu().double()
            fields = weight.T if weight.shape[0] == spec.dims else weight
            break
    else:
        return None
    fields = fields[fields.norm(dim=1).argsort(descending=True, stable=True)[: tiles**2]]
    fields = fields.unflatten(1, spec.shape).mean(1)
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


def _ends(examples: Batch, by_labels: bool) -> tuple[Batch, Batch]:
    """Two examples a row."""
    if by_labels and examples.y is not None:
        classes = [(examples.y == label).nonzero()[:, 0] for label in examples.y.unique()]
        pairs = torch.stack([members[[0, -1]] for members in classes])[:ROWS]
        return examples.rows(pairs[:, 0]), examples.rows(pairs[:, 1])
    rows = min(ROWS, examples.x.shape[0] // 2)
    examples = take(iter([examples]), 2 * rows)  # ends far apart in a split that is stored class by class
    return examples.rows(slice(0, rows)), examples.rows(slice(rows, 2 * rows))


def _decoded(model: GenerativeModel, path: Tensor, examples: Batch, spec: DataSpec, display: Display | None) -> bytes:
    assert isinstance(model, HasDecoder)
    rows, steps = path.shape[:2]
    along = examples.map(lambda t: cycled(t, rows).repeat_interleave(steps, 0)).to(model.device)
    y = along.y if spec.classes else None
    decoded = model.decode(path.flatten(0, 1).to(model.device), y, along.context).cpu()
    return grid(pictures(decoded, spec, display), steps)


def _slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Along the great circle: a straight line between two Gaussian draws passes where no draws are."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.arccos(cosine)[:, None]
    mixed = (torch.sin((1 - t) * angle) * flat_a + torch.sin(t * angle) * flat_b) / torch.sin(angle)
    return mixed.view_as(a)
