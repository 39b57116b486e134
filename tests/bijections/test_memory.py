"""Memory for depth: three ways to keep activations, one function and one gradient."""

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.bijections import (
    ActNorm,
    ActNormConv2d,
    BatchNormalization,
    Bijection,
    Chain,
    ChannelCoupling,
    Context,
    DeepChain,
    LUConvolution,
    Memory,
    SigmoidAffine,
    Squeeze,
)
from dgm_core.nn.norm import Moments

MODES: tuple[Memory, ...] = get_args(Memory)
# float64 through eight steps and their inverses; the reconstruction's rounding is what differs.
EXACT = {"rtol": 0, "atol": 1e-8}


class Steered(nn.Module):
    """A coupling's network that looks at a vector for context."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.enter = ActNormConv2d(channels, 6, 3)
        self.given = nn.Linear(3, 6)
        self.out = nn.Conv2d(6, out, 1)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        h = self.enter(x)
        if context is not None:
            h = h + self.given(context)[:, :, None, None]
        return self.out(F.softplus(h))


def step() -> Bijection:
    return Chain(ActNorm(4), LUConvolution(4), ChannelCoupling(Steered(2, 4), SigmoidAffine(), swap=False))


def deep(memory: Memory, depth: int = 4) -> DeepChain:
    torch.manual_seed(0)
    chain = DeepChain(Squeeze(), *(step() for _ in range(depth)), memory=memory)
    with torch.no_grad():
        for p in chain.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return chain


def gradients(chain: DeepChain, context: Tensor | None, only: str = "both") -> dict[str, Tensor]:
    """Of a scalar that depends on every output, with respect to parameters, input and context."""
    torch.manual_seed(1)
    dtype = next(chain.parameters()).dtype
    x = torch.randn(3, 1, 4, 6, dtype=dtype, requires_grad=True)
    condition = None if context is None else context.to(dtype).requires_grad_()
    z, log_det = chain(x, condition)
    parts = {"z": (torch.randn_like(z) * z).sum(), "log_det": (torch.randn(3, dtype=dtype) * log_det).sum()}
    value = sum(parts.values()) if only == "both" else parts[only]
    assert isinstance(value, Tensor)
    value.backward()
    found = {name: p.grad for name, p in chain.named_parameters()} | {"x": x.grad}
    if condition is not None:
        found["context"] = condition.grad
    chain.zero_grad()
    return {k: v for k, v in found.items() if v is not None} | {"value": value.detach()}


@pytest.mark.parametrize("only", ["both", "z", "log_det"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("memory", MODES[1:])
def test_gradients_are_those_of_store(memory: Memory, conditional: bool, only: str) -> None:
    context = torch.randn(3, 3) if conditional else None
    expected = gradients(deep("store").double(), context, only)
    found = gradients(deep(memory).double(), context, only)
    assert "context" in found or not conditional
    # What nothing depends on may come as None or as zeros: the last shift has no part in the determinant.
    for name in expected.keys() | found.keys():
        a, b = expected.get(name), found.get(name)
        known = a if a is not None else b
        assert known is not None
        zero = torch.zeros_like(known)
        torch.testing.assert_close(zero if b is None else b, zero if a is None else a, **EXACT, msg=name)
    assert expected["x"].abs().max() > 0.1


def test_names_do_not_depend_on_memory() -> None:
    assert len({tuple(deep(memory).state_dict()) for memory in MODES}) == 1


@pytest.mark.parametrize("memory", MODES)
def test_inverse_inverts(memory: Memory) -> None:
    chain = deep(memory).double()
    x = torch.randn(3, 1, 4, 6, dtype=torch.float64)
    z, log_det = chain(x)
    back, log_det_back = chain.inverse(z)
    torch.testing.assert_close(back, x, **EXACT)
    torch.testing.assert_close(log_det_back, -log_det, **EXACT)


def test_frozen_parameters_get_no_gradient() -> None:
    expected = gradients(deep("store").double(), None)
    chain = deep("invertible").double()
    frozen = {name for name, p in chain.named_parameters() if "weight" in name}
    for name, p in chain.named_parameters():
        p.requires_grad_(name not in frozen)
    found = gradients(chain, None)
    assert frozen
    assert not frozen & found.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **EXACT, msg=name)


def test_a_part_used_twice_gets_both_gradients() -> None:
    def twice(memory: Memory) -> DeepChain:
        torch.manual_seed(0)
        shared = step()
        return DeepChain(Squeeze(), shared, step(), shared, memory=memory).double()

    expected, found = gradients(twice("store"), None), gradients(twice("invertible"), None)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT, msg=name)


def kept_bytes(chain: DeepChain) -> int:
    """What autograd saves in the forward pass, but for parameters and what is computed from parameters alone."""
    kept: dict[int, int] = {}
    batch = 64

    def pack(t: Tensor) -> Tensor:
        if t.ndim and t.shape[0] == batch:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z, log_det = chain(torch.randn(batch, 1, 4, 6))
    total = sum(kept.values())
    (z.sum() + log_det.sum()).backward()
    return total


def test_invertible_keeps_no_more_for_a_deeper_chain() -> None:
    z = 64 * 24 * 4  # the output, in bytes
    assert kept_bytes(deep("invertible", 2)) == kept_bytes(deep("invertible", 12)) == z
    assert kept_bytes(deep("store", 12)) > 5 * kept_bytes(deep("store", 2))
    assert kept_bytes(deep("store", 12)) > 50 * z


@pytest.mark.parametrize("memory", MODES)
def test_nothing_is_kept_without_gradients(memory: Memory) -> None:
    chain = deep(memory)
    with torch.no_grad():
        z, log_det = chain(torch.randn(2, 1, 4, 6))
    assert not z.requires_grad
    assert not log_det.requires_grad


def test_refuses_a_backward_pass_after_the_parameters_moved() -> None:
    chain = deep("invertible")
    z, _ = chain(torch.randn(2, 1, 4, 6))
    with torch.no_grad():
        next(chain.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_autocasting_is_the_forward_passs_in_the_backward_pass() -> None:
    """In bfloat16 the recomputed networks are those of the forward pass: the gradients are those of `store`."""
    found: dict[Memory, dict[str, Tensor]] = {}
    seen: dict[Memory, set[torch.dtype]] = {}
    for memory in MODES:
        chain = deep(memory)
        seen[memory] = set()

        def note(_: nn.Module, __: Any, out: Tensor, memory: Memory = memory) -> None:
            seen[memory].add(out.dtype)

        for module in chain.modules():
            if isinstance(module, Steered):
                module.register_forward_hook(note)
        torch.manual_seed(1)
        x = torch.randn(16, 1, 4, 6)
        with torch.autocast("cpu", torch.bfloat16):
            z, log_det = chain(x)
        assert z.dtype == log_det.dtype == torch.float32
        (z.square().mean() - log_det.mean()).backward()  # after autocasting, as the trainer does
        found[memory] = {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}
    assert seen == {memory: {torch.bfloat16} for memory in MODES}
    for memory in MODES[1:]:
        for name, expected in found["store"].items():
            # bfloat16 has 8 bits: a reconstructed input may fall to the other side of a rounding.
            error = (found[memory][name] - expected).norm() / expected.norm()
            assert error < 0.03, f"{memory} {name} {error}"


def test_refuses_what_cannot_be_undone() -> None:
    part = Chain(ActNorm(2), BatchNormalization(Moments(2)))
    with pytest.raises(ValueError, match="memory: invertible"):
        DeepChain(part, memory="invertible")
    DeepChain(part, memory="checkpoint")
