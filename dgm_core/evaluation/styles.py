"""What a generator's own controls do: truncation, and styles of two samples crossed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dgm_core.capabilities import HasDecoder, HasStyles
from dgm_core.evaluation.drawing import blocks, pictures
from dgm_core.evaluation.examples import seeded
from dgm_core.evaluation.sampling import draw

if TYPE_CHECKING:
    from dgm_core.evaluation.work import Work

TRUNCATIONS = (0.2, 0.5, 1.0)
ROWS_OF_A_TRUNCATION = 2
COARSE, FINE = 4, 6  # samples that give the styles of coarse layers, and of fine ones


def step(work: Work) -> None:
    if work.spec.kind == "image":
        _truncations(work)
        _crossed(work)


def _truncations(work: Work) -> None:
    """The same draws at each truncation, the model's own setting last."""
    model, o = work.model, work.options
    known = model.sample_options()
    if "truncation" not in known:
        return
    own = known["truncation"]
    panels = []
    for value in [*TRUNCATIONS, *([] if own in TRUNCATIONS else [own])]:
        with seeded(work.seed):
            sampling = {**o.sampling, "truncation": value}
            n = ROWS_OF_A_TRUNCATION * o.tiles
            x = draw(model, n, work.test, sampling, o.batch_size, by_labels=work.by_labels).x
        name = "no truncation" if value is None else f"truncation {value:g}"
        panels.append((name, pictures(x, work.spec, work.display)))
    last = ", and other draws without" if own is None else ""
    caption = f"The same draws at several truncations{last}: the nearer to 0, the more usual and alike the samples"
    work.show("truncations.png", (blocks(panels, o.tiles), caption))


def _crossed(work: Work) -> None:
    """Figure 3 of the StyleGAN paper, at three layers."""
    model = work.model
    if not isinstance(model, HasStyles) or model.style_layers < 2:
        return
    assert isinstance(model, HasDecoder)
    layers = model.style_layers
    coarse, fine = model.draw_latent(COARSE), model.draw_latent(FINE)
    rows, columns = coarse.repeat_interleave(FINE, 0), fine.repeat(COARSE, 1)
    alone = model.decode_mixed(torch.cat([coarse, fine]), torch.cat([coarse, fine]), 0)
    panels = []
    for cut in sorted({max(1, layers * quarter // 4) for quarter in (1, 2, 3)}):
        crossed = model.decode_mixed(rows, columns, cut)
        shown = pictures(torch.cat([alone, crossed]).cpu(), work.spec, work.display)
        left, top, body = shown.split([COARSE, FINE, COARSE * FINE])
        corner = torch.full_like(left[:1], 255)
        sheet = [torch.cat([corner, top])]
        sheet += [torch.cat([left[i : i + 1], body[i * FINE : (i + 1) * FINE]]) for i in range(COARSE)]
        panels.append((f"layers 1 to {cut} from the left, {cut + 1} to {layers} from above", torch.cat(sheet)))
    caption = "Styles crossed: coarse layers in the style of the sample on the left, the others of the one above"
    work.show("style_mixing.png", (blocks(panels, FINE + 1), caption))
