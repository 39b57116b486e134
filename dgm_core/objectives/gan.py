"""Objectives of adversarial games, as functions of scores; a score is the critic's last number, without a sigmoid.

Where D is a probability, D = σ(score): nothing is lost to log 0. Every value is to be minimised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_core import distributed
from dgm_core.precision import promote
from dgm_core.shapes import left_expand, sum_event

if TYPE_CHECKING:
    from jaxtyping import Float


def cross_entropy_discriminator(
    real: Float[Tensor, " B"], fake: Float[Tensor, " B"], target: float = 1.0
) -> Float[Tensor, ""]:
    """−E log D(x) − E log(1 − D(x̃)): log 4 where D = ½ everywhere, which is all it can do against the data itself.

    I. Goodfellow et al., 2014. arXiv:1406.2661, eq. 1 negated. `target` = α < 1 is one-sided label smoothing
    (T. Salimans et al., 2016. arXiv:1606.03498, section 3.4): D's answer to data is held to be α, not 1, so that it
    has a finite optimum, α p / (p + p̃); the answer to samples stays 0.
    """
    real, fake = promote(real), promote(fake)
    return target * F.softplus(-real).mean() + (1 - target) * F.softplus(real).mean() + F.softplus(fake).mean()


def minimax_generator(fake: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """E log(1 − D(x̃)), eq. 1's own; its gradient vanishes where D is sure."""
    return -F.softplus(promote(fake)).mean()


def non_saturating_generator(fake: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """−E log D(x̃) (section 3): the same fixed point, the largest gradient where D is sure."""
    return F.softplus(-promote(fake)).mean()


def hinge_discriminator(real: Float[Tensor, " B"], fake: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """E max(0, 1 − s(x)) + E max(0, 1 + s(x̃)). J. H. Lim, J. C. Ye, 2017. arXiv:1705.02894."""
    return F.relu(1 - promote(real)).mean() + F.relu(1 + promote(fake)).mean()


def hinge_generator(fake: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """−E s(x̃)."""
    return -promote(fake).mean()


def least_squares_discriminator(real: Float[Tensor, " B"], fake: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """½ E (s(x) − 1)² + ½ E s(x̃)². X. Mao et al., 2017. arXiv:1611.04076, eq. 9."""
    return 0.5 * (promote(real) - 1).square().mean() + 0.5 * promote(fake).square().mean()


def least_squares_generator(fake: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """½ E (s(x̃) − 1)²."""
    return 0.5 * (promote(fake) - 1).square().mean()


@torch.no_grad()
def verdicts(real: Float[Tensor, " B"], fake: Float[Tensor, " B"]) -> dict[str, Tensor]:
    """Shares of the data and of the samples that D = σ(score) takes for what they are, at the threshold ½."""
    return {"accuracy_real": promote(real > 0).mean(), "accuracy_fake": promote(fake < 0).mean()}


def feature_matching(real: Float[Tensor, " B F"], fake: Float[Tensor, " B F"]) -> Float[Tensor, ""]:
    """‖E f(x) − E f(x̃)‖²₂, the means over all ranks' examples.

    T. Salimans et al., 2016. arXiv:1606.03498, section 3.1. A square of means is not the mean of the examples'
    squares: microbatches do not add up to one batch.
    """
    return (_global_mean(real) - _global_mean(fake)).square().sum()


def _global_mean(x: Float[Tensor, " B F"]) -> Float[Tensor, " F"]:
    sums = torch.cat([promote(x).sum(0), promote(x).new_full((1,), x.shape[0])])
    sums = distributed.all_reduce(sums)
    return sums[:-1] / sums[-1]


def historical_average(parameters: Iterable[Tensor], past: Float[Tensor, " P"]) -> Float[Tensor, ""]:
    """‖θ − (1/t) Σᵢ θ[i]‖²: how far a player stands from the average of where it stood (section 3.3).

    Args:
        past: the average, of all parameters one after the other.
    """
    return (torch.cat([p.flatten() for p in parameters]) - past).square().sum()


def wasserstein_critic(real: Float[Tensor, " B"], fake: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """E f(x̃) − E f(x): minus the critic's estimate of the Wasserstein-1 distance, up to its Lipschitz constant.

    M. Arjovsky, S. Chintala, L. Bottou, 2017. arXiv:1701.07875, eq. 2.
    """
    return promote(fake).mean() - promote(real).mean()


def wasserstein_generator(fake: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """−E f(x̃)."""
    return -promote(fake).mean()


def interpolate(
    real: Float[Tensor, " B *event"], fake: Float[Tensor, " B *event"], epsilon: Float[Tensor, " B"]
) -> Float[Tensor, " B *event"]:
    """x̂ = ε x + (1 − ε) x̃, a point between each pair."""
    return torch.lerp(fake, real, left_expand(epsilon, real.ndim))


def gradient_norm(critic: Callable[[Tensor], Tensor], x: Float[Tensor, " B *event"]) -> Float[Tensor, " B"]:
    """‖∇ₓ f(x)‖₂ of each example, differentiable in the critic's parameters where gradients are on.

    The critic treats examples independently; each one's gradient is then that of the sum.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=differentiable)
    # The norm has no derivative at zero, where a dead critic would turn into NaNs.
    return (sum_event(promote(gradient).square()) + 1e-12).sqrt()


def gradient_penalty(norm: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """E (‖∇ f(x̂)‖₂ − 1)². I. Gulrajani et al., 2017. arXiv:1704.00028, eq. 3; two-sided."""
    return (norm - 1).square().mean()


def r1_penalty(norm: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """½ E ‖∇ D(x)‖² on data, to be weighted by γ (R1).

    L. Mescheder, A. Geiger, S. Nowozin, 2018. arXiv:1801.04406, eq. 9.
    """
    return 0.5 * norm.square().mean()
