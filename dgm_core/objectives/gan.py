"""Objectives of adversarial games, as functions of scores; a score is the critic's last number, without a sigmoid."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.shapes import left_expand, sum_event

if TYPE_CHECKING:
    from jaxtyping import Float


def wasserstein_critic(real: Float[Tensor, " B"], fake: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """E f(x̃) − E f(x): minus the critic's estimate of the Wasserstein-1 distance, up to its Lipschitz constant.

    M. Arjovsky, S. Chintala, L. Bottou, 2017. arXiv:1701.07875, eq. 2.
    """
    return fake.mean() - real.mean()


def wasserstein_generator(fake: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """−E f(x̃)."""
    return -fake.mean()


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
    gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
    # The norm has no derivative at zero, where a dead critic would turn into NaNs.
    return (sum_event(gradient.square()) + 1e-12).sqrt()


def gradient_penalty(norm: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """E (‖∇ f(x̂)‖₂ − 1)². I. Gulrajani et al., 2017. arXiv:1704.00028, eq. 3; two-sided."""
    return (norm - 1).square().mean()
