"""Sigmoid belief nets: the generative net, its exact joint and likelihood, Gibbs sampling, and the recognition net.

With h⁰ = x the units of layer l are independent given layer l + 1, and those of the top layer L are independent:

    p(h^l_i = 1 | h^{l+1}) = σ(z_i),  z^l = b^l + W^l h^{l+1},  z^L = c,
    log p(x, h) = Σ_l Σ_i h^l_i z^l_i − softplus(z^l_i).

The recognition net turns the arrows round: q(h | x) = Π_l q(h^l | h^{l−1}), each layer factorised given the one below.
States are floats in {0, 1} with any leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.rbm import all_states, draw_bernoulli
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float

ENUMERABLE = 16  # hidden units, all layers together
_RARE = 1e-3  # a pixel that never lights in the training split may still light in the test split


class SigmoidBeliefNet(nn.Module):
    """`sizes` units a layer, from the visible layer up."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.layers = nn.ModuleList(nn.Linear(above, below) for below, above in pairwise(self.sizes))
        self.prior = nn.Parameter(torch.zeros(self.sizes[-1]))  # c
        _start(self.layers)

    def inputs(self, level: int, above: Float[Tensor, " *B n"]) -> Float[Tensor, " *B m"]:
        """z of layer `level`, given (means of) the layer above."""
        return promote(self.layers[level](above.to(self.prior.dtype)))

    def log_terms(self, states: Sequence[Float[Tensor, " *B n"]], level: int = 0) -> Float[Tensor, " *B layers"]:
        """log p(x | h¹), …, log p(h^{L−1} | h^L), log p(h^L); `states` is x, h¹, …, h^L, or these from `level` on.

        Leading axes broadcast.
        """
        terms = [log_bernoulli(h, self.inputs(i, above)) for i, (h, above) in enumerate(pairwise(states), level)]
        terms.append(log_bernoulli(states[-1], promote(self.prior)))
        return torch.stack(torch.broadcast_tensors(*terms), -1)

    @torch.no_grad()
    def draw(self, n: int) -> list[Float[Tensor, " n m"]]:
        """x, h¹, …, h^L from the top down."""
        states = [draw_bernoulli(promote(self.prior).expand(n, -1))]
        for level in reversed(range(len(self.layers))):
            states.insert(0, draw_bernoulli(self.inputs(level, states[0])))
        return states

    def log_prob(self, x: Float[Tensor, " B v"]) -> Float[Tensor, " B"]:
        """log Σ_h p(x, h) by enumeration, one layer at a time: the cost of layers l and l + 1 is 2 to their sizes."""
        table = log_bernoulli(self._states(-1), promote(self.prior))  # log p(h^l) of every state of layer l
        for level in range(len(self.layers) - 1, 0, -1):
            z = self.inputs(level, self._states(level + 1))
            table = torch.logsumexp(_log_bernoulli_pairs(self._states(level), z) + table, 1)
        total = x.new_full((len(x),), -torch.inf, dtype=table.dtype)
        start = 0
        for states in all_states(self.sizes[1], self.prior.device):
            pairs = _log_bernoulli_pairs(x, self.inputs(0, states)) + table[start : start + len(states)]
            total = torch.logaddexp(total, torch.logsumexp(pairs, 1))
            start += len(states)
        return total

    @torch.no_grad()
    def gibbs(self, states: Sequence[Float[Tensor, " B n"]]) -> list[Float[Tensor, " B n"]]:
        """One sweep over the hidden units, from the lowest layer up, each drawn given all others. x stays."""
        states = [states[0], *(h.clone() for h in states[1:])]
        for level in range(1, len(states)):
            child, h = states[level - 1], states[level]
            top = level == len(states) - 1
            own = promote(self.prior).expand_as(h) if top else self.inputs(level, states[level + 1])
            z, weight = self.inputs(level - 1, h), self.affine(level - 1)[0]
            u = torch.rand_like(own)
            for j in range(h.shape[1]):
                off = z - h[:, j, None] * weight[:, j]
                h[:, j] = (u[:, j] < torch.sigmoid(own[:, j] + _gain(child, off, weight[:, j]))).to(h)
                z = off + h[:, j, None] * weight[:, j]
        return states

    def start_from(self, mean: Float[Tensor, " v"]) -> None:
        """Visible biases at which x has this mean where W = 0; rates of 0 and 1 are drawn in a little."""
        layer = self.layers[0]
        assert isinstance(layer, nn.Linear)
        layer.bias.copy_(torch.logit(mean.clamp(_RARE, 1 - _RARE)))

    def affine(self, level: int) -> tuple[Float[Tensor, " m n"], Float[Tensor, " m"]]:
        """W and b of z of layer `level`."""
        layer = self.layers[level]
        assert isinstance(layer, nn.Linear)
        return promote(layer.weight), promote(layer.bias)

    def _states(self, level: int) -> Float[Tensor, " states n"]:
        chunks = list(all_states(self.sizes[level], self.prior.device))
        return torch.cat(chunks).to(promote(self.prior).dtype)


class RecognitionNet(nn.Module):
    """q(h | x); the data's mean is taken from x."""

    mean: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(below, above) for below, above in pairwise(sizes))
        self.register_buffer("mean", torch.full((sizes[0],), 0.5))
        _start(self.layers)

    def inputs(self, level: int, below: Float[Tensor, " *B m"]) -> Float[Tensor, " *B n"]:
        """z of layer `level + 1`, given the layer below it."""
        below = below - self.mean if level == 0 else below
        return promote(self.layers[level](below.to(self.mean.dtype)))

    def forward(
        self, x: Float[Tensor, " B v"], count: int
    ) -> tuple[list[Float[Tensor, " B count n"]], Float[Tensor, " B count layers"]]:
        """`count` draws h¹, …, h^L for each x, and log q(h^l | h^{l−1}) of each layer."""
        hidden: list[Tensor] = []
        terms = []
        for level in range(len(self.layers)):
            z = self.inputs(level, hidden[-1]) if hidden else self.inputs(0, x)[:, None].expand(-1, count, -1)
            hidden.append(draw_bernoulli(z.detach()))
            terms.append(log_bernoulli(hidden[-1], z))
        return hidden, torch.stack(terms, -1)

    def log_terms(self, states: Sequence[Float[Tensor, " *B n"]], level: int = 0) -> Float[Tensor, " *B layers"]:
        """log q(h¹ | x), …, log q(h^L | h^{L−1}) of given x, h¹, …, h^L, or of these from `level` on."""
        terms = [log_bernoulli(h, self.inputs(i, below)) for i, (below, h) in enumerate(pairwise(states), level)]
        return torch.stack(torch.broadcast_tensors(*terms), -1)


def log_bernoulli(h: Float[Tensor, " *B n"], z: Float[Tensor, " *B n"]) -> Float[Tensor, " *B"]:
    """Σ_i log p(h_i) with p(h_i = 1) = σ(z_i)."""
    return (h * z - F.softplus(z)).sum(-1)


def _log_bernoulli_pairs(h: Float[Tensor, " A n"], z: Float[Tensor, " B n"]) -> Float[Tensor, " A B"]:
    """`log_bernoulli` of every h under every z."""
    return h.to(z) @ z.T - F.softplus(z).sum(1)


def _gain(child: Float[Tensor, " B m"], off: Float[Tensor, " B m"], weight: Float[Tensor, " m"]) -> Float[Tensor, " B"]:
    """How much likelier the layer below becomes, in nats, as one unit above it turns on; `off` is its input before."""
    return (child * weight - F.softplus(off + weight) + F.softplus(off)).sum(1)


def _start(layers: nn.ModuleList) -> None:
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
