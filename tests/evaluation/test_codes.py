"""Codebook statistics of histograms that are known."""

from __future__ import annotations

import math

import pytest
import torch

from dgm_core.contract import DataSpec
from dgm_core.evaluation import codes
from tests.evaluation.handmade import IMAGES, Everything, images


def test_equal_use_has_the_perplexity_of_the_codebook():
    counts = torch.full((64,), 7)
    assert codes.usage(counts) == 1
    assert codes.perplexity(counts) == pytest.approx(64)


def test_one_code_alone():
    counts = torch.tensor([0, 9, 0, 0])
    assert codes.usage(counts) == 0.25
    assert codes.perplexity(counts) == pytest.approx(1)


def test_a_half_and_two_quarters():
    counts = torch.tensor([4, 2, 2, 0])
    assert codes.entropy(counts) == pytest.approx(1.5 * math.log(2))
    assert codes.perplexity(counts) == pytest.approx(2**1.5)
    assert codes.usage(counts) == 0.75


def test_marginal_bits():
    """Training counts (3, 1) with one added to each give (2/3, 1/3); the test has equal use."""
    got = codes.marginal_bits(torch.tensor([3, 1]), torch.tensor([5, 5]))
    assert got == pytest.approx(0.5 * math.log2(3 / 2) + 0.5 * math.log2(3))
    # A test code that training never showed is dear, not impossible.
    assert math.isfinite(codes.marginal_bits(torch.tensor([3, 0]), torch.tensor([0, 5])))


def test_reduction_of_the_vq_vae_paper():
    """128 × 128 × 3 bytes as 32 × 32 codes of 512: 42.7 (the paper's "approximately 42.6")."""
    image = DataSpec("image", (3, 128, 128), 256)
    assert codes.reduction(image, {"z": DataSpec("codes", (32, 32), 512)}) == pytest.approx(42.667, abs=1e-3)


def test_metrics_and_the_warning_of_collapse():
    model, batch = Everything(), images(200)
    found = codes.encode(model, batch, 64)
    assert found["top"].shape == (200, 2)
    metrics, counts, warnings = codes.code_metrics(model, IMAGES, found)
    assert int(counts["top"].sum()) == 400
    assert metrics["codes/top/usage"].value == codes.usage(counts["top"])
    assert warnings == []
    _, _, warnings = codes.code_metrics(model, IMAGES, {"top": torch.zeros(200, 2)})
    assert len(warnings) == 1
    assert "collapsed" in warnings[0]
