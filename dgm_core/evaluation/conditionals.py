"""Where a model of conditionals spends its bits: what each pixel costs given those before it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.capabilities import HasConditionals
from dgm_core.contract import Batch, DataMismatch, GenerativeModel
from dgm_core.evaluation.drawing import heat_map
from dgm_core.evaluation.examples import chunks, take

if TYPE_CHECKING:
    from jaxtyping import Float

    from dgm_core.evaluation.work import Work

EXAMPLES = 256  # a mean over as many is smooth


def step(work: Work) -> None:
    model, spec = work.model, work.spec
    if not isinstance(model, HasConditionals) or spec.kind not in ("image", "codes") or len(spec.shape) < 2:
        return
    examples = take(iter([work.test]), EXAMPLES)
    try:
        bits = pixel_bits(model, examples, work.options.batch_size)
    except DataMismatch as refusal:  # the model's own: a mixture over orders has no conditionals
        work.warn(f"Bits of single pixels are not shown: {refusal}.")
        return
    what = "code" if spec.kind == "codes" else "pixel"
    caption = (
        f"Bits that each {what} costs given those before it, mean over {len(examples.x)} {work.options.split} "
        f"examples: {bits.sum().item():.4g} in all, {bits.max().item():.3g} at most"
    )
    work.show("bits.png", (heat_map(bits, f"bits a {what}"), caption))


def pixel_bits(model: GenerativeModel, examples: Batch, batch_size: int) -> Float[Tensor, " H W"]:
    """Mean over examples, sum over channels."""
    assert isinstance(model, HasConditionals)
    total: Tensor | float = 0.0
    for part in chunks(examples, batch_size, model.device):
        total = total - model.log_conditionals(part.x, part.y, part.context).sum((0, 1)).double().cpu()
    assert isinstance(total, torch.Tensor)
    return total / (len(examples.x) * math.log(2))
