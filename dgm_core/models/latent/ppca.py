"""Probabilistic Principal Component Analysis. M. E. Tipping, C. M. Bishop, 1999. doi:10.1111/1467-9868.00196.

x = W z + μ + ε with z ~ N(0, I_q), ε ~ N(0, σ² I_d) (eq. 2), hence x ~ N(μ, C), C = W Wᵀ + σ² I (eq. 4). The
likelihood is greatest at W = U_q (Λ_q − σ² I)^½ with σ² the mean of the d − q discarded eigenvalues of the sample
covariance S (eqs. 7, 8; R = I). `fit: em` iterates eqs. 29–31 on S instead:

    W ← S W (σ² I + M⁻¹ Wᵀ S W)⁻¹,   σ² ← tr(S − S W M⁻¹ Wᵀ) / d,   M = Wᵀ W + σ² I.

Departures: none.
Expected: −1744.0 ± 0.5 nats a test example on logit-MNIST at q = 10, equal to scikit-learn's `PCA.score`:
`make results ROW=ppca_logit_mnist`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from dgm_core import distributed
from dgm_core.capabilities import HasDecoder, HasLikelihood, HasPosterior
from dgm_core.config import Recipe, Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss, Turn

if TYPE_CHECKING:
    from jaxtyping import Float


class PPCA(GenerativeModel, HasLikelihood, HasPosterior, HasDecoder):
    """Linear-Gaussian latent variables, fitted in closed form or by EM."""

    class Config(Strict):
        latents: int = Field(10, ge=1, description="q, the number of principal directions")
        fit: Literal["closed_form", "em"] = "closed_form"

    config: Config
    exact = True
    mean: Tensor
    weight: Tensor
    log_variance: Tensor
    covariance: Tensor

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        return cls.Config(latents=min(10, data.dims - 1)), Recipe(steps=1, batch_size=1000)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        return cls.Config(latents=max(1, data.dims // 2)), Recipe(steps=1, batch_size=64)

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        if data.levels is not None:
            raise DataMismatch(
                f"ppca models real-valued data; this has {data.levels} levels. Prepare a real-valued variant of the "
                "data set (transform: logit, or dequantize)."
            )
        d, q = data.dims, config.latents
        if q >= d:
            raise DataMismatch(f"ppca needs fewer latents than coordinates; given latents={q} for {d} coordinates")
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("weight", torch.randn(d, q) / math.sqrt(d))
        self.register_buffer("log_variance", torch.zeros(()))
        self.register_buffer("covariance", torch.eye(d), persistent=config.fit == "em")

    def turns(self) -> Sequence[Turn]:
        return [Turn(self.config.fit, ())]

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        self.mean, self.covariance = streamed_moments(batches, self.mean)
        if turn == "closed_form":
            q = self.config.latents
            eigenvalues, eigenvectors = torch.linalg.eigh(self.covariance.double())
            variance = eigenvalues[:-q].mean().clamp_min(torch.finfo(torch.float32).tiny)
            scale = (eigenvalues[-q:] - variance).clamp_min(0).sqrt()
            self.weight = (eigenvectors[:, -q:] * scale).flip(1).to(self.mean)
            self.log_variance = variance.log().to(self.mean)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        return Loss(-self.log_prob(batch.x).mean())

    def after(self, turn: str, clock: Clock) -> None:
        if turn != "em":
            return
        S, W, variance = self.covariance.double(), self.weight.double(), self.log_variance.double().exp()
        eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        inverse_M = torch.linalg.inv(W.T @ W + variance * eye)
        SW = S @ W
        W_new = SW @ torch.linalg.inv(variance * eye + inverse_M @ W.T @ SW)  # eq. 29
        new_variance = (S.trace() - (SW @ inverse_M * W_new).sum()) / S.shape[0]  # eq. 30
        self.weight, self.log_variance = W_new.to(self.mean), new_variance.log().to(self.mean)

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """Nats, exact; `samples` is not needed. C is inverted through the q × q matrix M (Woodbury)."""
        centred = x.flatten(1) - self.mean
        d, q = self.weight.shape
        projected = centred @ self.weight
        cholesky = torch.linalg.cholesky(self._M())
        whitened = torch.linalg.solve_triangular(cholesky, projected.T, upper=False)
        quadratic = (centred.square().sum(1) - whitened.square().sum(0)) / self.log_variance.exp()
        log_det = 2 * cholesky.diagonal().log().sum() + (d - q) * self.log_variance
        return -0.5 * (quadratic + log_det + d * math.log(2 * math.pi))

    def posterior(self, x: Tensor, y: Tensor | None = None) -> torch.distributions.Distribution:
        """q(z | x) = N(M⁻¹ Wᵀ (x − μ), σ² M⁻¹) (eq. 6), exact; event of size `latents`."""
        M = self._M()
        mean = torch.linalg.solve(M, ((x.flatten(1) - self.mean) @ self.weight).T).T
        return torch.distributions.MultivariateNormal(mean, precision_matrix=M / self.log_variance.exp())

    def kl(self, x: Tensor, y: Tensor | None = None) -> Float[Tensor, " B latents"]:
        """Of each marginal of the posterior against N(0, 1), in nats."""
        q = self.posterior(x)
        return 0.5 * (q.variance + q.mean.square() - 1 - q.variance.log())

    def draw_latent(self, n: int) -> Float[Tensor, " n latents"]:
        return torch.randn(n, self.config.latents, device=self.device, dtype=self.mean.dtype)

    def decode(
        self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        return (z @ self.weight.T + self.mean).unflatten(1, self.data.shape)

    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Float[Tensor, " n *shape"]:
        mean = self.decode(self.draw_latent(n))
        return mean + (0.5 * self.log_variance).exp() * torch.randn_like(mean)

    def _M(self) -> Float[Tensor, " q q"]:
        eye = torch.eye(self.config.latents, device=self.device, dtype=self.mean.dtype)
        return self.weight.T @ self.weight + self.log_variance.exp() * eye


def streamed_moments(batches: Iterator[Batch], like: Float[Tensor, " d"]) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d), dividing by n, over all ranks' batches in one pass.

    Sums are float64 and taken about the first batch's mean, so that nothing cancels.
    """
    shift: Tensor | None = None
    count = torch.zeros((), dtype=torch.float64, device=like.device)
    first = torch.zeros(like.shape[0], dtype=torch.float64, device=like.device)
    second = torch.zeros(like.shape[0], like.shape[0], dtype=torch.float64, device=like.device)
    for batch in batches:
        x = batch.x.flatten(1).to(like.device, torch.float64)
        if shift is None:
            shift = distributed.broadcast(x.mean(0))
        x = x - shift
        count += x.shape[0]
        first += x.sum(0)
        second += x.T @ x
    if shift is None:
        raise DataMismatch("no example reached this rank: give at least one training example a worker")
    distributed.sum_(count, first, second)
    mean = first / count
    return (mean + shift).to(like), (second / count - torch.outer(mean, mean)).to(like)
