"""Real NVP: invertible, with the density that its Jacobian says, and a proper bound for integers."""

import math

import pytest
import torch

from dgm_core.bijections import BatchNormalization
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.flow.real_nvp import RealNVP
from dgm_core.nn.norm import Moments
from tests.families.flow.oracles import EXACT, data, has_the_density_of_its_jacobian, inverts

SPECS = {
    "plane": (DataSpec("vector", (2,), None), {}),
    "vector": (DataSpec("vector", (5,), None), {"mask": "half", "batch_norm": "running"}),
    "integers": (DataSpec("vector", (3,), 4), {}),
    "grey": (DataSpec("image", (1, 8, 8), 256), {}),
    "colour": (DataSpec("image", (3, 4, 6), 5), {"scales": 2, "batch_norm": "running"}),
    "odd_after_halving": (DataSpec("image", (1, 6, 6), None), {"scales": 2, "batch_norm": "none"}),
}


def perturbed(name: str) -> RealNVP:
    """Away from the identity that training starts at, with running moments of its own, in float64."""
    spec, overrides = SPECS[name]
    config, _ = RealNVP.tiny(spec)
    model = RealNVP(config.merged(overrides), spec).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for part in model.modules():
            if isinstance(part, Moments):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2.0)
    return model


@pytest.mark.parametrize("name", SPECS)
def test_inverse(name: str) -> None:
    inverts(perturbed(name))


@pytest.mark.parametrize("name", SPECS)
def test_log_prob_is_the_density_of_the_jacobian(name: str) -> None:
    model = perturbed(name)
    x = data(model.data, 2)
    if model.data.levels is None:
        model.enter("model", iter([Batch(data(model.data, 50))]))
    has_the_density_of_its_jacobian(model, x)


@pytest.mark.parametrize("name", SPECS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = perturbed(name).train()
    loss = model.loss(Batch(data(model.data, 16)), "model", Clock(0, 10))
    loss.value.backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        assert p.grad.abs().max() > 0, parameter_name


def test_integer_probabilities_sum_to_what_lies_inside_the_range() -> None:
    """Σ_x P(x) is the density's mass on [0, levels)ᴰ, the rest being where no integer is; and the bound stays below."""
    spec = DataSpec("vector", (2,), 3)
    config, _ = RealNVP.tiny(spec)
    model = RealNVP(config, spec).double().eval()
    repeats = 4000
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        draws = model.log_prob(every.repeat(repeats, 1)).reshape(repeats, 9)
        probabilities = draws.exp().mean(0)
        inside = model._invert(model.draw_latent(100_000))
    mass = ((inside >= 0) & (inside < 3)).all(1).double().mean()
    error = (draws.exp().var(0).sum() / repeats + mass * (1 - mass) / 100_000).sqrt()
    assert error < 0.01
    assert abs(probabilities.sum() - mass) < 5 * error
    assert mass > 0.8
    elbo = draws.mean(0).exp()
    assert elbo.sum() < probabilities.sum() <= 1 + 5 * error
    assert (elbo <= probabilities).all()


def test_more_samples_tighten_the_bound() -> None:
    model = perturbed("integers")
    x = data(model.data, 200)
    with torch.no_grad():
        one, many = model.log_prob(x), model.log_prob(x, samples=30)
    assert many.mean() > one.mean()
    torch.manual_seed(1)
    found = model.log_prob(x[:3], samples=2)
    torch.manual_seed(1)
    draws = torch.stack([model.log_prob(x[:3]), model.log_prob(x[:3])])
    torch.testing.assert_close(found, draws.exp().mean(0).log(), **EXACT)


def test_entering_standardises_and_keeps_the_density_in_data_units() -> None:
    spec = DataSpec("vector", (2,), None)
    config, _ = RealNVP.tiny(spec)
    model = RealNVP(config, spec).double()
    x = torch.tensor([10.0, -3.0]) + torch.tensor([5.0, 0.1]) * torch.randn(4000, 2, dtype=torch.float64)
    model.enter("model", (Batch(part) for part in x.split(1000)))
    # At its start the flow is the identity, so the model is the Gaussian with the data's moments on the diagonal.
    gaussian = torch.distributions.Normal(x.mean(0), x.std(0, correction=0))
    torch.testing.assert_close(model.log_prob(x[:5]), gaussian.log_prob(x[:5]).sum(1), **EXACT)
    plain = RealNVP(config.merged({"standardize": False}), spec).double()
    plain.enter("model", iter([Batch(x)]))
    standard = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(plain.log_prob(x[:5]), standard.log_prob(x[:5]).sum(1), **EXACT)


def test_loss_is_nats_plus_the_penalty_on_scales() -> None:
    model = perturbed("grey")
    batch = Batch(data(model.data, 8))
    torch.manual_seed(2)
    loss = model.loss(batch, "model", Clock(0, 10))
    torch.manual_seed(2)
    nats = -model.log_prob(batch.x).mean()
    scales = [p for n, p in model.named_parameters() if n.endswith(("magnitude", "bound"))]
    penalty = 5e-5 * sum(p.square().sum() for p in scales)
    torch.testing.assert_close(loss.value, nats + penalty, **EXACT)
    torch.testing.assert_close(loss.metrics["bits_per_dim"], nats.detach() / (64 * math.log(2)), **EXACT)
    # 1 scale of 64 pixels: 3 + 3 couplings, then 4 on a quarter of them.
    assert sum(n.endswith("bound") for n, _ in model.named_parameters()) == 10


def test_samples_are_data_and_temperature_scales_the_latent() -> None:
    model = perturbed("colour")
    with torch.no_grad():
        x = model.sample(50)
        assert x.dtype == torch.uint8
        assert x.shape == (50, 3, 4, 6)
        assert x.min() >= 0
        assert x.max() == 4
        mode = model.sample(3, temperature=0.0)
        assert torch.equal(mode, mode[:1].expand_as(mode))
        decoded = model.decode(torch.zeros(1, 72, dtype=torch.float64))
        # A sample is its interval's lower end; the decoder says the middle, in units where that is the integer.
        torch.testing.assert_close(decoded.round().clamp(0, 4), mode[:1].double(), rtol=0, atol=1.0)
        assert (decoded - mode[:1]).abs().max() <= 0.5


def test_latent_lists_coarse_scales_first() -> None:
    """At the start, the flow only rearranges: the last scale's pixels are one in eight of two factorings."""
    spec = DataSpec("image", (1, 8, 8), None)
    model = RealNVP(RealNVP.Config(features=4, blocks=1, scales=2, batch_norm="none"), spec).double()
    x = torch.arange(64, dtype=torch.float64).reshape(1, 1, 8, 8)
    z = model._normalize(x)[0][0]
    assert sorted(z.tolist()) == list(range(64))
    rows, columns = z[:32].long() // 8, z[:32].long() % 8
    assert ((rows + columns) % 2 == 0).all()  # the diagonals of 2 × 2 squares go on


@pytest.mark.parametrize(("mode", "lags"), [("none", set()), ("batch", {0.0}), ("running", {0.9})])
def test_batch_normalization_follows_every_coupling(mode: str, lags: set[float]) -> None:
    spec = DataSpec("image", (1, 8, 8), 256)
    config, _ = RealNVP.tiny(spec)
    model = RealNVP(config.merged({"batch_norm": mode}), spec)
    layers = [m for m in model.modules() if isinstance(m, BatchNormalization)]
    assert len(layers) == (10 if lags else 0)
    assert {layer.lag for layer in layers} == lags


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        (DataSpec("codes", (4, 4), 8), {}, "kind 'codes'"),
        (DataSpec("vector", (1,), None), {}, "at least 2 coordinates"),
        (DataSpec("image", (1, 6, 6), 2), {"scales": 3}, "at most 2 scales"),
    ],
)
def test_refuses_what_it_cannot_model(spec: DataSpec, overrides: dict[str, int], message: str) -> None:
    with pytest.raises(DataMismatch, match=message):
        RealNVP(RealNVP.Config.model_validate(overrides), spec)
