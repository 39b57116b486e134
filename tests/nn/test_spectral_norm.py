"""Spectral normalisation: the singular value decomposition as oracle, and what moves its vectors."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dgm_core.nn.spectral_norm import advance, spectrally_normalise

LAYERS = [
    lambda: nn.Linear(5, 7),
    lambda: nn.Conv2d(3, 4, 3),
    lambda: nn.Embedding(4, 6),
    lambda: nn.Linear(6, 1),
]


def normed(make: Any, times: int = 500) -> Any:
    torch.manual_seed(0)
    layer = make().double()
    spectrally_normalise(layer)
    advance(layer, times)
    return layer


def largest(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(weight.detach().flatten(1))[0]


@pytest.mark.parametrize("make", LAYERS)
def test_weight_is_over_its_largest_singular_value(make: Any) -> None:
    layer = normed(make)
    original = layer.parametrizations.weight.original
    wanted = original / largest(original)
    # The error of uᵀWv falls with (σ₂/σ₁)⁴ an iteration: nothing is left of it after 500.
    torch.testing.assert_close(layer.weight, wanted, rtol=1e-9, atol=0)
    assert largest(layer.weight).item() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("make", LAYERS)
def test_a_layer_starts_near_it(make: Any) -> None:
    layer = normed(make, 0)
    # From below: uᵀWv is at most σ. Twenty iterations from a random vector.
    assert 1 - 1e-6 <= largest(layer.weight).item() <= 1.1


def test_gradient_is_equation_12() -> None:
    """∂L/∂W = (G − λ u vᵀ) / σ with G the gradient in W̄ and λ = ⟨G, W̄⟩; it is that of the exact quotient, too."""
    layer = normed(LAYERS[0])
    original = layer.parametrizations.weight.original
    g = torch.randn(7, 5, dtype=torch.float64)
    (found,) = torch.autograd.grad((layer.weight * g).sum(), original)
    w = original.detach().clone().requires_grad_()
    (exact,) = torch.autograd.grad((w / torch.linalg.svdvals(w)[0] * g).sum(), w)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)  # u, v right to the square root of 10⁻¹⁶
    part = layer.parametrizations.weight[0]
    normal = layer.weight.detach()
    paper = (g - (g * normal).sum() * torch.outer(part.u, part.v)) / largest(original)
    torch.testing.assert_close(found, paper, rtol=0, atol=1e-8)


def test_a_pass_changes_nothing_and_advance_follows_the_weights() -> None:
    network: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    spectrally_normalise(network)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    for _ in range(3):
        network(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    moved = copy.deepcopy(network)
    advance(moved, 500)
    for layer, stale in ((moved[0], network[0]), (moved[2], network[2])):
        assert largest(layer.weight).item() == pytest.approx(1, rel=1e-9)
        assert largest(stale.weight).item() > 1.01  # the old vectors are not those of the new weight


def test_only_the_kinds_that_are_asked_for() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Embedding(3, 4), nn.Linear(2, 2))
    spectrally_normalise(network, (nn.Conv2d,))
    assert [nn.utils.parametrize.is_parametrized(part) for part in network] == [True, False, False]


def test_half_precision_of_networks_is_not_the_norms() -> None:
    layer = normed(LAYERS[0]).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.weight
    assert torch.equal(inside, layer.weight)
