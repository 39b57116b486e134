"""Autoregressive maps: coordinate t moves by what a causal network says of the coordinates before it.

One pass in one direction, D dependent steps in the other: density estimation wants the pass from data to noise
(G. Papamakarios et al., 2017. arXiv:1705.07057), inference wants it from noise to data (`Invert`; D. P. Kingma et al.,
2016. arXiv:1606.04934).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_core.bijections.base import Bijection, Context
from dgm_core.bijections.coupling import Transformer
from dgm_core.capabilities import CausalNet
from dgm_core.precision import full_precision, promote
from dgm_core.shapes import sum_event

if TYPE_CHECKING:
    from jaxtyping import Float


class SoftAffine(Transformer):
    """z = (x − μ) exp(−α): MAF's (eqs. 3–5), with α softly bounded so that no input can make it explode.

    α = b tanh(α̂ / b): the identity to second order.
    """

    outputs = 2

    def __init__(self, bound: float = 7.0) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, x: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_slope = self._split(h, moves, -self.bound)
        return (promote(x) - shift) * log_slope.exp(), log_slope

    def inverse(self, z: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_slope = self._split(h, moves, self.bound)
        return torch.addcmul(shift, promote(z), log_slope.exp()), log_slope

    def _split(self, h: Tensor, moves: Tensor | None, bound: float) -> tuple[Tensor, Tensor]:
        shift, raw = promote(h).chunk(2, 1)
        log_slope = torch.tanh(raw / self.bound) * bound
        return (shift, log_slope) if moves is None else (shift * moves, log_slope * moves)


class GatedAffine(Transformer):
    """z = σ x + (1 − σ) m with σ = sigmoid(bias + s): IAF's (eqs. 13–15), which starts by keeping most of x.

    The bias is the forget gate's of section 4, s is softly bounded, s = b tanh(ŝ / b), so that σ stays off zero.
    """

    outputs = 2

    def __init__(self, bias: float = 2.0, bound: float = 7.0) -> None:
        super().__init__()
        self.bias, self.bound = bias, bound

    def forward(self, x: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        target, log_gate = self._split(h, moves)
        return torch.lerp(target, promote(x), log_gate.exp()), log_gate

    def inverse(self, z: Tensor, h: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        target, log_gate = self._split(h, moves)
        return torch.addcmul(target, promote(z) - target, (-log_gate).exp()), -log_gate

    def _split(self, h: Tensor, moves: Tensor | None) -> tuple[Tensor, Tensor]:
        target, raw = promote(h).chunk(2, 1)
        log_gate = F.logsigmoid(torch.tanh(raw / self.bound) * self.bound + self.bias)
        return (target, log_gate) if moves is None else (target, log_gate * moves)


class Autoregressive(Bijection):
    """z_t = f(x_t; h_t), where the network says h_t of x_1 … x_{t−1}.

    The inverse takes D steps, each of which computes only what the newly known coordinate adds (`net.unroll`), at
    about the cost of one pass. Its gradient is that of the fixed point x = f⁻¹(z; h(x)), found by iteration: the
    adjoint's matrix is nilpotent, so that at most D vector-Jacobian products of the network are exact, and it stops
    when nothing changes any more. It can be differentiated once.
    """

    def __init__(self, net: CausalNet, transformer: Transformer) -> None:
        super().__init__()
        self.net, self.transformer = net, transformer

    def forward(
        self, x: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        z, log_slope = self.transformer(x, self.net(x, context))
        return z, sum_event(log_slope)

    def inverse(
        self, z: Float[Tensor, " B D"], context: Context = None
    ) -> tuple[Float[Tensor, " B D"], Float[Tensor, " B"]]:
        z = promote(z)
        # Here x is what the network makes of itself, which half precision would not keep consistent.
        with full_precision(z.device):
            x, said = self._solve(z, context)
            if torch.is_grad_enabled():
                again = self._refine(x, z, context)
                x = _FixedPoint.apply(again, x, lambda v: self._refine(v, z.detach(), context))
                said = self.net(x, context)
            return x, sum_event(self.transformer.inverse(z, said)[1])

    @torch.no_grad()
    def _solve(self, z: Float[Tensor, " B D"], context: Context) -> tuple[Float[Tensor, " B D"], Tensor]:
        """x, and what the network says of it."""
        unrolling = self.net.unroll(z.shape[0], context)
        for i in unrolling.order:
            unrolling.put(self.transformer.inverse(z[:, i : i + 1], unrolling.step())[0][:, 0])
        return unrolling.told(), unrolling.all_said()

    def _refine(self, x: Tensor, z: Tensor, context: Context) -> Float[Tensor, " B D"]:
        return self.transformer.inverse(z, self.net(x, context))[0]


class Invert(Bijection):
    """The same map with its directions exchanged."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(
        self, x: Float[Tensor, " B *event"], context: Context = None
    ) -> tuple[Float[Tensor, " B *latent"], Float[Tensor, " B"]]:
        return self.bijection.inverse(x, context)

    def inverse(
        self, z: Float[Tensor, " B *latent"], context: Context = None
    ) -> tuple[Float[Tensor, " B *event"], Float[Tensor, " B"]]:
        return self.bijection(z, context)


class _FixedPoint(torch.autograd.Function):
    """x with the gradient of x = refine(x) in all that refine depends on besides x.

    `again` is refine(x) with a graph, in which x is a constant; its gradient is (I − ∂refine/∂x)⁻ᵀ times that of x.
    """

    @staticmethod
    def forward(ctx: Any, again: Tensor, x: Tensor, refine: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.x, ctx.refine = x, refine
        return again.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = adjoint = grads[0]
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            again = ctx.refine(x)
        for _ in range(x.shape[1] - 1):
            (product,) = torch.autograd.grad(again, x, adjoint, retain_graph=True)
            previous, adjoint = adjoint, grad + product
            if adjoint.device.type != "meta" and _settled(adjoint, previous):
                break
        return adjoint, None, None


def _settled(new: Tensor, old: Tensor) -> bool:
    """Whether what changed is below rounding."""
    return bool((new - old).abs().max() <= torch.finfo(new.dtype).eps * new.abs().max())
