"""Small models whose every number is known, for the tests of evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dgm_core.capabilities import AnnealedChain, HasCodes, HasDecoder, HasEnergy, HasLikelihood, HasPosterior
from dgm_core.config import Recipe, Strict
from dgm_core.contract import Batch, Clock, DataSpec, GenerativeModel, Loss

IMAGES = DataSpec("image", (1, 4, 4), 256, classes=2)


def images(n: int, spec: DataSpec = IMAGES) -> Batch:
    """Class 0 is dark on the left, class 1 on the right; noisy."""
    y = torch.arange(n) % 2
    base = torch.zeros(n, 1, 4, 4)
    base[y == 0, :, :, 2:] = 160
    base[y == 1, :, :, :2] = 160
    x = (base + torch.randint(0, 80, base.shape)).to(torch.uint8)
    return Batch(x, y, {}, torch.arange(n))


def factory(batch: Batch, size: int = 32):
    def batches() -> Iterator[Batch]:
        for start in range(0, batch.x.shape[0], size):
            yield batch.rows(slice(start, start + size))

    return batches


class Blank(GenerativeModel):
    class Config(Strict):
        pass

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        return cls.Config(), Recipe(steps=1)

    tiny = defaults

    def __init__(self, data: DataSpec = IMAGES) -> None:
        super().__init__(self.Config(), data)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        return Loss(batch.x.float().mean())

    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        return torch.rand(n, *self.data.shape)


class Everything(Blank, HasLikelihood, HasPosterior, HasDecoder, HasCodes):
    """A conditional model with every capability that images allow: z is the mean of the left and the right half."""

    exact = False

    def __init__(self, data: DataSpec = IMAGES) -> None:
        super().__init__(data)
        self.offset = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))

    def halves(self, x: Tensor) -> Tensor:
        return torch.stack([x[..., :2].float().mean((1, 2, 3)), x[..., 2:].float().mean((1, 2, 3))], 1) / 100

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Tensor:
        return -16 * math.log(256) - torch.rand(x.shape[0], samples).exp().mean(1)

    def posterior(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> torch.distributions.Distribution:
        mean = self.halves(x)
        return torch.distributions.Independent(torch.distributions.Normal(mean, 0.1 * torch.ones_like(mean)), 1)

    def kl(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        return 0.5 * (self.halves(x).square() + 0.01 - 1 - math.log(0.01))

    def draw_latent(self, n: int) -> Tensor:
        return torch.randn(n, 2)

    def decode(self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        left, right = (100 * z).clamp(0, 255).unbind(1)
        row = torch.stack([left, left, right, right], 1)
        return row[:, None, None].expand(-1, 1, 4, -1) + self.offset

    def code_specs(self) -> dict[str, DataSpec]:
        return {"top": DataSpec("codes", (2,), 8)}

    def codes(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return {"top": (self.halves(x) * 3).round().clamp(0, 7).to(torch.uint8)}

    def decode_codes(
        self, codes: Mapping[str, Tensor], y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Tensor:
        return self.decode(codes["top"] / 3)

    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        assert not self.training, "samples for an evaluation are drawn in evaluation mode"
        y = self.labels_for(n, y)
        z = torch.where(y[:, None] == torch.arange(2), 0.4, 2.0)
        return (self.decode(z) + 10 * torch.randn(n, 1, 4, 4)).round().clamp(0, 255).to(torch.uint8)


class Ising(Blank, HasEnergy):
    """p(x) ∝ exp(aᵀx + xᵀJx / 2) over five bits; the chain's state is x itself, a random-scan of all its sites."""

    def __init__(self, exact: bool) -> None:
        super().__init__(DataSpec("vector", (5,), 2))
        generator = torch.Generator().manual_seed(1)
        J = torch.randn(5, 5, dtype=torch.float64, generator=generator)
        self.register_buffer("J", (J + J.T).fill_diagonal_(0))
        self.register_buffer("a", torch.randn(5, dtype=torch.float64, generator=generator))
        self.known = exact

    def free_energy(self, x: Tensor) -> Tensor:
        x = x.double()
        return -(x @ self.a + 0.5 * ((x @ self.J) * x).sum(1))

    def exact_log_z(self) -> Tensor | None:
        return self.log_z() if self.known else None

    def log_z(self) -> Tensor:
        return torch.logsumexp(-self.free_energy(self.space()), 0)

    @staticmethod
    def space() -> Tensor:
        return torch.cartesian_prod(*[torch.arange(2)] * 5)

    def annealed(self, beta: float) -> AnnealedChain:
        return _Chain(self, beta)

    def base_log_z(self) -> Tensor:
        return torch.tensor(5 * math.log(2), dtype=torch.float64)

    def base_sample(self, n: int) -> Tensor:
        return torch.randint(0, 2, (n, 5)).double()


class _Chain(AnnealedChain):
    def __init__(self, model: Ising, beta: float) -> None:
        self.model, self.beta = model, beta

    def free_energy(self, state: Tensor) -> Tensor:
        return self.beta * self.model.free_energy(state)

    def gibbs(self, state: Tensor) -> Tensor:
        state = state.clone()
        for i in (0, 1, 2, 3, 4, 3, 2, 1, 0):  # a palindrome of reversible steps is reversible
            field = self.beta * (self.model.a[i] + state @ self.model.J[:, i])
            state[:, i] = (torch.rand(len(state), dtype=torch.float64) < torch.sigmoid(field)).double()
        return state
