"""Autoregressive maps and what stands between them: inverse, log-determinant, causality, and the inverse's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgm_core.bijections import (
    Additive,
    Autoregressive,
    Bijection,
    BoundedAffine,
    Chain,
    DiagonalAffine,
    GatedAffine,
    Invert,
    MaskedCoupling,
    Permutation,
    Reverse,
    SoftAffine,
    SplitCoupling,
    Transformer,
    alternating_mask,
    alternating_parts,
    half_mask,
    half_parts,
)
from dgm_core.nn.flow_nets import CouplingMLP
from dgm_core.nn.masked import MADE

# Exact algebra in float64: rounding of some hundred operations leaves three orders of magnitude to spare.
EXACT = {"rtol": 0, "atol": 1e-8}
D, CONTEXT = 5, 3


def perturbed(bijection: Bijection) -> Bijection:
    bijection.double().eval()
    with torch.no_grad():
        for p in bijection.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return bijection


def autoregressive(transformer: Transformer, context: int = 0, **options: object) -> Autoregressive:
    net = MADE(D, transformer.outputs, features=16, hidden=2, activation="tanh", context=context, **options)  # type: ignore[arg-type]
    return Autoregressive(net, transformer)


def split(parts: tuple[slice, slice], transformer: Transformer) -> SplitCoupling:
    seen, said = (len(range(D)[part]) for part in parts)
    return SplitCoupling(parts, CouplingMLP(seen, transformer.outputs * said, 8, 2), transformer)


def stack() -> Bijection:
    """Both directions, three orders, and what is between them."""
    return Chain(
        autoregressive(SoftAffine(), CONTEXT),
        Reverse(),
        Invert(autoregressive(GatedAffine(), CONTEXT, residual=True)),
        DiagonalAffine(D),
        Permutation(torch.tensor([2, 0, 4, 1, 3])),
        autoregressive(SoftAffine(), order=[1, 3, 0, 2, 4]),
    )


CASES: dict[str, Callable[[], Bijection]] = {
    "maf": lambda: autoregressive(SoftAffine()),
    "maf_with_context": lambda: autoregressive(SoftAffine(), CONTEXT),
    "maf_permuted": lambda: autoregressive(SoftAffine(), order=[3, 1, 0, 4, 2]),
    "gated": lambda: autoregressive(GatedAffine()),
    "iaf": lambda: Invert(autoregressive(GatedAffine())),
    "iaf_with_context": lambda: Invert(autoregressive(GatedAffine(), CONTEXT)),
    "reverse": Reverse,
    "permutation": lambda: Permutation(torch.tensor([3, 1, 0, 4, 2])),
    "diagonal": lambda: DiagonalAffine(D),
    "scaling": lambda: DiagonalAffine(D, shift=False),
    "split_affine": lambda: split(alternating_parts(D, 0), BoundedAffine()),
    "split_additive": lambda: split(half_parts(D, 1), Additive()),
    "stack": stack,
}
WITH_CONTEXT = ("maf_with_context", "iaf_with_context", "stack")


@pytest.mark.parametrize("name", CASES)
def test_inverse_and_log_det(name: str) -> None:
    torch.manual_seed(0)
    bijection = perturbed(CASES[name]())
    x = torch.randn(3, D).double()
    context = torch.randn(3, CONTEXT).double() if name in WITH_CONTEXT else None
    z, log_det = bijection(x, context)
    with torch.no_grad():
        back, log_det_back = bijection.inverse(z.detach(), context)
    torch.testing.assert_close(back, x, **EXACT)
    torch.testing.assert_close(log_det_back, -log_det, **EXACT)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, c=context if context is None else context[i : i + 1]: bijection(v[None], c)[0][0],  # type: ignore[misc]
            x[i],
        )
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian)[1], **EXACT)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
def test_causal_with_the_full_receptive_field(order: list[int]) -> None:
    """∂z/∂x is triangular in the net's order, every entry below the diagonal is there; so it is of the inverse."""
    torch.manual_seed(0)
    bijection = perturbed(autoregressive(SoftAffine(), order=order))
    x = torch.randn(D).double()
    lower = torch.ones(D, D).tril().bool()
    for direction in (bijection.forward, bijection.inverse):
        jacobian = torch.autograd.functional.jacobian(lambda v, f=direction: f(v[None])[0][0], x)[order][:, order]  # type: ignore[misc]
        assert (jacobian[~lower] == 0).all()
        assert (jacobian[lower] != 0).all()


class Naive(Autoregressive):
    """The inverse as it is usually taken: D passes of the whole network."""

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = torch.zeros_like(z), torch.zeros_like(z)
        for _ in range(z.shape[1]):
            x, log_slope = self.transformer.inverse(z, self.net(x, context))
        return x, log_slope.sum(1)


@pytest.mark.parametrize("transformer", [SoftAffine, GatedAffine])
@pytest.mark.parametrize("residual", [False, True])
def test_inverse_and_its_gradients_equal_those_of_naive_passes(transformer: type[Transformer], residual: bool) -> None:
    """In z, in the context and in every parameter."""
    torch.manual_seed(0)
    ours = perturbed(autoregressive(transformer(), CONTEXT, residual=residual, order=[2, 0, 1, 4, 3]))
    assert isinstance(ours, Autoregressive)
    naive = Naive(ours.net, ours.transformer)
    z = torch.randn(4, D).double().requires_grad_()
    context = torch.randn(4, CONTEXT).double().requires_grad_()
    weights = torch.randn(4, D).double()
    leaves = [z, context, *ours.parameters()]
    found = []
    for bijection in (ours, naive):
        x, log_det = bijection.inverse(z, context)
        gradients = torch.autograd.grad((weights * x).sum() + log_det.square().sum(), leaves)
        found.append([x, log_det, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    with torch.no_grad():
        plain, log_det = ours.inverse(z, context)
    torch.testing.assert_close(plain, found[1][0], **EXACT)
    torch.testing.assert_close(log_det, found[1][1], **EXACT)


def test_gradient_stops_iterating_when_nothing_changes() -> None:
    """A network whose outputs depend on one coordinate only settles after two products, not after D − 1."""
    torch.manual_seed(0)
    passes = 0

    class Counting(MADE):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            said = super().forward(x * (torch.arange(x.shape[1]) == 0), context)

            def count(gradient: Tensor) -> None:
                nonlocal passes
                passes += 1

            if said.requires_grad:
                said.register_hook(count)
            return said

    net = Counting(40, 2, features=64, activation="tanh")
    bijection = perturbed(Autoregressive(net, SoftAffine()))
    z = torch.randn(3, 40).double().requires_grad_()
    bijection.inverse(z)[0].sum().backward()
    assert passes <= 4  # the two outer passes, and at most two products


def test_scales_are_bounded_and_start_where_they_should() -> None:
    x, h = torch.ones(1, 2).double(), torch.zeros(1, 4).double()
    z, log_slope = SoftAffine()(x, h)
    assert torch.equal(z, x)
    assert not log_slope.any()
    z, log_slope = GatedAffine()(x, h)
    gate = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(log_slope, torch.full((1, 2), math.log(gate)).double(), **EXACT)
    torch.testing.assert_close(z, gate * x, **EXACT)
    # However wild the network, α stays within ±7, and the gate between sigmoid(2 − 7) and sigmoid(2 + 7).
    wild = torch.tensor([[0.0, 0.0, 1e9, -1e9]]).double()
    torch.testing.assert_close(SoftAffine()(x, wild)[1], torch.tensor([[-7.0, 7.0]]).double(), **EXACT)
    gates = torch.tensor([[9.0, -5.0]]).double().sigmoid()
    torch.testing.assert_close(GatedAffine()(x, wild)[1].exp(), gates, **EXACT)


def test_moves_of_a_mask_leaves_the_others() -> None:
    x, h, moves = torch.randn(3, 4), torch.randn(3, 8), torch.tensor([1.0, 0, 0, 1])
    for transformer in (SoftAffine(), GatedAffine()):
        z, log_slope = transformer(x, h, moves)
        assert torch.equal(z[:, 1:3], x[:, 1:3])
        assert not log_slope[:, 1:3].any()
        assert (z != x)[:, ::3].all()
        torch.testing.assert_close(transformer.inverse(z, h, moves)[0], x)


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize(("parts", "mask"), [(alternating_parts, alternating_mask), (half_parts, half_mask)])
def test_split_coupling_is_the_masked_coupling_of_its_parts(parts: Callable, mask: Callable, parity: int) -> None:
    """The same coordinates pass; and given the same network, the same z."""
    torch.manual_seed(0)
    passing, moving = parts(D, parity)
    shown = torch.zeros(D)
    shown[passing] = 1
    assert torch.equal(shown, mask(D, parity))
    coupling = perturbed(split((passing, moving), BoundedAffine()))
    assert isinstance(coupling, SplitCoupling)

    class Spread(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            whole = x.new_zeros(x.shape[0], 2, D)
            whole[..., moving] = coupling.net(x[:, passing]).unflatten(1, (2, -1))
            return whole.flatten(1)

    masked = MaskedCoupling(mask(D, parity), Spread(), coupling.transformer).double()
    x = torch.randn(3, D).double()
    for a, b in zip(coupling(x), masked(x), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_random_order_is_saved() -> None:
    first, second = Permutation(torch.tensor([1, 2, 0])), Permutation(torch.tensor([0, 1, 2]))
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(second(x)[0], x[:, [1, 2, 0]])
