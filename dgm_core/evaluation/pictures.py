"""The pictures that most models have: examples, samples, what lies between two latents, charts of what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.contract import Batch
from dgm_core.evaluation import figures
from dgm_core.evaluation.examples import seeded, take
from dgm_core.evaluation.sampling import draw

if TYPE_CHECKING:
    from dgm_core.evaluation.work import Work

CLASSES_SHOWN = 20
ROWS_OF_A_TEMPERATURE = 3


def step(work: Work) -> None:
    model, spec, test, o, shown = work.model, work.spec, work.test, work.options, work.display
    mixed = take(iter([test]), o.tiles**2)
    work.show("real.png", figures.tiled(mixed.x, spec, o.tiles, shown, f"Examples of the {o.split} split"))
    if work.reconstructed is not None:
        again = take(iter([Batch(work.reconstructed)]), o.tiles**2).x
        work.show("reconstructed.png", figures.tiled(again, spec, o.tiles, shown, "The same examples, reconstructed"))
    if work.enough:
        work.show("samples.png", figures.tiled(work.drawn.x, spec, o.tiles, shown, "Samples"))
        if work.means is not None:
            what = "Means decoded from draws of the prior"
            work.show("sample_means.png", figures.tiled(work.means, spec, o.tiles, shown, what))
        plane = figures.plane(model, test.x, work.drawn.x, spec, by_labels=work.by_labels)
        work.show("density.png" if spec.dims == 2 else "coordinates.png", plane)
        few = slice(0, o.tiles)
        found = figures.neighbours(work.drawn.x[few], work.train.x, work.nearest[few], spec, shown)
        work.show("neighbours.png", found)
    if work.by_labels and spec.kind != "vector" and not spec.context:
        classes = min(spec.classes, CLASSES_SHOWN)
        labels = torch.arange(classes).repeat_interleave(o.tiles)
        x = draw(model, len(labels), test, o.sampling, o.batch_size, labels=labels).x
        work.show("samples_by_class.png", figures.by_class(x, classes, spec, shown))

    def draw_at(temperature: float) -> Tensor:
        """From the same random stream each time."""
        n = o.samples if spec.kind == "vector" else ROWS_OF_A_TEMPERATURE * o.tiles
        sampling = {**o.sampling, "temperature": temperature}
        with seeded(work.seed):
            return draw(model, n, test, sampling, o.batch_size, by_labels=work.by_labels).x

    work.show("temperatures.png", figures.temperatures(model, draw_at, test.x, spec, o.tiles, shown))
    work.show("traversals.png", figures.traversals(model, mixed, spec, shown, work.kl))
    if work.kl is not None:
        work.show("kl.png", figures.kl_bars(work.kl))
    work.show("code_usage.png", figures.code_usage(work.counts))
    work.show("receptive_fields.png", figures.receptive_fields(model, spec, o.tiles))
