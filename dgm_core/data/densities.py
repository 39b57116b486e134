"""Two-dimensional densities whose entropy, the best negative log-likelihood there is, is known.

Sampling is exact and takes a numpy generator; log-densities and energies are torch functions, so that they can be
differentiated. Units: nats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dgm_core.contract import DataMismatch

if TYPE_CHECKING:
    from jaxtyping import Float

_LOG_2PI = math.log(2 * math.pi)
OPTIONS: dict[str, dict[str, Any]] = {  # density -> its options and their defaults
    "eight_gaussians": {"modes": 8, "radius": 4.0, "sd": 0.5, "divide": 1.414},  # Grathwohl et al. 2019
    "ring": {"modes": 8, "radius": 2.0, "sd": 0.02},  # Gulrajani et al. 2017
    "grid": {"side": 5, "spacing": 2.0, "sd": 0.05},
    "checkerboard": {},
    "moons": {"noise": 0.1, "scale": 1.0},
    "banana": {},
    "u1": {}, "u2": {}, "u3": {}, "u4": {},
}  # fmt: skip


class Density(ABC):
    """A normalised density on the plane."""

    everywhere: ClassVar[bool] = True  # whether it is positive on the whole plane

    @abstractmethod
    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n, 2) float64, exact."""

    @abstractmethod
    def log_prob(self, x: Float[Tensor, " B 2"]) -> Float[Tensor, " B"]:
        """Nats."""

    @abstractmethod
    def entropy(self) -> float:
        """Nats."""

    def energy(self, x: Float[Tensor, " B 2"]) -> Float[Tensor, " B"]:
        """U(x) of the unnormalised density exp(−U): all that variational inference is shown."""
        return -self.log_prob(x)

    def log_z(self) -> float:
        """log ∫ exp(−U(x)) dx, nats."""
        return 0.0

    def facts(self) -> dict[str, Any]:
        """What the data set's information records beside the entropy."""
        return {}


@dataclass(frozen=True)
class Mixture(Density):
    """Equal isotropic Gaussians."""

    centres: tuple[tuple[float, float], ...]
    sd: float

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        centres = np.asarray(self.centres)
        return centres[rng.integers(len(centres), size=n)] + self.sd * rng.standard_normal((n, 2))

    def log_prob(self, x: Float[Tensor, " B 2"]) -> Float[Tensor, " B"]:
        return _mixture_log_prob(x, x.new_tensor(self.centres), self.sd, -math.log(len(self.centres)))

    def entropy(self) -> float:
        """−Σ_k w_k E_k[log p], each expectation by Gauss–Hermite quadrature."""
        noise, weight = _hermite(40)
        points = torch.tensor(self.centres, dtype=torch.float64)[:, None] + self.sd * noise
        log_prob = self.log_prob(points.reshape(-1, 2)).reshape(len(self.centres), -1)
        return -float((log_prob @ weight).mean())

    def facts(self) -> dict[str, Any]:
        return {"modes": [list(c) for c in self.centres], "sd": self.sd}


@dataclass(frozen=True)
class Checkerboard(Density):
    """Uniform on the eight 2 × 2 squares of one colour in [−4, 4]² (Grathwohl et al. 2019)."""

    everywhere = False

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        column, row = rng.integers(4, size=n), rng.integers(2, size=n)
        corner = np.stack([2.0 * column - 4, 4.0 * row - 4 + 2 * (column % 2)], axis=1)
        return corner + 2 * rng.random((n, 2))

    def log_prob(self, x: Float[Tensor, " B 2"]) -> Float[Tensor, " B"]:
        square = torch.floor(x / 2)
        inside = (x.abs() < 4).all(1) & (square.sum(1) % 2 == 0)
        return torch.where(inside, x.new_tensor(-math.log(32.0)), x.new_tensor(-math.inf))

    def entropy(self) -> float:
        return math.log(32.0)


@dataclass(frozen=True)
class Moons(Density):
    """scikit-learn's two moons in the limit of many points: uniform angles on two half circles, plus Gaussian noise.

    Everything is multiplied by `scale` at the end.
    """

    noise: float = 0.1
    scale: float = 1.0

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        angle, lower = rng.uniform(0, math.pi, n), rng.integers(2, size=n)[:, None]
        upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        clean = np.where(lower, np.array([1.0, 0.5]) - upper, upper)
        return self.scale * (clean + self.noise * rng.standard_normal((n, 2)))

    def log_prob(self, x: Float[Tensor, " B 2"]) -> Float[Tensor, " B"]:
        """The integral over the angle, by Gauss–Legendre nodes that lie closer than the noise is wide."""
        points, weights = self._arc(max(32, math.ceil(2 * math.pi / self.noise)), x)
        centres = torch.cat([points, points.new_tensor([1.0, 0.5]) - points])
        log_weights = weights.log().repeat(2) - math.log(2)
        return _mixture_log_prob(x / self.scale, centres, self.noise, log_weights) - 2 * math.log(self.scale)

    def entropy(self) -> float:
        """By symmetry the expectation over one moon: Gauss–Legendre in the angle, Gauss–Hermite in the noise."""
        noise, weight = _hermite(14)
        points, weights = self._arc(64, torch.zeros(1, dtype=torch.float64))
        x = points[:, None] + self.noise * noise
        return -float(weights @ (self.log_prob(self.scale * x.reshape(-1, 2)).reshape(64, -1) @ weight))

    @staticmethod
    def _arc(count: int, like: Tensor) -> tuple[Float[Tensor, " count 2"], Float[Tensor, " count"]]:
        """Points on the upper half circle, and weights that sum to one."""
        nodes, weights = np.polynomial.legendre.leggauss(count)
        angle = torch.from_numpy((nodes + 1) * (math.pi / 2))
        return torch.stack([angle.cos(), angle.sin()], 1).to(like), torch.from_numpy(weights / 2).to(like)


@dataclass(frozen=True)
class Banana(Density):
    """x₂ ~ N(0, 4²), x₁ | x₂ ~ N(x₂² / 4, 1) (Papamakarios et al. 2017)."""

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        second = 4 * rng.standard_normal(n)
        return np.stack([second**2 / 4 + rng.standard_normal(n), second], axis=1)

    def log_prob(self, x: Float[Tensor, " B 2"]) -> Float[Tensor, " B"]:
        first, second = x.unbind(1)
        return -0.5 * ((first - second.square() / 4).square() + (second / 4).square()) - _LOG_2PI - math.log(4)

    def entropy(self) -> float:
        return 1 + _LOG_2PI + math.log(4)


@dataclass(frozen=True)
class Energy(Density):
    """The unnormalised densities exp(−U) of Rezende and Mohamed 2015 (table 1), U1 to U4.

    U2–U4 are improper on the plane and shown for |z₁| ≤ 4; a soft box ½ (max(|z₁| − 4, 0) / 0.25)² makes them proper
    and keeps the reverse KL finite.
    """

    number: int

    def energy(self, z: Float[Tensor, " B 2"]) -> Float[Tensor, " B"]:
        """U(z)."""
        z1, z2 = z.unbind(1)
        if self.number == 1:
            ring = 0.5 * ((z.norm(dim=1) - 2) / 0.4).square()
            return ring - torch.logaddexp(-0.5 * ((z1 - 2) / 0.6).square(), -0.5 * ((z1 + 2) / 0.6).square())
        wall = 0.5 * ((z1.abs() - 4).clamp_min(0) / 0.25).square()
        terms = [-0.5 * ((z2 - centre) / sd).square() for centre, sd in self._bands(z1)]
        return wall - torch.logsumexp(torch.stack(terms), 0)

    def _bands(self, z1: Tensor) -> list[tuple[Tensor, float]]:
        w1 = torch.sin(2 * math.pi * z1 / 4)
        if self.number == 2:
            return [(w1, 0.4)]
        if self.number == 3:
            return [(w1, 0.35), (w1 - 3 * torch.exp(-0.5 * ((z1 - 1) / 0.6).square()), 0.35)]
        return [(w1, 0.4), (w1 - 3 * torch.sigmoid((z1 - 1) / 0.3), 0.35)]

    def log_prob(self, x: Float[Tensor, " B 2"]) -> Float[Tensor, " B"]:
        return -self.energy(x) - self.log_z()

    def log_z(self) -> float:
        """Closed for U2–U4 (a Gaussian in z₂ at every z₁), by quadrature for U1."""
        if self.number == 1:
            return _moments_of_u1()[0]
        return math.log(self._width() * sum(self._sds()) * math.sqrt(2 * math.pi))

    def entropy(self) -> float:
        """E[U] + log Z, by quadrature on a fine grid (smooth, and negligible at the edges)."""
        if self.number == 1:
            return _moments_of_u1()[1]
        z1 = torch.linspace(-6.5, 6.5, 2601, dtype=torch.float64)
        z2 = torch.linspace(-7.0, 4.0, 441, dtype=torch.float64)
        return _grid_moments(self, z1, z2)[1]

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        if self.number == 1:
            return _sample_u1(n, rng)
        flat = rng.random(n) < 8 / self._width()  # the box, or one of its Gaussian walls
        outside = np.where(rng.random(n) < 0.5, -1, 1) * (4 + 0.25 * np.abs(rng.standard_normal(n)))
        z1 = np.where(flat, rng.uniform(-4, 4, n), outside)
        sds = np.asarray(self._sds())
        band = rng.choice(len(sds), size=n, p=sds / sds.sum())
        centres = np.stack([c.numpy() for c, _ in self._bands(torch.from_numpy(z1))], axis=1)
        return np.stack([z1, centres[np.arange(n), band] + sds[band] * rng.standard_normal(n)], axis=1)

    def _sds(self) -> list[float]:
        return [sd for _, sd in self._bands(torch.zeros(1))]

    @staticmethod
    def _width() -> float:
        return 8 + 0.25 * math.sqrt(2 * math.pi)

    def facts(self) -> dict[str, Any]:
        return {"energy": f"u{self.number}", "log_z": self.log_z()}


def _sample_u1(n: int, rng: np.random.Generator) -> np.ndarray:
    """Rejection in polar coordinates.

    The radius has density ∝ r exp(−½((r − 2)/0.4)²); as ln r ≤ ln 2 + (r − 2)/2, N(2.08, 0.4) covers it. The two bumps
    are at most 1 + exp(−½(4/0.6)²) together.
    """
    kept, held = [], 0
    while held < n:
        r = 2.08 + 0.4 * rng.standard_normal(4 * n)
        angle = rng.uniform(0, 2 * math.pi, 4 * n)
        z = np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1)
        bumps = np.exp(-0.5 * ((z[:, 0] - 2) / 0.6) ** 2) + np.exp(-0.5 * ((z[:, 0] + 2) / 0.6) ** 2)
        accept = np.maximum(r, 0) / (2 * np.exp((r - 2) / 2)) * bumps / (1 + math.exp(-0.5 * (4 / 0.6) ** 2))
        kept.append(z[rng.random(4 * n) < accept])
        held += len(kept[-1])
    return np.concatenate(kept)[:n]


@cache
def _moments_of_u1() -> tuple[float, float]:
    grid = torch.linspace(-6.0, 6.0, 1201, dtype=torch.float64)
    return _grid_moments(Energy(1), grid, grid)


def _grid_moments(energy: Energy, z1: Tensor, z2: Tensor) -> tuple[float, float]:
    """log Z and the entropy by the rectangle rule, whose error is beyond all orders for smooth decaying integrands."""
    u = energy.energy(torch.cartesian_prod(z1, z2))
    log_z = torch.logsumexp(-u, 0) + torch.log((z1[1] - z1[0]) * (z2[1] - z2[0]))
    return float(log_z), float((torch.softmax(-u, 0) * u).sum() + log_z)


def _mixture_log_prob(
    x: Float[Tensor, " B 2"], centres: Float[Tensor, " K 2"], sd: float, log_weights: Float[Tensor, " K"] | float
) -> Float[Tensor, " B"]:
    rows = []
    for part in x.split(max(1, 2**22 // len(centres))):  # bounds the (B, K) table
        square = (part[:, :1] - centres[:, 0]).square() + (part[:, 1:] - centres[:, 1]).square()
        rows.append(torch.logsumexp(-0.5 * square / sd**2 + log_weights, 1))
    return torch.cat(rows) - _LOG_2PI - 2 * math.log(sd)


def _hermite(count: int) -> tuple[Float[Tensor, " n 2"], Float[Tensor, " n"]]:
    """Nodes and weights of a standard Gaussian on the plane."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(count))
    weights = weights / weights.sum()
    return torch.cartesian_prod(nodes, nodes), torch.outer(weights, weights).reshape(-1)


def named(name: str, **options: Any) -> Density:
    """The density of that name: what a `density` data set is drawn from, and what reverse KL is fitted to.

    Raises:
        DataMismatch: no density has that name, or that one has no such option.
    """
    if name not in OPTIONS:
        raise DataMismatch(f"no density is called {name!r}; known: {', '.join(OPTIONS)}")
    strange = sorted(options.keys() - OPTIONS[name].keys())
    if strange:
        told = ", ".join(OPTIONS[name]) or "none"
        raise DataMismatch(f"density {name!r} has no option {strange[0]!r}; its options: {told}")
    o = {**OPTIONS[name], **options}
    match name:
        case "eight_gaussians":
            return Mixture(circle(o["modes"], o["radius"] / o["divide"]), o["sd"] / o["divide"])
        case "ring":
            return Mixture(circle(o["modes"], o["radius"]), o["sd"])
        case "grid":
            return Mixture(grid(o["side"], o["spacing"]), o["sd"])
        case "checkerboard":
            return Checkerboard()
        case "moons":
            return Moons(o["noise"], o["scale"])
        case "banana":
            return Banana()
    return Energy(int(name[1]))


def circle(count: int, radius: float) -> tuple[tuple[float, float], ...]:
    """`count` points, evenly spaced from angle 0."""
    angles = [2 * math.pi * k / count for k in range(count)]
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


def grid(side: int, spacing: float) -> tuple[tuple[float, float], ...]:
    """side × side points about the origin."""
    line = [spacing * (k - (side - 1) / 2) for k in range(side)]
    return tuple((a, b) for a in line for b in line)
