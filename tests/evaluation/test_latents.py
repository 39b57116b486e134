"""Latent statistics of posteriors that were made to have them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from dgm_core.capabilities import HasPosterior
from dgm_core.contract import Batch, DataSpec
from dgm_core.evaluation import latents, reconstructions
from dgm_core.evaluation.record import EvaluationConfig
from dgm_core.models.latent.ppca import PPCA
from tests.evaluation.handmade import IMAGES, Blank, Everything, images


class Constructed(Blank, HasPosterior):
    """Latent 0 follows the data, latent 1 hardly does, latent 2 is the prior."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__(DataSpec("vector", (1,), None))
        self.scale = scale

    def posterior(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Distribution:
        mean = torch.cat([x, 0.09 * x, 0 * x], 1)
        sd = torch.tensor([self.scale, 0.9, 1.0], dtype=x.dtype).expand_as(mean)
        return Independent(Normal(mean, sd), 1)

    def kl(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        q = self.posterior(x).base_dist  # type: ignore[attr-defined]
        return torch.distributions.kl_divergence(q, Normal(torch.zeros_like(q.mean), 1.0))


X = torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]  # variance 0.34


def test_active_units_of_a_constructed_posterior():
    """Var(E[z | x]) is 0.34, 0.0027 and 0: only the first exceeds 0.01 (Burda et al. 2016)."""
    means, how = latents.posterior_means(Constructed(), Batch(X), 64)
    assert how == "mean"
    assert latents.active_units(means).tolist() == [True, False, False]


def test_kl_by_dimension():
    kl = latents.kl_by_dimension(Constructed(), Batch(X), 64)
    variance = X.square().mean()
    expected = [
        0.5 * (variance + 0.25 - 1 - math.log(0.25)),
        0.5 * (0.0081 * variance + 0.81 - 1 - math.log(0.81)),
        0.0,
    ]
    assert kl.tolist() == pytest.approx([float(e) for e in expected], abs=1e-9)


def test_mutual_information_at_its_ends():
    """Posteriors that do not overlap tell every example apart: ln n. Posteriors that are all alike tell nothing: 0."""
    x = 1000 * torch.arange(50, dtype=torch.float64)[:, None]
    assert latents.mutual_information(Constructed(), Batch(x), chunk=7) == pytest.approx(math.log(50), abs=1e-6)
    assert latents.mutual_information(Constructed(), Batch(torch.ones(50, 1).double())) == pytest.approx(0, abs=1e-9)


def test_mutual_information_of_a_gaussian_channel():
    """x ~ N(0, 1), z = x + N(0, 1/4): ½ ln 5 (the second latent adds ½ ln(1 + 0.01))."""
    model, n = Constructed(scale=0.5), 2000
    got = latents.mutual_information(model, Batch(torch.randn(n, 1, dtype=torch.float64)), chunk=256)
    # One draw an example: the mean's error is of the order of 1 / sqrt(2000) = 0.022.
    assert got == pytest.approx(0.5 * math.log(5) + 0.5 * math.log(1.01), abs=0.07)


def test_collapse_is_said_in_words():
    options = EvaluationConfig()
    metrics, _, warnings = latents.latent_metrics(Constructed(), Batch(torch.ones(20, 1).double()), options)
    assert metrics["active_units"].value == 0
    assert any("collapsed" in w for w in warnings)
    _, _, warnings = latents.latent_metrics(Constructed(), Batch(X), options)
    assert warnings == []


def test_a_posterior_without_a_mean_is_drawn_from():
    class Flow(Constructed):
        def posterior(self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Distribution:
            from torch.distributions import TransformedDistribution
            from torch.distributions.transforms import TanhTransform

            return TransformedDistribution(super().posterior(x), [TanhTransform()])

    z, how = latents.posterior_means(Flow(), Batch(X), 64)
    assert how == "draw"
    assert z.shape == (201, 3)


def test_reconstruction_error_is_the_projections():
    """Of pPCA with a tiny noise: what is left of x off the principal direction."""
    model = PPCA(PPCA.Config(latents=1), DataSpec("vector", (2,), None)).double()
    model.mean.zero_()
    model.weight.copy_(torch.tensor([[3.0], [0.0]]))
    model.log_variance.fill_(-30.0)
    batch = Batch(torch.randn(100, 2, dtype=torch.float64))
    reconstructed, how = reconstructions.reconstruct(model, batch, 33)
    metric = reconstructions.reconstruction_metrics(reconstructed, how, batch, model.data, None)["reconstruction_mse"]
    assert how == "mean"
    # σ²/9 ≈ 1e-14 of shrinkage is far below what is compared.
    assert metric.value == pytest.approx(batch.x[:, 1].square().mean().item() / 2, rel=1e-9)


def test_integer_data_is_measured_on_the_unit_interval():
    batch = images(30)
    shifted = batch.x.float() + 25.5
    metric = reconstructions.reconstruction_metrics(shifted, "mean", batch, IMAGES, None)["reconstruction_mse"]
    assert metric.value == pytest.approx(0.01, rel=1e-5)


def test_codes_come_before_latents():
    model = Everything()
    assert reconstructions.can_reconstruct(model)
    assert not reconstructions.can_reconstruct(Constructed())
    assert reconstructions.reconstruct(model, images(4), 2)[1] == "codes"
