"""Chains of an RBM at several inverse temperatures that change places.
G. Desjardins, A. Courville, Y. Bengio, P. Vincent, O. Delalleau, Parallel Tempering for Training of Restricted
Boltzmann Machines, 2010. AISTATS, PMLR 9:145–152.

A chain has a state at each of 1 = β₁ > … > β_T = 0. States at β run on the RBM whose W and c are scaled by β and whose
visible bias lies between a base-rate model's and its own (`AnnealedLayer`): with u = v − μ and a = c + s(u) W

    −F_β(v) = −ψ(u) + s(u)·b₀ + β s(u)·(b − b₀) + Σ softplus(βa) − λ·βa,

so that at β = 0 visibles are independent draws with the base rates. After Gibbs steps, two neighbours i, i + 1 change
places with probability min(1, r),

    log r = F_{β_i}(v_i) + F_{β_{i+1}}(v_{i+1}) − F_{β_i}(v_{i+1}) − F_{β_{i+1}}(v_i),

which leaves the product of all p_β invariant: first the pairs (1, 2), (3, 4), …, then (2, 3), (4, 5), …. What depends
on no temperature cancels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.nn.rbm import BipartiteLayer, draw_bernoulli

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def ladder(count: int, like: Tensor) -> Float[Tensor, " T"]:
    """Inverse temperatures from the model, 1, evenly down to the base, 0."""
    return torch.linspace(1, 0, count, device=like.device, dtype=like.dtype)


class TemperedLayer:
    """The RBM and its base at all temperatures; a state is (chains, temperatures, visible)."""

    def __init__(self, layer: BipartiteLayer, base_bias: Float[Tensor, " v"], betas: Float[Tensor, " T"]) -> None:
        self.layer = layer
        self.betas = betas
        self.base_bias = base_bias
        self.tilt = layer.visible_bias.detach() - base_bias  # b − b₀

    @torch.no_grad()
    def gibbs(self, v: Float[Tensor, " C T v"]) -> Float[Tensor, " C T v"]:
        """h given v, then v given h, at each temperature by itself."""
        beta = self.betas[:, None]
        h = draw_bernoulli(beta * self._hidden_input(v))
        pull = torch.addmm(self.tilt, (h - self.layer.hidden_offset).flatten(0, 1), self.layer.weight.T)
        return self.layer.draw_visible(self.base_bias + beta * pull.unflatten(0, v.shape[:2]))

    @torch.no_grad()
    def swap(self, v: Float[Tensor, " C T v"]) -> tuple[Float[Tensor, " C T v"], Bool[Tensor, " C pairs"]]:
        """The states after neighbours had their chance to change places, and which pairs did."""
        count = len(self.betas)
        a, g = self._hidden_input(v), self.layer.statistic(v - self.layer.visible_offset) @ self.tilt
        swapped = torch.zeros(len(v), count - 1, dtype=torch.bool, device=v.device)
        for first in (0, 1) if count > 2 else (0,):
            i = torch.arange(first, count - 1, 2, device=v.device)
            j = i + 1
            gain = self._score(a, g, i, j) + self._score(a, g, j, i)
            yes = _accept(gain - self._score(a, g, i, i) - self._score(a, g, j, j))
            order = torch.arange(count, device=v.device).repeat(len(v), 1)
            order[:, i], order[:, j] = torch.where(yes, j, i), torch.where(yes, i, j)
            v, a, g = (_reorder(t, order) for t in (v, a, g))
            swapped[:, i] = yes
        return v, swapped

    def _hidden_input(self, v: Float[Tensor, " C T v"]) -> Float[Tensor, " C T h"]:
        return self.layer.hidden_input(v.flatten(0, 1)).unflatten(0, v.shape[:2])

    def _score(self, a: Tensor, g: Tensor, at: Tensor, of: Tensor) -> Float[Tensor, " C pairs"]:
        """−F at temperatures `at` of the states at places `of`, but for what no temperature changes."""
        beta = self.betas[at]
        inputs = beta[:, None] * a[:, of]
        return beta * g[:, of] + self.layer.hidden_log_partition(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])


def _accept(log_ratio: Float[Tensor, " C pairs"]) -> Bool[Tensor, " C pairs"]:
    return torch.rand_like(log_ratio).log() < log_ratio


def _reorder(rows: Float[Tensor, " C T *n"], order: Tensor) -> Float[Tensor, " C T *n"]:
    index = order if rows.ndim == 2 else order[..., None].expand_as(rows)
    return rows.gather(1, index)
