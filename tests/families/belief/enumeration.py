"""Small nets in float64 with every state written out: the oracle of this folder's tests. Shares no formula with the
library: probabilities are products of σ(±z)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.belief import RecognitionNet, SigmoidBeliefNet


def states(*units: int) -> list[Tensor]:
    """Every joint state of layers of these sizes: one (states, units) a layer."""
    total = sum(units)
    code = torch.arange(2**total)
    bits = ((code[:, None] >> torch.arange(total)) & 1).double()
    return list(bits.split(list(units), 1))


def randomise(module: nn.Module, scale: float = 1.0, seed: int = 0) -> None:
    """Parameters of order `scale`."""
    torch.manual_seed(seed)
    module.double()
    for p in module.parameters():
        p.data = scale * torch.randn_like(p)


def net(*sizes: int, scale: float = 1.0, seed: int = 0) -> SigmoidBeliefNet:
    made = SigmoidBeliefNet(sizes)
    randomise(made, scale, seed)
    return made


def log_p(generative: SigmoidBeliefNet, layers: Sequence[Tensor]) -> Tensor:
    """log p(x, h¹, …, h^L), differentiable."""
    total = _log_sigmoid(layers[-1], generative.prior)
    for layer, (below, above) in zip(generative.layers, pairwise(layers), strict=True):
        total = total + _log_sigmoid(below, above @ layer.weight.T + layer.bias)
    return total


def log_q(recognition: RecognitionNet, layers: Sequence[Tensor]) -> Tensor:
    """log q(h¹, …, h^L | x), differentiable."""
    below = [layers[0] - recognition.mean, *layers[1:-1]]
    parts = zip(recognition.layers, below, layers[1:], strict=True)
    return torch.stack([_log_sigmoid(h, b @ layer.weight.T + layer.bias) for layer, b, h in parts]).sum(0)


def given(x: Tensor, hidden: Sequence[Tensor]) -> list[Tensor]:
    """One x beside every hidden state."""
    return [x.double().expand(len(hidden[0]), -1), *hidden]


def sweep_matrix(generative: SigmoidBeliefNet, x: Tensor, hidden: Sequence[Tensor]) -> Tensor:
    """T(h, h') of one Gibbs sweep given x: units in turn from the lowest layer up, each by the joint's own odds."""
    posterior = log_p(generative, given(x, hidden)).softmax(0)
    total = sum(h.shape[1] for h in hidden)
    code, T = torch.arange(2**total), torch.eye(2**total, dtype=torch.float64)
    for bit in range(total):
        flipped = code ^ (1 << bit)
        stays = posterior / (posterior + posterior[flipped])
        unit = torch.zeros_like(T)
        unit[code, code], unit[code, flipped] = stays, 1 - stays
        T = T @ unit
    return T.detach()


def frequencies(layers: Sequence[Tensor]) -> Tensor:
    """Share of each joint state, in the order of `states`."""
    bits = torch.cat([h.flatten(1) for h in layers], 1).long()
    code = (bits << torch.arange(bits.shape[1])).sum(1)
    return torch.bincount(code, minlength=2 ** bits.shape[1]).double() / len(bits)


def assert_same_distribution(found: Tensor, expected: Tensor, n: int) -> None:
    """Pearson's statistic of n draws stays within six deviations of its mean: chance of a false alarm below 1e-6.

    States expected fewer than five times are counted as one, where the statistic would not be chi-squared.
    """
    common = n * expected >= 5
    found, expected = (torch.cat([p[common], p[~common].sum()[None]]) for p in (found, expected))
    kept = expected > 0
    freedom = int(kept.sum()) - 1
    assert found[~kept].sum() == 0
    statistic = n * ((found - expected).square()[kept] / expected[kept]).sum()
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def gradients(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """All in one vector; zero where there is none."""
    found = torch.autograd.grad(value, list(parameters), allow_unused=True, retain_graph=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, parameters, strict=True)]
    )


def assert_mean(blocks: Sequence[Tensor], expected: Tensor) -> None:
    """The mean of independent blocks is `expected`: every coordinate within six standard errors, taken from the blocks
    themselves. Of up to a hundred coordinates none fails by chance (below 1e-5 for Student's t with 99 degrees)."""
    found = torch.stack(list(blocks))
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected).abs() <= 6 * error + 1e-12).all()


def _log_sigmoid(h: Tensor, z: Tensor) -> Tensor:
    return F.logsigmoid((2 * h - 1) * z).sum(-1)
