"""Losses of both sides of the games, against closed forms, enumeration and finite differences."""

import math

import pytest
import torch
from torch import nn

from dgm_core import distributed
from dgm_core.objectives.gan import (
    cross_entropy_discriminator,
    feature_matching,
    gradient_norm,
    gradient_penalty,
    hinge_discriminator,
    hinge_generator,
    historical_average,
    interpolate,
    least_squares_discriminator,
    least_squares_generator,
    minimax_generator,
    non_saturating_generator,
    verdicts,
    wasserstein_critic,
    wasserstein_generator,
)
from tests.support import TwoRanks


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


P, Q = (1, 2, 5), (4, 2, 2)  # how often three states occur among eight examples of the data, and of the samples


def scores_at(of_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the data and of the samples, given each state's."""
    return tuple(torch.repeat_interleave(of_state, torch.tensor(counts)) for counts in (P, Q))  # type: ignore[return-value]


def test_cross_entropy_is_equation_1() -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    value = -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean()
    # Softplus and the logarithm of a sigmoid differ by rounding only; so below.
    torch.testing.assert_close(cross_entropy_discriminator(real, fake), value, rtol=0, atol=1e-14)
    torch.testing.assert_close(minimax_generator(fake), (1 - fake.sigmoid()).log().mean(), rtol=0, atol=1e-14)
    torch.testing.assert_close(non_saturating_generator(fake), -fake.sigmoid().log().mean(), rtol=0, atol=1e-14)


def test_an_undecided_discriminator_gives_log_4() -> None:
    half = torch.zeros(5, dtype=torch.float64)
    assert cross_entropy_discriminator(half, half).item() == pytest.approx(math.log(4), abs=1e-15)
    assert minimax_generator(half).item() - math.log(2) == pytest.approx(-math.log(4), abs=1e-15)


@pytest.mark.parametrize("target", [1.0, 0.9])
def test_the_best_discriminator_is_the_share_of_the_data(target: float) -> None:
    """D* = α p / (p + q) in every state (proposition 1), and there −V = log 4 − 2 JSD where α = 1 (theorem 1)."""
    p, q = (torch.tensor(c, dtype=torch.float64) / 8 for c in (P, Q))
    best = target * p / (p + q)
    score = best.logit().requires_grad_()
    value = cross_entropy_discriminator(*scores_at(score), target=target)
    (gradient,) = torch.autograd.grad(value, score)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)
    for other in (score.detach() + 0.1, score.detach() - 0.1):
        assert cross_entropy_discriminator(*scores_at(other), target=target) > value
    if target == 1.0:
        m = (p + q) / 2
        jsd = 0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum())
        assert value.item() == pytest.approx(math.log(4) - 2 * jsd.item(), abs=1e-14)


def test_smoothing_is_one_sided() -> None:
    real, fake = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.tensor([1.0, 0.1], dtype=torch.float64)
    smooth, hard = (cross_entropy_discriminator(real, fake, target=t) for t in (0.9, 1.0))
    expected = 0.1 * (-(1 - real.sigmoid()).log() + real.sigmoid().log()).mean()
    torch.testing.assert_close(smooth - hard, expected, rtol=0, atol=1e-14)
    # Nothing is left to gain from surer data: at a score of 10, smoothed loss rises with the score.
    score = torch.full((1,), 10.0, requires_grad=True)
    cross_entropy_discriminator(score, torch.zeros(1), target=0.9).backward()
    assert score.grad > 0  # type: ignore[operator]


def test_both_generators_go_the_same_way_but_one_saturates() -> None:
    score = torch.tensor([-20.0, 0.0, 20.0], dtype=torch.float64, requires_grad=True)
    (saturating,) = torch.autograd.grad(3 * minimax_generator(score), score)
    (direct,) = torch.autograd.grad(3 * non_saturating_generator(score), score)
    torch.testing.assert_close(saturating, -score.sigmoid(), rtol=1e-12, atol=0)
    torch.testing.assert_close(direct, -(-score).sigmoid(), rtol=1e-12, atol=0)
    assert saturating[0].abs() < 1e-8 < 0.99 < direct[0].abs()


def test_scores_of_any_size_give_finite_losses() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        extreme = torch.tensor([1e4, -1e4], dtype=dtype)
        losses = [
            cross_entropy_discriminator(extreme, extreme),
            minimax_generator(extreme),
            non_saturating_generator(extreme),
            hinge_discriminator(extreme, extreme),
            least_squares_discriminator(extreme, extreme),
        ]
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses)


def test_hinge() -> None:
    real = torch.tensor([2.0, 0.5, -1.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.0], requires_grad=True)
    value = hinge_discriminator(real, fake)
    assert value.item() == pytest.approx((0.5 + 2.0) / 3 + 1.0 / 2)
    value.backward()
    assert real.grad.tolist() == pytest.approx([0, -1 / 3, -1 / 3])  # type: ignore[union-attr]
    assert fake.grad.tolist() == [0, 0.5]  # type: ignore[union-attr]
    assert hinge_generator(fake).item() == 1.0


def test_least_squares_are_least_at_the_share_of_the_data() -> None:
    p, q = (torch.tensor(c, dtype=torch.float64) for c in (P, Q))
    score = (p / (p + q)).requires_grad_()
    (gradient,) = torch.autograd.grad(least_squares_discriminator(*scores_at(score)), score)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)
    assert least_squares_discriminator(torch.ones(3), torch.zeros(2)).item() == 0.0
    assert least_squares_discriminator(torch.zeros(3), torch.ones(2)).item() == 1.0
    assert least_squares_generator(torch.tensor([1.0, 3.0])).item() == 1.0


def test_verdicts() -> None:
    found = verdicts(torch.tensor([1.0, 2.0, -1.0, 3.0], requires_grad=True), torch.tensor([-1.0, 1.0]))
    assert {name: metric.item() for name, metric in found.items()} == {"accuracy_real": 0.75, "accuracy_fake": 0.5}
    assert not any(metric.requires_grad for metric in found.values())


def test_feature_matching_sees_means_only() -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gap = real.mean(0) - fake.mean(0)
    value = feature_matching(real, fake)
    torch.testing.assert_close(value, (gap * gap).sum(), rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(value, fake)
    torch.testing.assert_close(gradient, (-2 * gap / 4).detach().expand(4, 3), rtol=0, atol=1e-14)
    moved = fake.detach() + gap.detach()
    assert feature_matching(real, moved).item() < 1e-28  # other examples, the same mean: rounding squared


def shares_match_features(real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mine = [x[distributed.share(len(x))] for x in (real, fake)]
    local = mine[1].clone().requires_grad_()
    value = feature_matching(mine[0], local)
    # As the trainer does: each rank's loss by its share of the batch.
    (value * len(local) / len(fake)).backward()
    return value.detach(), distributed.gather_rows(local.grad)  # type: ignore[arg-type]


def test_feature_matching_spans_ranks(two_ranks: TwoRanks) -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(7, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    value, gradient = shares_match_features(real, fake)
    for got, grad in two_ranks.run(shares_match_features, real, fake):
        torch.testing.assert_close(got, value, rtol=0, atol=1e-14)
        torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-14)


def test_historical_average_pulls_back() -> None:
    now = [torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([3.0], requires_grad=True)]
    value = historical_average(now, torch.tensor([0.0, 2.0, 5.0]))
    assert value.item() == 1.0 + 0.0 + 4.0
    value.backward()
    assert [p.grad.tolist() for p in now] == [[[2.0, 0.0]], [-4.0]]  # type: ignore[union-attr]
