"""Depth without its memory: what a chain of bijections keeps of its forward pass for the backward pass.

`store` keeps every activation of every part. `checkpoint` keeps the input of each part and computes it twice
(T. Chen et al., 2016. arXiv:1604.06174). `invertible` keeps the chain's output alone: the backward pass takes each
part's input from its output by the inverse, then computes the part again (A. Gomez et al., 2017. arXiv:1707.04585),
so that memory does not grow with depth. All three have the gradients of the same function; those of `invertible`
carry the rounding of the reconstruction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dgm_core.bijections.base import Bijection, Chain, Context, no_log_det
from dgm_core.bijections.elementwise import BatchNormalization

if TYPE_CHECKING:
    from jaxtyping import Float

Memory = Literal["store", "checkpoint", "invertible"]


class DeepChain(Bijection):
    """A `Chain` whose forward pass keeps as much as `memory` says; the parameters' names do not depend on it.

    Its inverse, where gradients are asked of it, stores.
    """

    def __init__(self, *parts: Bijection, memory: Memory) -> None:
        super().__init__()
        self.chain = Chain(*parts)
        self.memory = memory
        if memory == "invertible" and any(isinstance(part, BatchNormalization) for part in self.modules()):
            raise ValueError(
                "memory: invertible takes activations from outputs, and what batch normalisation did to a batch cannot "
                "be undone from its output; use memory: checkpoint or store, or no batch normalisation"
            )

    def forward(
        self, x: Float[Tensor, " B *event"], context: Context = None
    ) -> tuple[Float[Tensor, " B *latent"], Float[Tensor, " B"]]:
        if self.memory == "store" or not torch.is_grad_enabled():
            return self.chain(x, context)
        if self.memory == "invertible":
            return _Reconstructed.apply(self.chain, x, context, *self.chain.parameters())  # type: ignore[no-any-return]
        log_det = no_log_det(x)
        for part in self.chain.parts:
            # A bijection draws no random numbers: there is no generator to wind back.
            x, more = checkpoint(part, x, context, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
            log_det = log_det + more
        return x, log_det

    def inverse(
        self, z: Float[Tensor, " B *latent"], context: Context = None
    ) -> tuple[Float[Tensor, " B *event"], Float[Tensor, " B"]]:
        return self.chain.inverse(z, context)


class _Reconstructed(torch.autograd.Function):
    """A chain that keeps its output. Parameters are inputs, so that autograd asks for their gradients."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, context: Context, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.chain = chain
        ctx.autocast = _Autocast(x.device.type)
        z, log_det = chain(x, context)
        # The parameters are only checked: autograd refuses a backward pass after they were moved in place.
        ctx.save_for_backward(z, context, *parameters)
        return z, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        z, context, *parameters = ctx.saved_tensors
        _, wants_x, wants_context, *_ = ctx.needs_input_grad
        condition = None if context is None else context.detach().requires_grad_(wants_context)
        found: dict[int, Tensor] = {}  # by the identity of the parameter, or of the context
        for part in reversed(ctx.chain.parts):
            with torch.no_grad(), ctx.autocast.again():
                x, _ = part.inverse(z, context)
            with torch.enable_grad(), ctx.autocast.again():
                x.requires_grad_()
                outputs = part(x, condition)
            inputs = [p for p in part.parameters() if p.requires_grad]
            inputs += [condition] if condition is not None and wants_context else []
            grad_z = _differentiate(outputs, (grad_z, grad_log_det), x, inputs, found)
            z = x.detach()
        grads = [found.get(id(p)) for p in parameters]
        return None, grad_z if wants_x else None, found.get(id(condition)), *grads


def _differentiate(
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    x: Tensor,
    others: Sequence[Tensor],
    found: dict[int, Tensor],
) -> Tensor:
    """Add the gradients of `others` to `found`, and return that of x."""
    # A map that keeps volume has a log-determinant that depends on nothing.
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    of_x, *of_others = torch.autograd.grad(
        [o for o, _ in pairs], [x, *others], [g for _, g in pairs], allow_unused=True
    )
    for tensor, grad in zip(others, of_others, strict=True):
        if grad is not None:
            before = found.get(id(tensor))
            found[id(tensor)] = grad if before is None else before + grad
    return of_x


class _Autocast:
    """The autocasting of the forward pass, for what the backward pass computes again."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.known = torch.amp.is_autocast_available(device_type)
        self.enabled = self.known and torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type) if self.known else None

    def again(self) -> contextlib.AbstractContextManager[Any]:
        if not self.known:
            return contextlib.nullcontext()
        # Without the cache of cast weights: those cast for the inverse have no gradient.
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled, cache_enabled=False)
