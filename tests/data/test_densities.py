import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad

from dgm_core.data.densities import Banana, Checkerboard, Density, Energy, Mixture, Moons, circle, grid

N = 200_000
KNOWN: dict[str, tuple[Density, float, float]] = {  # the density, its published entropy, that figure's last digit
    "eight_gaussians": (Mixture(circle(8, 4 / 1.414), 0.5 / 1.414), 2.831, 0.002),
    "ring, wide": (Mixture(circle(8, 2), 0.2), 1.696, 0.003),
    "ring": (Mixture(circle(8, 2), 0.02), math.log(8) + math.log(2 * math.pi * math.e * 0.02**2), 1e-9),
    "grid": (Mixture(grid(5, 2), 0.05), math.log(25) + math.log(2 * math.pi * math.e * 0.05**2), 1e-9),
    "checkerboard": (Checkerboard(), math.log(32), 1e-12),
    "moons .05": (Moons(0.05), 0.297, 0.01),
    "moons .1": (Moons(0.1), 1.003, 0.005),
    "moons × 2": (Moons(0.1, 2.0), 2.390, 0.005),
    "banana": (Banana(), 4.224, 0.0005),
}
ENERGIES = {1: 1.878, 2: 2.158, 3: 2.717, 4: 2.786}  # log Z, published


@pytest.mark.parametrize("name", KNOWN)
def test_entropies_are_the_published_ones(name: str) -> None:
    density, published, digit = KNOWN[name]
    assert density.entropy() == pytest.approx(published, abs=digit)


@pytest.mark.parametrize("density", [*(d for d, _, _ in KNOWN.values()), *map(Energy, ENERGIES)], ids=repr)
def test_samples_entropy_and_density_agree(density: Density) -> None:
    """The mean of −log p over exact draws is the entropy."""
    n = N // 8 if isinstance(density, Moons) else N  # whose density is a sum over many points
    surprise = -density.log_prob(torch.from_numpy(density.sample(n, np.random.default_rng(0))))
    assert surprise.dtype == torch.float64
    error = float(surprise.std()) / math.sqrt(n)
    assert float(surprise.mean()) == pytest.approx(density.entropy(), abs=5 * error + 1e-9)


@pytest.mark.parametrize("number", ENERGIES)
def test_log_z_is_that_of_the_energy(number: int) -> None:
    energy = Energy(number)

    def integrand(z2: float, z1: float) -> float:
        return math.exp(-float(energy.energy(torch.tensor([[z1, z2]], dtype=torch.float64))))

    assert energy.log_z() == pytest.approx(ENERGIES[number], abs=5e-4)
    if number == 1:  # the others are closed; this one was computed on a grid
        z, _ = dblquad(integrand, -5, 5, -5, 5, epsabs=1e-4)
        assert energy.log_z() == pytest.approx(math.log(z), abs=1e-4)
    else:
        grid_ = [torch.linspace(a, b, 1201, dtype=torch.float64) for a, b in ((-7, 7), (-8, 5))]
        cell = 14 / 1200 * 13 / 1200
        z = energy.energy(torch.cartesian_prod(*grid_)).neg().exp().sum() * cell
        assert energy.log_z() == pytest.approx(math.log(z), abs=1e-6)


@pytest.mark.parametrize("number", ENERGIES)
def test_exact_samples_follow_the_energy(number: int) -> None:
    """Cell counts against probabilities by quadrature: χ² within five standard deviations."""
    energy = Energy(number)
    x = energy.sample(N, np.random.default_rng(1))
    edges = np.linspace(-5, 5, 21)
    counts, _, _ = np.histogram2d(x[:, 0], x[:, 1], bins=[edges, edges])
    fine = torch.from_numpy(np.linspace(-5, 5, 20 * 20 + 1)[:-1] + 0.0125)
    p = energy.log_prob(torch.cartesian_prod(fine, fine)).exp().reshape(20, 20, 20, 20) * 0.025**2
    expected = p.sum((1, 3)).numpy() * N
    cells = expected > 20
    chi2 = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    assert chi2 < cells.sum() + 5 * math.sqrt(2 * cells.sum())


def test_checkerboard_fills_its_eight_squares_evenly() -> None:
    x = Checkerboard().sample(N, np.random.default_rng(0))
    squares = {tuple(s) for s in np.floor(x / 2).astype(int).tolist()}
    assert squares == {(a, b) for a in range(-2, 2) for b in range(-2, 2) if (a + b) % 2 == 0}
    assert Checkerboard().log_prob(torch.tensor([[0.5, 2.5], [5.0, 1.0]])).isinf().all()


def test_energies_can_be_differentiated_everywhere() -> None:
    """The soft box keeps the gradient of a reverse KL finite outside |z₁| ≤ 4."""
    for number in ENERGIES:
        z = torch.tensor([[4.5, 0.3], [-6.0, 1.0], [0.1, -0.2]], requires_grad=True)
        Energy(number).energy(z).sum().backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert Energy(number).energy(z.double()).dtype == torch.float64
