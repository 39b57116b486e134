"""The bipartite layer of Boltzmann machines, centred: every quantity of an RBM as a function of v, of h, or of both.

With offsets μ, λ (zero: the ordinary parametrisation) and u = v − μ the energy is

    E(v, h) = ψ(u) − s(u)·b − c·(h − λ) − s(u)ᵀ W (h − λ).

Bernoulli visibles have ψ(u) = 0 and s(u) = u; Gaussian ones have ψ(u) = Σ u² / 2σ² and s(u) = u / σ². Either side sums
out in closed form given the other's input,

    a = c + s(u) W,        Σ_h e^{a·(h − λ)}        = e^{Σ softplus(a) − λ·a},
    d = b + W (h − λ),     ∫ e^{−ψ(u) + s(u)·d} dv  = e^{A(d)},

with A(d) = Σ softplus(d) − μ·d for Bernoulli visibles and A(d) = Σ d² / 2σ² + ½ log 2πσ² for Gaussian ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.capabilities import AnnealedChain
from dgm_core.precision import full_precision, promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ENUMERABLE = 20  # units on one side: 2²⁰ states of an image's RBM take some seconds
_CHUNK = 2**12
_RARE = 1e-3  # a pixel that never lights in the training split may still light in the test split


class BipartiteLayer(nn.Module, ABC):
    """Weights, biases and offsets of one pair of layers; hidden units are Bernoulli."""

    visible_offset: Tensor
    hidden_offset: Tensor

    def __init__(self, visible: int, hidden: int, initial_scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial_scale * torch.randn(visible, hidden))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("visible_offset", torch.zeros(visible))
        self.register_buffer("hidden_offset", torch.zeros(hidden))

    # What the kind of visible unit decides.

    @abstractmethod
    def statistic(self, u: Float[Tensor, " *B v"]) -> Float[Tensor, " *B v"]:
        """s(u), linear in u."""

    @abstractmethod
    def carrier(self, u: Float[Tensor, " B v"]) -> Float[Tensor, " B"]:
        """ψ(u)."""

    @abstractmethod
    def visible_log_partition(self, d: Float[Tensor, " *B v"]) -> Float[Tensor, " *B"]:
        """A(d)."""

    @abstractmethod
    def draw_visible(self, d: Float[Tensor, " B v"]) -> Float[Tensor, " B v"]:
        """v ~ p(v | h), given h's input d."""

    @abstractmethod
    def bias_for(self, mean: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """The visible bias at which v has this mean when W = 0; rates of 0 and 1 are drawn in a little."""

    def rates(self) -> Float[Tensor, " v"]:
        """A mean that suits the kind where no data has been seen yet."""
        return torch.zeros_like(self.visible_offset)

    # What holds for every kind.

    def hidden_input(self, v: Float[Tensor, " B v"]) -> Float[Tensor, " B h"]:
        """a, with p(h = 1 | v) = sigmoid(a)."""
        return torch.addmm(self.hidden_bias, self.statistic(v - self.visible_offset), self.weight)

    def mean_hidden_input(self, v: Float[Tensor, " B v"]) -> Float[Tensor, " h"]:
        """⟨a⟩ over the batch, a function of c and W only."""
        with full_precision(v.device):
            return self.hidden_bias + self.statistic(v - self.visible_offset).detach().mean(0) @ self.weight

    def visible_input(
        self, h: Float[Tensor, " B h"], beta: float = 1.0, bias: Float[Tensor, " v"] | None = None
    ) -> Float[Tensor, " B v"]:
        """d; with W scaled by `beta` and another visible bias on the way from a base model to this one."""
        b = self.visible_bias if bias is None else bias
        return torch.addmm(b, h - self.hidden_offset, self.weight.T, alpha=beta)

    def visible_energy(self, v: Float[Tensor, " B v"], bias: Float[Tensor, " v"] | None = None) -> Float[Tensor, " B"]:
        """ψ(u) − s(u)·b: what v costs by itself."""
        u = v - self.visible_offset
        b = self.visible_bias if bias is None else bias
        with full_precision(v.device):  # hundreds of nats, and b's gradient, of which half precision would leave little
            return self.carrier(u) - promote(self.statistic(u)) @ b

    def hidden_log_partition(self, a: Float[Tensor, " B h"]) -> Float[Tensor, " B"]:
        """log Σ_h exp(a·(h − λ))."""
        a = promote(a)
        return (F.softplus(a) - self.hidden_offset * a).sum(1)

    def energy(self, v: Float[Tensor, " B v"], h: Float[Tensor, " B h"]) -> Float[Tensor, " B"]:
        """E(v, h)."""
        return self.visible_energy(v) - (self.hidden_input(v) * (h - self.hidden_offset)).sum(1)

    def free_energy(self, v: Float[Tensor, " B v"], a: Float[Tensor, " B h"] | None = None) -> Float[Tensor, " B"]:
        """F(v) = −log Σ_h exp(−E(v, h)); `a` saves a product where it is known."""
        return self.visible_energy(v) - self.hidden_log_partition(self.hidden_input(v) if a is None else a)

    def hidden_free_energy(self, h: Float[Tensor, " B h"]) -> Float[Tensor, " B"]:
        """−log ∫ exp(−E(v, h)) dv."""
        return -(h - self.hidden_offset) @ self.hidden_bias - self.visible_log_partition(self.visible_input(h))

    def gibbs(self, v: Float[Tensor, " B v"], a: Float[Tensor, " B h"] | None = None) -> Float[Tensor, " B v"]:
        """h ~ p(h | v), then v ~ p(v | h): reversible with respect to p(v); `a` saves a product where it is known."""
        a = self.hidden_input(v) if a is None else a
        return self.draw_visible(self.visible_input(draw_bernoulli(a)))

    def chain_state(self, v: Float[Tensor, " B v"]) -> Float[Tensor, " B vh"]:
        """v beside the hidden input a that it causes: what an annealed chain runs on."""
        return torch.cat([v, self.hidden_input(v)], 1)

    def reset(self, mean: Float[Tensor, " v"], activity: float, *, centred: bool) -> None:
        """Start from the data's mean, with hidden units that are on with probability `activity`; if centred, the
        offsets stand at these means."""
        self.visible_offset.copy_(mean if centred else torch.zeros_like(mean))
        self.hidden_offset.fill_(activity if centred else 0.0)
        self.visible_bias.copy_(self.bias_for(mean))
        self.hidden_bias.fill_(math.log(activity / (1 - activity)))

    def move_offsets(self, visible: Float[Tensor, " v"], hidden: Float[Tensor, " h"]) -> None:
        """Add to μ and λ, and change the biases so that the distribution stays what it was."""
        self.hidden_bias += self.statistic(visible) @ self.weight
        self.visible_bias += self.weight @ hidden
        self.visible_offset += visible
        self.hidden_offset += hidden

    @property
    def enumerable(self) -> bool:
        """Whether one side has so few states that they can be visited."""
        return min(self._sides()) <= ENUMERABLE

    def log_z(self) -> Float[Tensor, ""]:
        """log Z by visiting every state of the smaller side, chunk by chunk; float64."""
        visible, hidden = self._sides()
        free_energy = self.hidden_free_energy if hidden <= visible else self.free_energy
        units = int(min(visible, hidden))
        parts = [
            torch.logsumexp(-free_energy(states.to(self.weight)).double(), 0)
            for states in all_states(units, self.weight.device)
        ]
        return torch.logsumexp(torch.stack(parts), 0)

    def _sides(self) -> tuple[float, float]:
        """Units a side, infinite where its states cannot be listed."""
        return self.weight.shape[0], self.weight.shape[1]


class BernoulliLayer(BipartiteLayer):
    """Visible units in {0, 1}."""

    def statistic(self, u: Float[Tensor, " *B v"]) -> Float[Tensor, " *B v"]:
        return u

    def carrier(self, u: Float[Tensor, " B v"]) -> Float[Tensor, " B"]:
        return u.new_zeros(())

    def visible_log_partition(self, d: Float[Tensor, " *B v"]) -> Float[Tensor, " *B"]:
        d = promote(d)
        return (F.softplus(d) - self.visible_offset * d).sum(-1)

    def draw_visible(self, d: Float[Tensor, " B v"]) -> Float[Tensor, " B v"]:
        return draw_bernoulli(d)

    def bias_for(self, mean: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        return torch.logit(mean.clamp(_RARE, 1 - _RARE))

    def rates(self) -> Float[Tensor, " v"]:
        return torch.full_like(self.visible_offset, 0.5)


class GaussianLayer(BipartiteLayer):
    """Real visible units; p(v | h) = N(μ + b + W (h − λ), σ²), a variance a coordinate."""

    log_variance: Tensor

    def __init__(self, visible: int, hidden: int, initial_scale: float, variance: float, *, learn: bool) -> None:
        super().__init__(visible, hidden, initial_scale)
        log_variance = torch.full((visible,), math.log(variance))
        if learn:
            self.log_variance = nn.Parameter(log_variance)
        else:
            self.register_buffer("log_variance", log_variance)

    def statistic(self, u: Float[Tensor, " *B v"]) -> Float[Tensor, " *B v"]:
        return u * torch.exp(-self.log_variance)

    def carrier(self, u: Float[Tensor, " B v"]) -> Float[Tensor, " B"]:
        return 0.5 * (promote(u) * self.statistic(u)).sum(1)

    def visible_log_partition(self, d: Float[Tensor, " *B v"]) -> Float[Tensor, " *B"]:
        return 0.5 * (promote(d) * self.statistic(d) + self.log_variance + math.log(2 * math.pi)).sum(-1)

    def draw_visible(self, d: Float[Tensor, " B v"]) -> Float[Tensor, " B v"]:
        d = promote(d)
        return torch.addcmul(d + self.visible_offset, torch.randn_like(d), torch.exp(0.5 * self.log_variance))

    def bias_for(self, mean: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        return mean - self.visible_offset

    def reset(self, mean: Float[Tensor, " v"], activity: float, *, centred: bool) -> None:
        # log p(h_j = 1) / p(h_j = 0) = c_j + A(d with h_j on) − A(d with h_j off), the other units at their offsets.
        super().reset(mean, activity, centred=centred)
        weighted = self.statistic(self.weight.T)
        self.hidden_bias -= weighted @ self.visible_bias + (0.5 - self.hidden_offset) * (weighted.T * self.weight).sum(
            0
        )

    def move_offsets(self, visible: Float[Tensor, " v"], hidden: Float[Tensor, " h"]) -> None:
        super().move_offsets(visible, hidden)
        self.visible_bias -= visible  # the mean of p(v | h) has μ in it

    def _sides(self) -> tuple[float, float]:
        return math.inf, self.weight.shape[1]


class AnnealedLayer(AnnealedChain):
    """The RBM with W and c scaled by β, and b between the base-rate model's and its own.

    A state is (B, visible + hidden): v beside the hidden input a that it causes, which every energy and the next
    transition need; so a temperature costs two matrix products, not four.
    """

    def __init__(self, layer: BipartiteLayer, base_bias: Float[Tensor, " v"], beta: float) -> None:
        self.layer = layer
        self.beta = beta
        self.bias = torch.lerp(base_bias, layer.visible_bias.detach(), beta)
        self.sizes = [layer.weight.shape[0], layer.weight.shape[1]]

    @torch.no_grad()
    def free_energy(self, state: Tensor) -> Float[Tensor, " B"]:
        v, a = state.split(self.sizes, 1)
        return self.layer.visible_energy(v, self.bias) - self.layer.hidden_log_partition(self.beta * a)

    @torch.no_grad()
    def gibbs(self, state: Tensor) -> Tensor:
        h = draw_bernoulli(self.beta * state[:, self.sizes[0] :])
        return self.layer.chain_state(self.layer.draw_visible(self.layer.visible_input(h, self.beta, self.bias)))


def draw_bernoulli(logits: Float[Tensor, " *B"]) -> Float[Tensor, " *B"]:
    """Draws in {0, 1} with success probability sigmoid(logits), as floats of full precision: half of it knows no
    chance below one in 256."""
    p = torch.sigmoid(promote(logits))
    return torch.rand_like(p).lt_(p)


def all_states(units: int, device: torch.device) -> Iterator[Int[Tensor, " chunk units"]]:
    """Every state of `units` binary units, in chunks."""
    bits = torch.arange(units, device=device)
    total = 2**units
    for start in range(0, total, _CHUNK):
        yield (torch.arange(start, min(start + _CHUNK, total), device=device)[:, None] >> bits) & 1
