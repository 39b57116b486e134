"""Likelihoods and units, against closed forms, enumeration and the data layer's own conversion."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dgm_core.capabilities import HasLikelihood
from dgm_core.contract import Batch, DataSpec
from dgm_core.data.display import bits_per_dim, log_det
from dgm_core.evaluation.likelihood import importance_weighted, likelihood, mean_and_error
from dgm_core.evaluation.record import EvaluationConfig
from dgm_core.models.latent.ppca import PPCA
from tests.evaluation.handmade import IMAGES, Blank, Everything, Ising, images

GREY = {"kind": "image", "shape": [1, 2, 3], "levels": 256, "classes": 0, "class_shares": [], "context": {}}
LOGIT = {"original": GREY, "transforms": [{"name": "logit", "lam": 1e-3, "levels": 256}]}
CHAIN = {
    "original": GREY,
    "transforms": [
        {"name": "dequantize", "levels": 256},
        {"name": "standardize", "mean": [[[0.3]]], "sd": [[[0.2]]]},
    ],
}
BOTH = {
    "original": GREY,
    "transforms": [*LOGIT["transforms"], {"name": "standardize", "mean": [[[-1.0]]], "sd": [[[2.0]]]}],
}


def test_integers_have_no_log_det():
    x = torch.randint(0, 256, (5, 1, 4, 4))
    log_prob = torch.full((5,), -16 * math.log(256))
    assert torch.equal(log_det(x, {}), torch.zeros(5, dtype=torch.float64))
    assert torch.allclose(bits_per_dim(log_prob, x, {}), torch.full((5,), 8.0, dtype=torch.float64))


def test_the_logit_formula_of_the_maf_paper():
    z = torch.randn(4, 1, 2, 3, dtype=torch.float64)
    log_prob = torch.randn(4, dtype=torch.float64)
    s = torch.sigmoid(z).flatten(1)
    paper = -log_prob / (6 * math.log(2)) - math.log2(1 - 2e-3) + 8 + (s.log2() + (1 - s).log2()).mean(1)
    assert torch.allclose(bits_per_dim(log_prob, z, LOGIT), paper, atol=1e-12)


def test_the_volume_is_the_jacobians():
    """x = 256 s(z) … back and forth: ln |det dz/dx| by autograd of the map that the data was put through."""
    x = 256 * torch.rand(6, dtype=torch.float64)

    def logit(x: Tensor) -> Tensor:
        p = 1e-3 + (1 - 2e-3) * x / 256
        return p.log() - (1 - p).log()

    def chain(x: Tensor) -> Tensor:
        return (x / 256 - 0.3) / 0.2

    def both(x: Tensor) -> Tensor:
        return (logit(x) + 1) / 2

    for forward, info in ((logit, LOGIT), (chain, CHAIN), (both, BOTH)):
        jacobian = torch.autograd.functional.jacobian(forward, x)
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert log_det(forward(x).view(1, 1, 2, 3), info).item() == pytest.approx(expected.item(), rel=1e-10)


def test_exact_likelihood_in_bits_and_nats():
    data = DataSpec("vector", (3,), None)
    model = PPCA(PPCA.Config(latents=1), data).double()
    examples = Batch(torch.randn(50, 3, dtype=torch.float64))
    info = {"density": {"entropy": 1.5}, "transforms": [{"name": "standardize", "mean": [0.0] * 3, "sd": [2.0] * 3}]}
    found = likelihood(model, examples, data, info, EvaluationConfig(batch_size=7))
    C = model.weight @ model.weight.T + model.log_variance.exp() * torch.eye(3)
    exact = -torch.distributions.MultivariateNormal(model.mean, C).log_prob(examples.x)
    assert set(found) == {"nll_nats"}  # real numbers that were never integers have no bits per dimension
    assert found["nll_nats"].value == pytest.approx(exact.mean().item(), rel=1e-9)
    assert found["nll_nats"].error == pytest.approx((exact.std() / math.sqrt(50)).item(), rel=1e-9)
    # Halving every coordinate takes ln 2 each off the entropy, which is the best there is.
    assert found["nll_nats"].floor == pytest.approx(1.5 - 3 * math.log(2))


class Scripted(Blank, HasLikelihood):
    """Importance weights in a list; a call with K samples averages the next K."""

    exact = False

    def __init__(self, log_weights: Tensor) -> None:
        super().__init__()
        self.log_weights, self.at = log_weights, 0

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Tensor:
        here = self.log_weights[self.at : self.at + samples]
        self.at += samples
        return (torch.logsumexp(here, 0) - math.log(samples)).expand(x.shape[0])


def test_importance_weights_in_uneven_chunks_are_one_average():
    log_weights = 30 * torch.randn(10, dtype=torch.float64) - 800
    got = importance_weighted(Scripted(log_weights), images(1), 5, samples=10, chunk=4)
    assert got.item() == pytest.approx((torch.logsumexp(log_weights, 0) - math.log(10)).item(), rel=1e-12)


def test_a_bound_is_called_one():
    found = likelihood(Everything(), images(40), IMAGES, {}, EvaluationConfig(importance_samples=8))
    assert set(found) == {"elbo_nats", "bits_per_dim", "nll_is8_nats"}
    elbo = found["elbo_nats"].value
    assert elbo is not None
    assert elbo < -16 * math.log(256)
    assert found["bits_per_dim"].value == pytest.approx(-elbo / (16 * math.log(2)))
    assert found["bits_per_dim"].context["bound"] == "elbo"


def test_energy_models_exact_and_annealed():
    space = Batch(Ising.space())
    exact, annealed = Ising(exact=True), Ising(exact=False)
    p = torch.softmax(-exact.free_energy(space.x), 0)
    examples = Batch(space.x[torch.multinomial(p, 200, replacement=True)])
    nll = -(p.log())[(examples.x * torch.tensor([16, 8, 4, 2, 1])).sum(1)].mean().item()
    options = EvaluationConfig(ais_temperatures=50, ais_chains=400, ais_burn_in=20)
    known = likelihood(exact, examples, exact.data, {}, options)
    assert known["nll_nats"].value == pytest.approx(nll, rel=1e-9)
    assert known["bits_per_dim"].value == pytest.approx(nll / (5 * math.log(2)), rel=1e-9)
    estimated = likelihood(annealed, examples, annealed.data, {}, options)
    assert set(estimated) == {"nll_ais_nats", "nll_reverse_ais_nats"}
    for metric in estimated.values():
        low, high = metric.context["interval"]
        # Three standard errors on either side; wider than 0.1 nats would say nothing on 5 bits.
        assert low <= nll <= high
        assert low <= (metric.value or 0) <= high
        assert high - low < 0.2


def test_mean_and_error():
    mean, error = mean_and_error(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert (mean, error) == pytest.approx((2.0, 1.0))
