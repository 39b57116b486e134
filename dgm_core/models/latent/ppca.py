"""Probabilistic Principal Component Analysis. M. E. Tipping, C. M. Bishop, 1999. doi:10.1111/1467-9868.00196.

x = W z + μ + ε with z ~ N(0, I_q), ε ~ N(0, σ² I_d) (eq. 2), hence x ~ N(μ, C), C = W Wᵀ + σ² I (eq. 4). The
likelihood is greatest at W = U_q (Λ_q − σ² I)^½ with σ² the mean of the d − q discarded eigenvalues of the sample
covariance S (eqs. 7, 8; R = I). `fit: em` iterates eqs. 29–31 on S instead:

    W ← S W (σ² I + M⁻¹ Wᵀ S W)⁻¹,   σ² ← tr(S − S W M⁻¹ Wᵀ) / d,   M = Wᵀ W + σ² I.

Where values may be missing (the data's context `observed` says which are there), likelihood and posterior are those of
an example's observed coordinates O_n, and EM takes sums over examples (eqs. 25–28, each coordinate's over the examples
that have it; A. Ilin, T. Raiko, 2010, JMLR 11). With ẑ = (z, 1), M_n = Σ_{i ∈ O_n} w_i w_iᵀ + σ² I and moments under
the posterior N(M_n⁻¹ Σ_{i ∈ O_n} w_i (x_ni − μ_i), σ² M_n⁻¹),

    (w_i, μ_i) ← (Σ_n ⟨ẑ_n ẑ_nᵀ⟩)⁻¹ Σ_n ⟨ẑ_n⟩ x_ni,    σ² ← Σ_{n, i} ⟨(x_ni − w_iᵀ z_n − μ_i)²⟩ / Σ_n |O_n|.

A round's sums are those of its batch. They are averaged over rounds with the weight t^−κ for round t, κ = `forgetting`
(O. Cappé, E. Moulines, 2009, arXiv:0712.4273); κ = 0 with the whole training split for a batch is EM itself.

Departures: missing values by their observed coordinates' likelihood alone: the values themselves are no latent
    variables, so that a round goes further. Batches for the whole, as above.
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
from torch.nn import functional as F

from dgm_core import distributed
from dgm_core.capabilities import HasCompletion, HasDecoder, HasLikelihood, HasPosterior
from dgm_core.config import Recipe, Strict
from dgm_core.contract import OBSERVED, Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss, Turn
from dgm_core.precision import full_precision

if TYPE_CHECKING:
    from jaxtyping import Float

TINY = torch.finfo(torch.float32).tiny  # below it no variance has a logarithm in single precision


class PPCA(GenerativeModel, HasLikelihood, HasPosterior, HasDecoder, HasCompletion):
    """Linear-Gaussian latent variables, fitted in closed form or by EM."""

    class Config(Strict):
        latents: int = Field(default=10, ge=1, description="q, the number of principal directions")
        fit: Literal["closed_form", "em"] = "closed_form"
        forgetting: float = Field(
            default=0.6,
            ge=0,
            le=1,
            description="κ: a round's batch weighs t^−κ in round t (em with missing values); 0: it alone",
        )

    config: Config
    exact = True
    takes_missing = True
    mean: Tensor
    weight: Tensor
    log_variance: Tensor
    covariance: Tensor
    origin: Tensor
    statistics: Tensor
    batch_statistics: Tensor

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        latents = min(10, data.dims - 1)
        if OBSERVED in data.context:
            return cls.Config(latents=latents, fit="em"), Recipe(steps=500, batch_size=1000)
        return cls.Config(latents=latents), Recipe(steps=1, batch_size=1000)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        latents = max(1, data.dims // 2)
        if OBSERVED in data.context:
            return cls.Config(latents=latents, fit="em"), Recipe(steps=100, batch_size=64)
        return cls.Config(latents=latents), Recipe(steps=1, batch_size=64)

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
        self.missing = OBSERVED in data.context
        if self.missing and config.fit == "closed_form":
            raise DataMismatch(
                "values of this data may be missing, and the closed form needs them all; set fit: em (which steps over "
                "batches: give it some hundred), or prepare the data with missing: refuse"
            )
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("weight", torch.randn(d, q) / math.sqrt(d))
        self.register_buffer("log_variance", torch.zeros(()))
        if self.missing:
            sums = torch.zeros(d, (q + 1) ** 2 + (q + 1) + 3, dtype=torch.float64)
            self.register_buffer("origin", torch.zeros(d, dtype=torch.float64))
            self.register_buffer("statistics", sums)
            self.register_buffer("batch_statistics", sums.clone(), persistent=False)
        else:
            self.register_buffer("covariance", torch.eye(d), persistent=config.fit == "em")

    def turns(self) -> Sequence[Turn]:
        return [Turn(self.config.fit, ())]

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        if self.missing:
            self.origin, variance = observed_moments(batches, self.mean)
            self.mean = self.origin.to(self.mean)
            self.weight = self.weight * variance.sqrt().to(self.mean)[:, None]
            self.log_variance = variance.mean().clamp_min(TINY).log().to(self.mean)
            return
        self.mean, self.covariance = streamed_moments(batches, self.mean)
        if turn == "closed_form":
            q = self.config.latents
            eigenvalues, eigenvectors = torch.linalg.eigh(self.covariance.double())
            variance = eigenvalues[:-q].mean().clamp_min(TINY)
            scale = (eigenvalues[-q:] - variance).clamp_min(0).sqrt()
            self.weight = (eigenvectors[:, -q:] * scale).flip(1).to(self.mean)
            self.log_variance = variance.log().to(self.mean)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        if self.missing and self.training:
            self._expect(batch.x, batch.context[OBSERVED])
        return Loss(-self.log_prob(batch.x, batch.y, batch.context).mean())

    def after(self, turn: str, clock: Clock) -> None:
        if self.missing:
            self._maximise((clock.step + 1) ** -self.config.forgetting)
        elif turn == "em":
            self._iterate()

    def _iterate(self) -> None:
        """A round of EM on the covariance: the sums over examples are in it."""
        S, W, variance = self.covariance.double(), self.weight.double(), self.log_variance.double().exp()
        eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        inverse_M = torch.linalg.inv(W.T @ W + variance * eye)
        SW = S @ W
        W_new = SW @ torch.linalg.inv(variance * eye + inverse_M @ W.T @ SW)  # eq. 29
        new_variance = (S.trace() - (SW @ inverse_M * W_new).sum()) / S.shape[0]  # eq. 30
        self.weight, self.log_variance = W_new.to(self.mean), new_variance.clamp_min(TINY).log().to(self.mean)

    @torch.no_grad()
    def _expect(self, x: Tensor, observed: Tensor) -> None:
        """Add the batch's sums, a coordinate's over the examples that have it: ⟨ẑẑᵀ⟩, ⟨ẑ⟩ x, x², 1; and the number."""
        here = observed.flatten(1).to(self.origin)
        _, _, cholesky, projected = self._seen(x, {OBSERVED: observed}, torch.float64)
        covariance = self.log_variance.double().exp() * torch.cholesky_inverse(cholesky)
        u = torch.where(here > 0, x.flatten(1).to(self.origin) - self.origin, 0.0)
        ones = torch.ones_like(u[:, :1])
        z_hat = torch.cat([_posterior_mean(cholesky, projected), ones], 1)
        zz = F.pad(covariance, (0, 1, 0, 1)) + z_hat[:, :, None] * z_hat[:, None]
        of_z = here.T @ zz.flatten(1)
        of_x = [u.T @ z_hat, u.square().sum(0)[:, None], here.sum(0)[:, None]]
        self.batch_statistics += torch.cat([of_z, *of_x, ones.sum().expand(u.shape[1], 1)], 1)

    @torch.no_grad()
    def _maximise(self, rate: float) -> None:
        """Average the sums an example of all ranks' batch into the others, and put the parameters where they say."""
        distributed.sum_(self.batch_statistics)
        self.statistics.lerp_(self.batch_statistics / self.batch_statistics[:, -1:].clamp_min(1), rate)
        self.batch_statistics.zero_()
        p = self.config.latents + 1
        A, b = self.statistics[:, : p * p].unflatten(1, (p, p)), self.statistics[:, p * p : p * p + p]
        squares, counts = self.statistics[:, p * p + p], self.statistics[:, p * p + p + 1]
        never = (counts == 0)[:, None]
        solved = torch.linalg.solve(A + never[..., None] * torch.eye(p, dtype=A.dtype, device=A.device), b)
        before = torch.cat([self.weight.to(b), (self.mean.to(b) - self.origin)[:, None]], 1)
        weight = torch.where(never, before, solved)  # what no batch has shown yet stays where it is
        variance = (squares - (weight * b).sum(1)).sum() / counts.sum().clamp_min(TINY)
        self.weight = weight[:, :-1].to(self.mean)
        self.mean = (self.origin + weight[:, -1]).to(self.mean)
        self.log_variance = variance.clamp_min(TINY).log().to(self.mean)

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """Nats, exact; `samples` is not needed. C is inverted through the q × q matrix M (Woodbury).

        With `observed` in the context, of the coordinates that are there; without it, here and below, of all.
        """
        centred, count, cholesky, projected = self._seen(x, context)
        whitened = _whiten(cholesky, projected)
        quadratic = (centred.square().sum(1) - whitened.square().sum(1)) / self.log_variance.exp()
        log_det = 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_det = log_det + (count - self.config.latents) * self.log_variance
        return -0.5 * (quadratic + log_det + count * math.log(2 * math.pi))

    def posterior(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> torch.distributions.Distribution:
        """q(z | x) = N(M⁻¹ Wᵀ (x − μ), σ² M⁻¹) (eq. 6), exact; event of size `latents`."""
        _, _, cholesky, projected = self._seen(x, context)
        with full_precision(self.device):
            precision = cholesky @ cholesky.mT / self.log_variance.exp()
        mean = _posterior_mean(cholesky, projected)
        return torch.distributions.MultivariateNormal(mean, precision_matrix=precision)

    def kl(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Float[Tensor, " B latents"]:
        """Of each marginal of the posterior against N(0, 1), in nats."""
        q = self.posterior(x, y, context)
        return 0.5 * (q.variance + q.mean.square() - 1 - q.variance.log())

    def complete(
        self, x: Tensor, observed: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        """`x` with what is missing drawn given what is there."""
        drawn = self.decode(self.posterior(x, context={OBSERVED: observed}).sample())
        noise = (0.5 * self.log_variance).exp() * torch.randn_like(drawn)
        return torch.where(observed.to(self.device).bool(), x.to(drawn), drawn + noise)

    def draw_latent(self, n: int) -> Float[Tensor, " n latents"]:
        return torch.randn(n, self.config.latents, device=self.device, dtype=self.mean.dtype)

    def decode(
        self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        return (z @ self.weight.T + self.mean).unflatten(1, self.data.shape)

    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Float[Tensor, " n *shape"]:
        mean = self.decode(self.draw_latent(n))
        return mean + (0.5 * self.log_variance).exp() * torch.randn_like(mean)

    def _seen(
        self, x: Tensor, context: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[Float[Tensor, " B d"], Float[Tensor, " B"] | int, Float[Tensor, " *B q q"], Float[Tensor, " B q"]]:
        """x − μ, zero where missing; how many are there; M's Cholesky factor, one for all or one each; Wᵀ (x − μ)."""
        W = self.weight.to(dtype or self.weight.dtype)
        centred = x.flatten(1).to(W) - self.mean.to(W)
        noise = self.log_variance.to(W).exp() * torch.eye(self.config.latents, dtype=W.dtype, device=W.device)
        count: Tensor | int = self.data.dims
        with full_precision(self.device):  # rounded to half, M need not be positive definite
            if OBSERVED in context:
                here = context[OBSERVED].flatten(1).to(W)
                centred, count = torch.where(here > 0, centred, 0.0), here.sum(1)
                M = (here @ (W[:, :, None] * W[:, None]).flatten(1)).unflatten(1, noise.shape)
            else:
                M = W.T @ W
            return centred, count, torch.linalg.cholesky(M + noise), centred @ W


def _whiten(cholesky: Float[Tensor, " *B q q"], rows: Float[Tensor, " B q"]) -> Float[Tensor, " B q"]:
    """L⁻¹ of each row, with one L for all or one each."""
    if cholesky.ndim == 2:
        return torch.linalg.solve_triangular(cholesky, rows.T, upper=False).T
    return torch.linalg.solve_triangular(cholesky, rows[..., None], upper=False)[..., 0]


def _posterior_mean(cholesky: Float[Tensor, " *B q q"], projected: Float[Tensor, " B q"]) -> Float[Tensor, " B q"]:
    """M⁻¹ Wᵀ (x − μ)."""
    return torch.cholesky_solve(projected[..., None], cholesky)[..., 0]


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


def observed_moments(batches: Iterator[Batch], like: Float[Tensor, " d"]) -> tuple[Tensor, Tensor]:
    """Mean and variance (d,) of each coordinate over the examples that have it, float64, as `streamed_moments`."""
    shift: Tensor | None = None
    sums = torch.zeros(3, like.shape[0], dtype=torch.float64, device=like.device)
    for batch in batches:
        x = batch.x.flatten(1).to(like.device, torch.float64)
        here = batch.context[OBSERVED].flatten(1).to(x)
        if shift is None:
            shift = distributed.broadcast((here * x).sum(0) / here.sum(0).clamp_min(1))
        x = here * (x - shift)
        sums += torch.stack([here.sum(0), x.sum(0), x.square().sum(0)])
    if shift is None:
        raise DataMismatch("no example reached this rank: give at least one training example a worker")
    distributed.sum_(sums)
    never = [str(i) for i in (sums[0] == 0).nonzero().flatten().tolist()]
    if never:
        raise DataMismatch(
            f"coordinates {', '.join(never)} are missing from every training example; drop these columns"
        )
    mean = sums[1] / sums[0]
    return mean + shift, sums[2] / sums[0] - mean.square()
