"""Virtual batch normalisation, with batch normalisation as oracle."""

import pytest
import torch
from torch import Tensor, nn

from dgm_core.nn.norm import BatchNorm
from dgm_core.nn.virtual_batch_norm import VirtualBatchNorm, WithReference

# Same formula, other order of summation, in float64.
EXACT = {"rtol": 0, "atol": 1e-12}
SHAPES = [(3,), (3, 4), (3, 4, 5)]


def pair(r: int) -> tuple[VirtualBatchNorm, BatchNorm]:
    """Both with the same gain and bias."""
    ours, theirs = VirtualBatchNorm(3, r).double(), BatchNorm(3).double()
    with torch.no_grad():
        for p, q in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            assert q is not None
            p.copy_(q.copy_(torch.randn(3)))
    return ours, theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_an_example_is_normalised_with_the_reference_batch(shape: tuple[int, ...]) -> None:
    """Its output is batch normalisation's of the reference batch with that example added; gradients as well."""
    ours, theirs = pair(6)
    reference, x = torch.randn(6, *shape, dtype=torch.float64) * 2 + 1, torch.randn(4, *shape, dtype=torch.float64)
    a, b = reference.clone().requires_grad_(), reference.clone().requires_grad_()
    found = ours(torch.cat([a, x]))[6:]
    wanted = torch.cat([theirs(torch.cat([b, x[i : i + 1]]))[6:] for i in range(4)])
    torch.testing.assert_close(found, wanted, **EXACT)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **EXACT)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, **EXACT)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_batch_is_normalised_alone(shape: tuple[int, ...]) -> None:
    ours, theirs = pair(6)
    reference, x = torch.randn(6, *shape, dtype=torch.float64), 5 + torch.randn(4, *shape, dtype=torch.float64)
    torch.testing.assert_close(ours(torch.cat([reference, x]))[:6], theirs(reference), **EXACT)


def test_one_example_does_not_see_another() -> None:
    ours, _ = pair(5)
    reference, x = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    together = ours(torch.cat([reference, x]))[5:]
    apart = torch.cat([ours(torch.cat([reference, x[i : i + 1]]))[5:] for i in range(4)])
    torch.testing.assert_close(together, apart, **EXACT)
    ours.eval()
    torch.testing.assert_close(ours(torch.cat([reference, x]))[5:], together, rtol=0, atol=0)
    assert not torch.allclose(ours(torch.cat([reference + x[:1], x]))[5:], together)  # it does see the reference


def test_statistics_survive_a_large_mean() -> None:
    """E x² − (E x)² at a mean of 4096 would be off by 4096² · 2⁻²⁴ = 1 in float32: by as much as the variance."""
    ours = VirtualBatchNorm(2, 500)
    x = 4096 + torch.randn(600, 2)
    expected = (x[:500].double() - x[:500].double().mean(0)) / x[:500].double().std(0, correction=0)
    # A rounding of 4096 · 2⁻²⁴ = 2 · 10⁻⁴ in the mean, of a unit of variance.
    torch.testing.assert_close(ours(x)[:500].double(), expected, rtol=0, atol=2e-3)


def test_a_network_is_run_with_its_reference_batch() -> None:
    latents = torch.randn(6, 2, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(2, 3, dtype=torch.float64), VirtualBatchNorm(3, 6).double())
    module = WithReference(network, latents)
    z = torch.randn(4, 2, dtype=torch.float64)
    found: Tensor = module(z)
    assert found.shape == (4, 3)
    torch.testing.assert_close(found, network(torch.cat([latents, z]))[6:], rtol=0, atol=0)
    assert "latents" in module.state_dict()
    assert all(p is not module.latents for p in module.parameters())
