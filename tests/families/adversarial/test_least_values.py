"""What opponents attain at best: each loss is least where its paper says, and no lower than its closed form.

Data and samples have three values, with probabilities p and q; a score for each is all that an opponent can say. A
batch of twelve examples has these shares exactly.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgm_core.objectives.gan import (
    cross_entropy_discriminator,
    hinge_discriminator,
    hinge_generator,
    least_squares_discriminator,
    least_squares_generator,
)

P, Q = torch.tensor([6, 4, 2]), torch.tensor([1, 4, 7])
SHARE_P, SHARE_Q = P.double() / 12, Q.double() / 12
# The same float64 sums in another order.
EXACT = {"rtol": 0, "atol": 1e-14}
# Descent ends at a gradient of 10⁻¹⁰, above the least by its square.
FOUND = {"rtol": 0, "atol": 1e-13}
Loss = Callable[[Tensor, Tensor], Tensor]


def of(loss: Loss, score: Tensor) -> Tensor:
    """The loss of a batch of data and one of samples, both scored by value."""
    return loss(score.repeat_interleave(P), score.repeat_interleave(Q))


def descended(loss: Loss) -> Tensor:
    """The least that descent finds of a loss that is smooth and convex in the scores."""
    score = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [score], max_iter=200, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = of(loss, score)
        value.backward()
        return value

    optimizer.step(closure)
    return of(loss, score.detach())


def test_hinge_by_formula() -> None:
    g = torch.Generator().manual_seed(0)
    real, fake = 2 * torch.randn(2, 9, generator=g, dtype=torch.float64)
    wanted = sum(max(0.0, 1 - s) for s in real.tolist()) / 9 + sum(max(0.0, 1 + s) for s in fake.tolist()) / 9
    assert hinge_discriminator(real, fake).item() == pytest.approx(wanted, abs=1e-14)
    assert hinge_generator(fake).item() == pytest.approx(-sum(fake.tolist()) / 9, abs=1e-14)


def test_hinge_is_least_at_the_sign_of_the_difference() -> None:
    """min over s of p max(0, 1 − s) + q max(0, 1 + s) is 2 min(p, q): 2 (1 − TV) in all, 2 for equal distributions."""
    least = 2 * torch.minimum(SHARE_P, SHARE_Q).sum()
    torch.testing.assert_close(of(hinge_discriminator, (SHARE_P - SHARE_Q).sign()), least, **EXACT)
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for value in range(3):
        each = SHARE_P[value] * (1 - grid).clamp_min(0) + SHARE_Q[value] * (1 + grid).clamp_min(0)
        assert each.min().item() == pytest.approx(2 * min(SHARE_P[value].item(), SHARE_Q[value].item()), abs=1e-12)
    score = torch.linspace(-1, 1, 5, dtype=torch.float64)
    assert hinge_discriminator(score, score).item() == pytest.approx(2, abs=1e-14)  # whatever it says within ±1


def test_least_squares_are_least_at_the_share_of_the_data() -> None:
    """s = p / (p + q) gives ½ Σ p q / (p + q), ¼ for equal distributions; nothing gives less."""
    best = SHARE_P / (SHARE_P + SHARE_Q)
    least = 0.5 * (SHARE_P * SHARE_Q / (SHARE_P + SHARE_Q)).sum()
    torch.testing.assert_close(of(least_squares_discriminator, best), least, **EXACT)
    torch.testing.assert_close(descended(least_squares_discriminator), least, **FOUND)
    half = torch.full((4,), 0.5, dtype=torch.float64)
    assert least_squares_discriminator(half, half).item() == 0.25
    assert least_squares_generator(half).item() == 0.125


def test_cross_entropy_is_least_at_log_4_less_twice_jensen_shannon() -> None:
    middle = (SHARE_P + SHARE_Q) / 2
    divergence = 0.5 * sum((s * (s / middle).log()).sum() for s in (SHARE_P, SHARE_Q))
    least = torch.tensor(4.0, dtype=torch.float64).log() - 2 * divergence
    best = (SHARE_P / SHARE_Q).log()  # of which the sigmoid is p / (p + q)
    torch.testing.assert_close(of(cross_entropy_discriminator, best), least, **EXACT)
    torch.testing.assert_close(descended(cross_entropy_discriminator), least, **FOUND)
