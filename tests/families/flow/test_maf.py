"""Masked autoregressive flow: invertible, with the density that its Jacobian and its conditionals say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Normal

from dgm_core.bijections import Autoregressive, BatchNormalization, Chain, Permutation, Reverse
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.distributions.autoregressive_mixture import AutoregressiveMixture
from dgm_core.models.flow.maf import MAF
from dgm_core.nn.masked import MADE
from dgm_core.nn.norm import Moments

SPECS: dict[str, tuple[DataSpec, dict[str, Any]]] = {
    "plane": (DataSpec("vector", (2,), None), {"batch_norm": True}),
    "vector": (DataSpec("vector", (5,), None), {"order": "random", "residual": True}),
    "conditional": (DataSpec("vector", (3,), None, classes=4), {"conditional": True, "batch_norm": True}),
    "mixture": (DataSpec("vector", (3,), None, classes=4), {"conditional": True, "base": "mog", "components": 4}),
    "made_mog": (DataSpec("vector", (4,), None), {"depth": 0, "base": "mog", "components": 3}),
    "integers": (DataSpec("vector", (3,), 4), {}),
    "grey": (DataSpec("image", (1, 4, 4), 256), {"features": 20}),
}
# Exact algebra in float64, through a logit whose slope at the ends is about 21 for each level (α = 0.05).
EXACT = {"rtol": 0, "atol": 1e-8}


def perturbed(name: str, **overrides: Any) -> MAF:
    """Away from the identity that training starts at, with running moments of its own, in float64."""
    torch.manual_seed(0)
    spec, given = SPECS[name]
    config, _ = MAF.tiny(spec)
    model = MAF(config.merged({**given, **overrides}), spec).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for part in model.modules():
            if isinstance(part, Moments):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2.0)
    return model


def data(model: MAF, n: int) -> tuple[Tensor, Tensor | None]:
    spec = model.data
    y = torch.arange(n) % spec.classes if model.conditional else None
    if spec.levels is None:
        return 1 + 2 * torch.randn(n, *spec.shape, dtype=torch.float64), y
    return torch.randint(0, spec.levels, (n, *spec.shape)).to(spec.dtype), y


@pytest.mark.parametrize("name", SPECS)
def test_inverse(name: str) -> None:
    model = perturbed(name)
    x, y = data(model, 4)
    with torch.no_grad():
        assert model.inverse_error(x, y).max() < EXACT["atol"]
        z = torch.randn(4, model.data.dims).double()
        label = model.context_of(y)
        torch.testing.assert_close(model._normalize(model._invert(z, label), label)[0], z, **EXACT)


@pytest.mark.parametrize("name", SPECS)
def test_log_prob_is_the_density_of_the_jacobian(name: str) -> None:
    """log p_base(f(x)) + log |det ∂f/∂x|, with the whole way from data units to the latent in f."""
    model = perturbed(name)
    x, y = data(model, 2)
    if model.data.levels is None:
        model.enter("model", iter([Batch(data(model, 50)[0])]))
    torch.manual_seed(3)
    found = model.log_prob(x, y)
    torch.manual_seed(3)
    stored = x.double() if model.exact else x + torch.rand(x.shape, dtype=torch.float64)
    label = model.context_of(y)
    for i in range(2):
        own = None if label is None else label[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda flat, c=own: model._normalize(flat.reshape(1, *model.data.shape), c)[0][0],  # type: ignore[misc]
            stored[i].flatten(),
        )
        z = model._normalize(stored[i : i + 1], own)[0]
        expected = model.base.log_prob(z, own)[0] + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(found[i], expected, **EXACT)


@pytest.mark.parametrize("name", SPECS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = perturbed(name).train()
    x, y = data(model, 16)
    model.loss(Batch(x, y), "model", Clock(0, 10)).value.backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        assert p.grad.abs().max() > 0, parameter_name


def test_one_layer_is_made() -> None:
    """log p(x) = Σ_i log N(x_i; μ_i(x_<i), exp(α_i(x_<i))), written out with what the network says."""
    model = perturbed("plane", depth=1, batch_norm=False, standardize=False)
    assert isinstance(model.flow, Chain)
    (layer,) = model.flow.parts
    assert isinstance(layer, Autoregressive)
    x, _ = data(model, 6)
    mean, raw = layer.net(x).chunk(2, 1)
    expected = Normal(mean, (7 * torch.tanh(raw / 7)).exp()).log_prob(x).sum(1)
    torch.testing.assert_close(model.log_prob(x), expected, **EXACT)
    assert (mean[:, 0] == mean[0, 0]).all()
    assert mean[:, 1].std() > 1e-3


def quadrature(log_prob: Any, reach: float = 16.0, steps: int = 641) -> tuple[Tensor, Tensor]:
    """Points of a grid on the plane, and the mass that the density gives each."""
    axis = torch.linspace(-reach, reach, steps, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        return x, log_prob(x).exp() * (axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("label", [0, 2])
def test_mixture_base_is_normalised_and_drawn_from(label: int) -> None:
    """Its mass on the plane is one given each label, and draws have the moments that the grid says."""
    torch.manual_seed(0)
    base = AutoregressiveMixture(MADE(2, 9, features=24, context=3, activation="tanh"), 3).double()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.15 * torch.randn_like(p))
    own = torch.eye(3).double()[label : label + 1]
    x, mass = quadrature(lambda v: base.log_prob(v, own.expand(len(v), 3)))
    # 24 saturating units keep components within some units of their start: ±16 is far outside, a step of 0.05 fine.
    assert abs(mass.sum().item() - 1) < 1e-4
    drawn = base.sample(x.new_empty(40_000, 2), own.expand(40_000, 3))
    for statistic in (lambda v: v[:, 0], lambda v: v[:, 1], lambda v: v.prod(1), lambda v: v.abs().log1p().sum(1)):
        expected = (mass * statistic(x)).sum()
        values = statistic(drawn)
        assert abs(values.mean() - expected) < 5 * values.std() / math.sqrt(len(values))


def test_mixture_base_at_its_start_and_at_no_temperature() -> None:
    """Where the network says nothing: an even mixture of unit Gaussians on a grid from −2 to 2."""
    base = AutoregressiveMixture(MADE(2, 9, features=4), 3).double()
    z = torch.randn(5, 2).double()
    centres = torch.tensor([-2.0, 0.0, 2.0]).double()
    each = Normal(centres, 1.0).log_prob(z[..., None]).logsumexp(-1) - math.log(3)
    torch.testing.assert_close(base.log_prob(z), each.sum(1), **EXACT)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.3 * torch.randn_like(p))
    mode = base.sample(z, temperature=0.0)
    assert torch.equal(mode, mode[:1].expand_as(mode))
    assert base.sample(z).std(0).min() > 0.1


def test_conditional_density_is_one_for_each_label_and_labels_differ() -> None:
    spec = DataSpec("vector", (2,), None, classes=3)
    torch.manual_seed(0)
    config = MAF.Config(conditional=True, depth=2, features=24, hidden=1, activation="tanh", batch_norm=False)
    model = MAF(config, spec).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    means = []
    for k in range(3):
        x, mass = quadrature(lambda v, k=k: model.log_prob(v, torch.full((len(v),), k)))  # type: ignore[misc]
        assert abs(mass.sum().item() - 1) < 1e-4  # as above
        first = (mass * x[:, 0]).sum()
        means.append(first)
        with torch.no_grad():
            drawn = model.sample(4000, torch.full((4000,), k)).double()[:, 0]
        assert abs(drawn.mean() - first) < 5 * drawn.std() / math.sqrt(4000)
    # The coordinate that depends on no other depends on the label.
    assert torch.stack(means).std() > 1e-3
    with pytest.raises(DataMismatch, match="give y"):
        model.log_prob(torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["vector", "conditional", "mixture"])
def test_drawing_equals_naive_passes(name: str) -> None:
    """The flow's inverse, layer by layer, against D passes of every network."""
    model = perturbed(name)
    _, y = data(model, 4)
    label = model.context_of(y)
    z = torch.randn(4, model.data.dims).double()
    assert isinstance(model.flow, Chain)
    with torch.no_grad():
        expected = z
        for part in reversed(model.flow.parts):
            if not isinstance(part, Autoregressive):
                expected = part.inverse(expected, label)[0]  # type: ignore[operator]
                continue
            x = torch.zeros_like(expected)
            for _ in range(model.data.dims):
                x = part.transformer.inverse(expected, part.net(x, label))[0]
            expected = x
        torch.testing.assert_close(model.flow.inverse(z, label)[0], expected, **EXACT)


def test_orders_alternate_or_are_drawn_and_saved() -> None:
    spec = DataSpec("vector", (9,), None)
    config = MAF.Config(depth=3, features=16, hidden=1)
    kinds = [type(part) for part in MAF(config.merged({"batch_norm": False}), spec).flow.parts]  # type: ignore[union-attr]
    assert kinds == [Autoregressive, Reverse, Autoregressive, Reverse, Autoregressive]
    mixed = MAF(config.merged({"batch_norm": False, "base": "mog"}), spec)
    assert [type(part) for part in mixed.flow.parts][-1] is Reverse  # type: ignore[union-attr]
    model = MAF(config.merged({"order": "random"}), spec)
    assert sum(isinstance(part, Permutation) for part in model.modules()) == 2
    assert sum(isinstance(part, BatchNormalization) for part in model.modules()) == 3
    again = MAF(config.merged({"order": "random"}), spec)
    again.load_state_dict(model.state_dict())
    x = torch.randn(4, 9)
    with torch.no_grad():
        torch.testing.assert_close(again.eval().log_prob(x), model.eval().log_prob(x))


def test_defaults_are_the_papers_for_images() -> None:
    config, recipe = MAF.defaults(DataSpec("image", (1, 28, 28), 256))
    assert (config.depth, config.features, config.hidden, config.batch_norm) == (5, 1024, 2, True)
    assert config.alpha == 1e-6
    adam = recipe.optimizers["model"]
    assert (recipe.batch_size, adam.lr, adam.weight_decay) == (100, 1e-4, 1e-6)


def test_refuses_what_it_cannot_model() -> None:
    with pytest.raises(ValidationError, match="nothing to learn"):
        MAF.Config(depth=0)
    with pytest.raises(DataMismatch, match="at least 2 coordinates"):
        MAF(MAF.Config(), DataSpec("vector", (1,), None))
    with pytest.raises(DataMismatch, match="needs classes"):
        MAF(MAF.Config(conditional=True), DataSpec("vector", (2,), None))
    with pytest.raises(DataMismatch, match="kind 'codes'"):
        MAF(MAF.Config(), DataSpec("codes", (4, 4), 8))
