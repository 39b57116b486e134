"""Annealed importance sampling, both ways, for any model with an annealed chain.

Forward (R. Neal, 2001; R. Salakhutdinov, I. Murray, On the Quantitative Analysis of Deep Belief Networks, 2008.
doi:10.1145/1390156.1390266): from exact draws x₀ of the base model through 0 = β₀ < … < β_K = 1,

    w = Π_k f_k(x_{k−1}) / f_{k−1}(x_{k−1}),   x_k ~ T_k(· | x_{k−1}),   E[w] = Z / Z₀,

so E[log ŵ] ≤ log Z / Z₀: log Z tends to come out too small and a likelihood too good. Reverse (Y. Burda, R. Grosse,
R. Salakhutdinov, Accurate and Conservative Estimates of MRF Log-likelihood using Reverse Annealing, 2015.
arXiv:1412.8566): the same product along x_K → x₀ with x_{k−1} ~ T_k(· | x_k). From exact draws of the model E[1/w] is
Z₀ / Z, so that log Z tends to come out too large; the truth lies between. From test examples, f(x) / (Z₀ w) is an
unbiased estimate of the probability that forward annealing ends in x, its logarithm a conservative log-likelihood
(RAISE). The reversal of T_k is T_k itself: `AnnealedChain.gibbs` must be reversible, as Gibbs sampling of one side of a
two-sided state through the other is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from dgm_core.capabilities import HasEnergy

if TYPE_CHECKING:
    from jaxtyping import Float


class LogZ(NamedTuple):
    """An estimate of log Z with three standard errors of Ẑ on either side, as Salakhutdinov & Murray report it."""

    log_z: float
    low: float  # −inf where the error exceeds the estimate
    high: float
    effective: float  # (Σ w)² / Σ w², of as many chains as there are: near one, a single chain decides
    log_weights: Float[Tensor, " chains"]  # float64, base included: the estimate averages their exponentials
    states: Tensor  # where the chains ended


def temperatures(
    count: int = 14_500, schedule: Literal["piecewise", "linear", "geometric"] = "piecewise"
) -> Float[Tensor, " count"]:
    """Inverse temperatures from 0 to 1, float64.

    `piecewise` has Salakhutdinov & Murray's proportions: 500 on [0, 0.5], 4,000 on [0.5, 0.9], 10,000 on [0.9, 1].
    `geometric` steps 1 − β by a constant factor down to 1/count, so that spacing is finest at the model.
    """
    if count < 2:
        raise ValueError(
            f"{count} inverse temperatures were asked for; at least 2 are needed, for the base and the model"
        )
    if schedule == "linear":
        return torch.linspace(0, 1, count, dtype=torch.float64)
    if schedule == "geometric":
        rest = torch.logspace(0, -math.log10(count), count - 1, dtype=torch.float64)
        return torch.cat([1 - rest, torch.ones(1, dtype=torch.float64)])
    position = torch.linspace(0, 1, count, dtype=torch.float64)
    share = [0.0, 500 / 14_500, 4_500 / 14_500, 1.0]
    beta = [0.0, 0.5, 0.9, 1.0]
    result = torch.zeros_like(position)
    for (s0, s1), (b0, b1) in zip(itertools.pairwise(share), itertools.pairwise(beta), strict=True):
        inside = (position >= s0) & (position <= s1)
        result[inside] = b0 + (b1 - b0) * (position[inside] - s0) / (s1 - s0)
    result[-1] = 1.0
    return result


@torch.no_grad()
def ais(model: HasEnergy, *, chains: int = 100, betas: Tensor | Sequence[float] | None = None) -> LogZ:
    """Estimate log Z by annealing `chains` exact draws of the base model: a stochastic lower bound."""
    ladder = _checked(betas)
    state = model.base_sample(chains)
    log_weights = model.base_log_z().double() + torch.zeros(chains, dtype=torch.float64, device=state.device)
    here = model.annealed(ladder[0])
    for beta in ladder[1:]:
        there = model.annealed(beta)
        log_weights += (here.free_energy(state) - there.free_energy(state)).double()
        state = there.gibbs(state)
        here = there
    return _average(log_weights, state, sign=1)


@torch.no_grad()
def reverse_ais(model: HasEnergy, states: Tensor, *, betas: Tensor | Sequence[float] | None = None) -> LogZ:
    """Estimate log Z by annealing draws of the model, given as its chain's states, down to the base: a stochastic
    upper bound as far as the draws are exact. `model_states` makes some."""
    log_weights, ends = _reverse(model, states, _checked(betas))
    return _average(log_weights, ends, sign=-1)


@torch.no_grad()
def raise_log_prob(
    model: HasEnergy, x: Tensor, states: Tensor, *, chains: int = 10, betas: Tensor | Sequence[float] | None = None
) -> Float[Tensor, " B"]:
    """Conservative log-probabilities of the examples `x`, in nats of the stored data, float64.

    Args:
        states: the same examples as the chain's states (`RBM.chain_state(x)`).
        chains: reverse runs an example; their average is taken before the logarithm.
    """
    log_weights, _ = _reverse(model, states.repeat_interleave(chains, 0), _checked(betas))
    per_run = -log_weights.view(-1, chains)
    return torch.logsumexp(per_run, 1) - math.log(chains) - model.free_energy(x).double()


@torch.no_grad()
def model_states(model: HasEnergy, forward: LogZ, *, burn_in: int = 1000) -> Tensor:
    """Draws of the model for `reverse_ais`: the ends of forward chains, resampled by their weights, and `burn_in`
    transitions more at β = 1."""
    rows = torch.multinomial(torch.softmax(forward.log_weights, 0), len(forward.states), replacement=True)
    state = forward.states[rows]
    chain = model.annealed(1.0)
    for _ in range(burn_in):
        state = chain.gibbs(state)
    return state


def _reverse(model: HasEnergy, states: Tensor, ladder: list[float]) -> tuple[Float[Tensor, " n"], Tensor]:
    log_weights = model.base_log_z().double() + torch.zeros(len(states), dtype=torch.float64, device=states.device)
    state, there = states, model.annealed(ladder[-1])
    for beta in reversed(ladder[:-1]):
        here = model.annealed(beta)
        state = there.gibbs(state)
        log_weights += (here.free_energy(state) - there.free_energy(state)).double()
        there = here
    return log_weights, state


def _average(log_weights: Float[Tensor, " n"], states: Tensor, *, sign: int) -> LogZ:
    """Of w (sign 1), or of 1/w (sign −1) with the reciprocal taken at the end."""
    signed = sign * log_weights
    n = len(signed)
    log_mean = torch.logsumexp(signed, 0) - math.log(n)
    relative = torch.exp(signed - log_mean)
    error = 3 * relative.std() / math.sqrt(n) if n > 1 else torch.tensor(math.inf)
    down, up = torch.log1p(-error.clamp(max=1)), torch.log1p(error)
    ends = sorted(float(sign * (log_mean + step)) for step in (down, up))
    effective = float(relative.sum().square() / relative.square().sum())
    return LogZ(float(sign * log_mean), ends[0], ends[1], effective, log_weights, states)


def _checked(betas: Tensor | Sequence[float] | None) -> list[float]:
    ladder = [float(b) for b in (temperatures() if betas is None else betas)]
    if len(ladder) < 2 or ladder[0] != 0.0 or ladder[-1] != 1.0 or any(a >= b for a, b in itertools.pairwise(ladder)):
        raise ValueError("betas must rise strictly from 0 (the base model) to 1 (the model); see `temperatures`")
    return ladder
