"""Wasserstein losses and the gradient penalty, against closed forms and finite differences."""

import pytest
import torch
from torch import nn

from dgm_core.objectives.gan import (
    gradient_norm,
    gradient_penalty,
    interpolate,
    wasserstein_critic,
    wasserstein_generator,
)


def linear_critic(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weight.numel(), 1).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return nn.Sequential(layer, nn.Flatten(0))


def test_penalty_of_a_linear_critic() -> None:
    """f(x) = wᵀx: the norm is ‖w‖ everywhere, the penalty (‖w‖ − 1)², its gradient 2 (‖w‖ − 1) w / ‖w‖."""
    weight = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    critic = linear_critic(weight)
    norm = gradient_norm(critic, torch.randn(5, 3, dtype=torch.float64))
    penalty = gradient_penalty(norm)
    penalty.backward()
    # The norm's guard against zero, 10⁻¹² under the root, moves it by 2 · 10⁻¹³.
    torch.testing.assert_close(norm.detach(), torch.full((5,), 3.0, dtype=torch.float64), rtol=0, atol=1e-12)
    assert penalty.item() == pytest.approx(4.0, abs=1e-11)
    found = critic[0].weight.grad[0]  # type: ignore[index]
    torch.testing.assert_close(found, 4 * weight / 3, rtol=0, atol=1e-11)


def test_penalty_differentiates_through_the_gradient() -> None:
    """Its derivative in the critic's parameters is that of finite differences (double backward)."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    names, values = zip(*critic.named_parameters(), strict=True)

    def penalty(*parameters: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, parameters, strict=True))
        return gradient_penalty(gradient_norm(lambda v: torch.func.functional_call(critic, given, v), x))

    start = tuple(v.detach().clone().requires_grad_() for v in values)
    # The last bias does not change any gradient: its derivative is zero, not missing.
    assert torch.autograd.gradcheck(penalty, start, rtol=1e-6, atol=1e-8)


def test_norm_is_each_examples_own() -> None:
    """‖∇ ‖x‖²/2‖ = ‖x‖, and a critic with a vanishing gradient gives a finite derivative."""
    x = torch.randn(6, 2, 2, dtype=torch.float64)
    norm = gradient_norm(lambda v: 0.5 * v.square().flatten(1).sum(1), x)
    torch.testing.assert_close(norm, x.flatten(1).norm(dim=1), rtol=1e-9, atol=0)
    critic = linear_critic(torch.zeros(4, dtype=torch.float64))
    gradient_penalty(gradient_norm(lambda v: critic(v.flatten(1)), x)).backward()
    assert critic[0].weight.grad.isfinite().all()  # type: ignore[union-attr]


def test_norm_without_gradients_keeps_no_graph() -> None:
    critic = linear_critic(torch.ones(3, dtype=torch.float64))
    with torch.no_grad():
        norm = gradient_norm(critic, torch.randn(2, 3, dtype=torch.float64))
    assert not norm.requires_grad
    torch.testing.assert_close(norm, torch.full((2,), 3**0.5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_interpolation_runs_from_samples_to_data() -> None:
    real, fake = torch.ones(3, 2, 2), torch.zeros(3, 2, 2)
    between = interpolate(real, fake, torch.tensor([0.0, 0.25, 1.0]))
    assert between[:, 0, 0].tolist() == [0.0, 0.25, 1.0]
    assert torch.equal(between, between[:, :1, :1].expand(-1, 2, 2))


def test_critic_rises_on_data_and_generator_follows() -> None:
    """With the 1-Lipschitz f(x) = x, minus the critic's loss between points at 3 and at 1 is their distance, 2."""
    real, fake = torch.full((4,), 3.0), torch.full((4,), 1.0, requires_grad=True)
    assert wasserstein_critic(real, fake).item() == -2.0
    wasserstein_generator(fake).backward()
    assert (fake.grad < 0).all()  # type: ignore[operator]  # descent moves samples towards the data
