"""Oracles for small machines: every state, conditionals read off a joint table, frequencies and Pearson's statistic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgm_core.nn.rbm import all_states


def states(units: int) -> Tensor:
    """Every state of some binary units, as float64 rows."""
    return torch.cat(list(all_states(units, torch.device("cpu")))).double()


def pairs(*sides: Tensor) -> list[Tensor]:
    """Rows for every combination of a row of each."""
    index = torch.cartesian_prod(*[torch.arange(len(side)) for side in sides]).view(-1, len(sides))
    return [side[index[:, i]] for i, side in enumerate(sides)]


def log_bernoulli(h: Tensor, p: Tensor) -> Tensor:
    return (h * p.log() + (1 - h) * (1 - p).log()).sum(-1)


def randomise(model: torch.nn.Module, scale: float = 1.0) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, scale)


def frequencies(x: Tensor) -> Tensor:
    """Share of each state among rows of bits."""
    x = x.flatten(1).long()
    code = (x << torch.arange(x.shape[1])).sum(1)
    return torch.bincount(code, minlength=2 ** x.shape[1]).double() / len(x)


def assert_same_distribution(found: Tensor, expected: Tensor, n: int) -> None:
    """Pearson's statistic of n draws stays within six deviations of its mean: chance of a false alarm below 1e-6."""
    expected = expected.detach()
    statistic = n * ((found - expected).square() / expected).sum()
    freedom = len(expected) - 1
    # With cells of small expectation the statistic's variance is greater by Σ 1/(n p).
    variance = 2 * freedom + (1 / (n * expected)).sum()
    assert statistic < freedom + 6 * math.sqrt(variance)


def assert_reversible(p: Tensor, kernel: Tensor) -> None:
    """Detailed balance, and so stationarity."""
    flow = p[:, None] * kernel
    assert torch.allclose(flow, flow.T, atol=1e-12)
    assert torch.allclose(p @ kernel, p, atol=1e-12)


def assert_mean_is(values: Tensor, expected: Tensor | float) -> None:
    """Within six standard errors."""
    assert abs(values.mean() - expected) < 6 * values.std() / math.sqrt(len(values))
