"""What single coordinates cost sums to what the whole costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.evaluation.conditionals import pixel_bits
from dgm_core.models import CATALOG
from dgm_core.models.autoregressive.base import RasterModel

GREY, COLOUR, SOUND = DataSpec("image", (1, 4, 4), 2), DataSpec("image", (3, 4, 4), 8), DataSpec("audio", (16,), 8)


def build(name: str, spec: DataSpec, **changes: Any) -> RasterModel:
    torch.manual_seed(0)
    model_class = CATALOG[name]
    model = model_class(model_class.tiny(spec)[0].merged(changes), spec).double().eval()
    assert isinstance(model, RasterModel)
    with torch.no_grad():
        for p in model.parameters():  # last layers start at zero: every coordinate would cost the same
            p += 0.1 * torch.randn_like(p)
    return model


CASES = [
    ("made", GREY, {}),
    ("row_lstm", GREY, {}),
    ("pixel_cnn", COLOUR, {}),
    ("gated_pixel_cnn", COLOUR, {}),
    ("pixel_cnn_pp", COLOUR, {}),
    ("pixel_snail", GREY, {}),
    ("wavenet", SOUND, {}),
    ("wavenet", SOUND, {"output": "logistic_mixture"}),
]


@pytest.mark.parametrize(("name", "spec", "changes"), CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_coordinates_sum_to_the_whole(name: str, spec: DataSpec, changes: dict[str, Any]):
    model = build(name, spec, **changes)
    x = torch.randint(0, spec.levels or 0, (3, *spec.shape)).to(spec.dtype)
    with torch.no_grad():
        parts, whole = model.log_conditionals(x), model.log_prob(x)
    grid = (4, 4) if spec.kind == "image" else (1, 16)
    assert parts.shape == (3, 1 if name == "pixel_cnn_pp" else spec.shape[0] if spec.kind == "image" else 1, *grid)
    assert torch.allclose(parts.flatten(1).sum(1), whole, rtol=1e-12)  # the same numbers in another order
    assert parts.flatten(1).std(1).min() > 1e-3  # and not a share for each alike


@pytest.mark.parametrize("name", ["made", "gated_pixel_cnn"])
def test_a_coordinates_cost_depends_on_none_after_it(name: str):
    model = build(name, GREY)
    x = torch.randint(0, 2, (1, 1, 4, 4)).to(torch.uint8)
    later = x.clone()
    later[..., 2, 1] = 1 - later[..., 2, 1]
    with torch.no_grad():
        a, b = model.log_conditionals(x).flatten(), model.log_conditionals(later).flatten()
    assert torch.allclose(a[:9], b[:9], rtol=1e-12)
    assert not torch.allclose(a[9], b[9])


def test_a_map_holds_the_mean_bits_of_each_pixel():
    model = build("gated_pixel_cnn", COLOUR)
    x = torch.randint(0, 8, (7, *COLOUR.shape)).to(torch.uint8)
    with torch.no_grad():
        bits = pixel_bits(model, Batch(x), 3)
        expected = -model.log_conditionals(x).sum(1).mean(0) / math.log(2)
    assert bits.shape == (4, 4)
    assert torch.allclose(bits, expected, rtol=1e-12)


def test_a_mixture_over_orders_has_no_conditionals():
    model = build("made", GREY, orders=2)
    with pytest.raises(DataMismatch, match="mixture over 2 orders"):
        model.log_conditionals(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
