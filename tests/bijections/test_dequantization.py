"""Dequantisation: the noise's density is one, and the likelihood it gives is a bound."""

import math

import pytest
import torch
from torch import Tensor, nn

from dgm_core.bijections import (
    Bijection,
    BoundedAffine,
    Chain,
    Context,
    MaskedCoupling,
    UniformDequantizer,
    VariationalDequantizer,
    half_mask,
)
from dgm_core.bijections.dequantization import log_slope

LEVELS = 3


class Beside(nn.Module):
    """A perceptron of what passes and of the context."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * dims, 8), nn.Tanh(), nn.Linear(8, 2 * dims))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        assert context is not None
        return self.layers(torch.cat([x, context], 1))


def build(dims: int) -> VariationalDequantizer:
    torch.manual_seed(dims)
    parts: list[Bijection] = [
        MaskedCoupling(half_mask(dims, parity), Beside(dims), BoundedAffine()) for parity in (0, 1)
    ]
    model = VariationalDequantizer(Chain(*parts), nn.Linear(dims, dims), LEVELS).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model


def log_q(model: VariationalDequantizer, u: Tensor, x: Tensor) -> Tensor:
    """log q(u | x) by the inverse: v = σ(f⁻¹(logit u; x)) is uniform."""
    end = torch.logit(u)
    start, log_det = model.flow.inverse(end, model.context(x))
    return log_slope(start) + log_det - log_slope(end)


def inner(n: int, dims: int) -> tuple[Tensor, float]:
    """A grid on (0, 1)ᴰ that is even in logit u, and the cell's volume there."""
    axis = torch.linspace(-40, 40, n, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * dims).reshape(-1, dims), (axis[1] - axis[0]).item() ** dims


@pytest.mark.parametrize(("dims", "n"), [(1, 4001), (2, 801)])
def test_learnt_noise_has_density_one(dims: int, n: int) -> None:
    model = build(dims)
    with torch.no_grad():
        for level in range(LEVELS):
            x = torch.full((1, dims), float(level), dtype=torch.float64)
            end, cell = inner(n, dims)
            start, log_det = model.flow.inverse(end, model.context(x).expand(len(end), -1))
            density = (log_slope(start) + log_det).exp()  # of logit u: no point of (0, 1) is rounded to its end
            # The trapezoid on a smooth density that falls to e⁻¹⁵ and less at ±40.
            assert density.sum().item() * cell == pytest.approx(1, abs=1e-5)


def test_forward_says_the_density_at_what_it_draws() -> None:
    model = build(2)
    torch.manual_seed(0)
    x = torch.randint(LEVELS, (200, 2)).double()
    with torch.no_grad():
        y, found = model(x)
        u = y - x
        assert ((u > 0) & (u < 1)).all()
        # u is known to 1e-16 of x + u, and logit u multiplies that by 1 / (u (1 − u)).
        steep = 1 / (u * (1 - u)).amin(1)
        error = (log_q(model, u, x) - found).abs()
        assert (error < 1e-13 * steep + 1e-8).all()
        assert found.std() > 0.1


def test_the_mean_of_one_over_q_is_the_volume() -> None:
    """E_q [1 / q(u | x)] = ∫ du = 1: the draws are those of the density."""
    model = build(2)
    torch.manual_seed(0)
    with torch.no_grad():
        _, found = model(torch.tensor([[0.0, 2.0]], dtype=torch.float64).expand(200_000, 2))
    weights = (-found).exp()
    error = weights.std() / math.sqrt(len(weights))
    assert error < 0.02
    assert abs(weights.mean() - 1) < 5 * error


def test_the_identity_is_uniform() -> None:
    flow = MaskedCoupling(half_mask(2, 0), Beside(2), BoundedAffine())
    nn.init.zeros_(flow.net.layers[-1].weight)  # type: ignore[union-attr]
    nn.init.zeros_(flow.net.layers[-1].bias)  # type: ignore[union-attr]
    model = VariationalDequantizer(flow, nn.Identity(), LEVELS).double()
    x = torch.randint(LEVELS, (50, 2)).double()
    torch.manual_seed(3)
    y, found = model(x)
    torch.manual_seed(3)
    uniform, nothing = UniformDequantizer()(x)
    torch.testing.assert_close(y, uniform, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(nothing, torch.zeros(50, dtype=torch.float64))


@pytest.mark.parametrize("uniform", [True, False])
def test_the_bound_is_a_bound(uniform: bool) -> None:
    """With N(1.4, 0.8²) on the line, whose P(x) is known: E_q [p / q] = P(x), and E_q log (p / q) < log P(x)."""
    model = UniformDequantizer() if uniform else build(1)
    density = torch.distributions.Normal(torch.tensor(1.4, dtype=torch.float64), 0.8)
    torch.manual_seed(0)
    n = 200_000
    for level in range(LEVELS):
        with torch.no_grad():
            y, found = model(torch.full((n, 1), float(level), dtype=torch.float64))
        log_ratio = density.log_prob(y).squeeze(1) - found
        edges = density.cdf(torch.tensor([level, level + 1.0], dtype=torch.float64))
        P = edges[1] - edges[0]
        error = log_ratio.exp().std() / math.sqrt(n)
        assert error < 0.01
        assert abs(log_ratio.exp().mean() - P) < 5 * error
        assert log_ratio.mean() < P.log() - 1e-3  # the gap is KL(q ‖ p(u | x)): the noise is not the posterior


def test_learning_the_noise_closes_the_gap() -> None:
    """One level, p(u) far from uniform: after some steps on the bound it is nearly log P."""
    torch.manual_seed(0)
    model = build(1)
    density = torch.distributions.Normal(torch.tensor(0.3, dtype=torch.float64), 0.1)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    x = torch.zeros(256, 1, dtype=torch.float64)
    for _ in range(200):
        y, found = model(x)
        loss = -(density.log_prob(y).squeeze(1) - found).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    edges = density.cdf(torch.tensor([0.0, 1.0], dtype=torch.float64))
    log_P = (edges[1] - edges[0]).log().item()
    many = torch.zeros(20_000, 1, dtype=torch.float64)
    y, found = model(many)
    learnt = (density.log_prob(y).squeeze(1) - found).mean().item()
    uniform = density.log_prob(UniformDequantizer()(many)[0]).mean().item()
    assert learnt <= log_P + 0.02  # Monte Carlo error of 20,000 draws
    assert log_P - learnt < 0.1 * (log_P - uniform)


def test_gradients_reach_every_parameter() -> None:
    model = build(2)
    y, found = model(torch.randint(LEVELS, (30, 2)).double())
    (y.pow(2).sum() - found.sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_uniform_noise_fills_its_interval() -> None:
    torch.manual_seed(0)
    x = torch.tensor([0.0, 5.0, 255.0]).repeat(5000, 1)
    y, _ = UniformDequantizer()(x)
    assert torch.equal(y.floor().clamp_max(255), x)
    assert (y - x).min() < 0.01
    assert (y - x).max() > 0.99
