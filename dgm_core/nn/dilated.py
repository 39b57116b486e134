"""Dilated causal convolutions with gated units, over a whole sequence or one column of it at a time.

A sequence is a grid of one row, (B, channels, 1, T). One gated layer (van den Oord et al. 2016, arXiv:1609.03499,
fig. 4) of dilation d and kernel K, given a condition y, the same everywhere or a sequence of the same length, is

    z = tanh(W_f ∗ x + V_f y) ⊙ σ(W_g ∗ x + V_g y)        (eq. 2 and §2.5; ∗ sees columns t, t − d, …, t − (K − 1) d)
    x ← x + W_r z,    the stack gives Σ_layers W_s z.

W_r and W_s have no bias: the next layer's, and the one of what follows the sum, say the same.

To sample, `start` allocates what each layer must remember, and `step` yields one column at a cost that depends on the
number of layers alone (Le Paine et al. 2016, arXiv:1611.09482). A layer's last (K − 1) d inputs lie in a ring, where
each stays in its place until it is overwritten. They are all known d columns ahead, so what they add to the next
`BLOCK` outputs (to d of them, if fewer) is one product of matrices; the column itself is left with the present tap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.causal import Pointwise
from dgm_core.nn.gated import tanh_gate
from dgm_core.nn.stack import Stack

if TYPE_CHECKING:
    from jaxtyping import Float

BLOCK = 64  # columns whose past is looked up at once, at most


class DilatedConv(nn.Module):
    """Columns t, t − dilation, …, `kernel` of them; those before the first are zero."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.dilation = dilation
        self.past = (kernel - 1) * dilation
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Float[Tensor, " B inputs 1 T"]) -> Float[Tensor, " B outputs 1 T"]:
        return F.conv2d(F.pad(x, (self.past, 0)), self.weight, self.bias, dilation=(1, self.dilation))

    def start(self, n: int) -> Ring:
        return Ring(self.weight, self.bias, n, self.dilation)


class Ring:
    """What a convolution remembers of its input, and what that adds to the outputs of a block of columns.

    Lists of views are made once: taking a view costs as much as a small operation.
    """

    def __init__(
        self,
        weight: Float[Tensor, " outputs inputs 1 kernel"],
        bias: Float[Tensor, " outputs"] | Float[Tensor, " n outputs"],
        n: int,
        dilation: int,
        side: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`side`: a further input (columns, n, features), known in full, and its weight (features, outputs)."""
        *earlier, self.present = weight.detach()[:, :, 0].permute(2, 1, 0).contiguous()
        inputs, outputs = self.present.shape
        self.dilation, self.bias, self.side = dilation, bias.detach(), side
        self.taps = [(dilation * (len(earlier) - i), tap) for i, tap in enumerate(earlier)]
        self.ring = weight.new_zeros(dilation * len(earlier), n, inputs)
        self.block = math.gcd(dilation, BLOCK)  # divides the ring, so that no block of it wraps around
        self.coming = weight.new_empty(self.block, n, outputs)
        self.slots, self.due = self.ring.unbind(0), self.coming.unbind(0)

    def step(
        self, x: Float[Tensor, " n inputs"], t: int, out: Float[Tensor, " n outputs"]
    ) -> Float[Tensor, " n outputs"]:
        """Column t of the output, into `out`; columns are stepped in order."""
        ahead = t % self.block
        if ahead == 0:
            self.look_ahead(t)
        self.slots[t % len(self.slots)].copy_(x)
        return torch.addmm(self.due[ahead], x, self.present, out=out)

    def look_ahead(self, t: int) -> None:
        """What is known by column t of the outputs t … t + block − 1."""
        rows = self.coming.flatten(0, 1)
        if self.side is None:
            self.coming.copy_(self.bias)
        else:
            sequence, weight = self.side
            torch.addmm(self.bias, sequence[t : t + self.block].flatten(0, 1), weight, out=rows)
        for distance, tap in self.taps:
            first = (t - distance) % len(self.slots)
            rows.addmm_(self.ring[first : first + self.block].flatten(0, 1), tap)

    def fill(self, x: Float[Tensor, " n inputs 1 columns"], t: int) -> None:
        """Go on at column t without having been stepped; `x` are the last columns before it, or all of them."""
        size = len(self.slots)
        latest = x[:, :, 0, -size:].permute(2, 0, 1)
        self.ring[torch.arange(t - len(latest), t, device=x.device) % size] = latest
        if t % self.block:
            self.look_ahead(t - t % self.block)  # of that block's columns before t nothing is asked any more


class GatedLayer(nn.Module):
    """One layer; the last of a stack has no residual output, for nothing would read it."""

    def __init__(
        self, channels: int, hidden: int, skip: int, kernel: int, dilation: int, condition: int, *, last: bool
    ) -> None:
        super().__init__()
        self.channels = 0 if last else channels
        self.conv = DilatedConv(channels, 2 * hidden, kernel, dilation)
        self.condition = Pointwise(condition, 2 * hidden) if condition else None
        self.out = nn.Parameter(torch.empty(self.channels + skip, hidden))  # W_r above W_s
        for part in self.out.split([self.channels, skip] if self.channels else [skip]):
            nn.init.xavier_uniform_(part)

    def forward(
        self, x: Float[Tensor, " B channels 1 T"], condition: Tensor | None
    ) -> tuple[Float[Tensor, " B channels 1 T"], Float[Tensor, " B skip 1 T"]]:
        h = self.conv(x)
        if self.condition is not None and condition is not None:
            h = h + self.condition(condition)
        z = tanh_gate(h)
        residual, skip = self.out[: self.channels], self.out[self.channels :]
        return x + F.conv2d(z, residual[:, :, None, None]) if self.channels else x, F.conv2d(z, skip[:, :, None, None])

    def start(self, n: int, condition: Tensor | None) -> tuple[Ring, Tensor]:
        """The convolution's memory, and Wᵀ of what follows it, for `f + f ⊙ g` with (f, g) = tanh(what `step` yields).

        That is twice the gated unit, since σ(b) = (1 + tanh(b / 2)) / 2: the gate's half of the weights is halved here,
        and so is W.
        """
        half = torch.ones_like(self.conv.bias)
        half[len(half) // 2 :] = 0.5
        weight, bias, side = self.conv.weight * half[:, None, None, None], self.conv.bias * half, None
        if self.condition is not None and condition is not None:
            to_gates = (self.condition.weight * half[:, None]).detach().T.contiguous()
            bias = bias + self.condition.bias * half
            if condition.shape[3] == 1:
                bias = torch.addmm(bias, condition[:, :, 0, 0], to_gates)
            else:
                whole = F.pad(condition[:, :, 0], (0, -condition.shape[3] % BLOCK))  # a block may reach past the end
                side = (whole.permute(2, 0, 1).contiguous(), to_gates)
        return Ring(weight, bias, n, self.conv.dilation, side), (0.5 * self.out).detach().T.contiguous()


class StackMemory:
    """Every layer's memory, and the room that steps work in."""

    def __init__(self, stack: DilatedStack, n: int, condition: Tensor | None) -> None:
        like, (channels, hidden, skip) = stack.layers[0].out, stack.widths
        self.state = like.new_empty(n, channels + skip)  # a layer adds to both at once
        self.x, self.skips = self.state[:, :channels], self.state[:, channels:]
        self.gates = like.new_empty(n, 2 * hidden)
        self.value, self.gate = self.gates.chunk(2, 1)
        self.z = like.new_empty(n, hidden)
        targets = [self.state if layer.channels else self.skips for layer in stack.layers]
        started = [layer.start(n, condition) for layer in stack.layers]
        self.layers = [(ring, out, target) for (ring, out), target in zip(started, targets, strict=True)]


class DilatedStack(nn.Module):
    """Gated layers of the given dilations; the sum of their skip outputs."""

    def __init__(
        self, channels: int, hidden: int, skip: int, *, kernel: int, dilations: Sequence[int], condition: int = 0
    ) -> None:
        super().__init__()
        self.widths = (channels, hidden, skip)
        *others, last = dilations
        shape = (channels, hidden, skip, kernel)
        layers = [GatedLayer(*shape, d, condition, last=False) for d in others]
        self.layers = Stack([*layers, GatedLayer(*shape, last, condition, last=True)])

    @property
    def past(self) -> int:
        """How many columns before its own an output sees."""
        return sum(layer.conv.past for layer in self.layers)

    def forward(self, x: Float[Tensor, " B channels 1 T"], condition: Tensor | None) -> Float[Tensor, " B skip 1 T"]:
        """`condition` (B, features, 1, T), or (B, features, 1, 1) if it is the same everywhere."""
        total = None
        for layer in self.layers:
            x, skip = layer(x, condition)
            total = skip if total is None else total + skip
        assert total is not None
        return total

    def start(self, n: int, condition: Tensor | None) -> StackMemory:
        """No columns yet; of a condition that is a sequence, all columns that will be stepped."""
        return StackMemory(self, n, condition)

    @torch.no_grad()
    def fill(
        self, memory: StackMemory, x: Float[Tensor, " n channels 1 columns"], condition: Tensor | None, t: int
    ) -> None:
        """Go on at column t, after one pass over the `past` columns before it (or all of them), and their condition."""
        for layer, (ring, _, _) in zip(self.layers, memory.layers, strict=True):
            ring.fill(x, t)
            x, _ = layer(x, condition)

    def step(self, memory: StackMemory, x: Float[Tensor, " n channels"], t: int) -> Float[Tensor, " n skip"]:
        """Column t; what is returned is overwritten by the next step."""
        memory.x.copy_(x)
        memory.skips.zero_()
        for ring, out, target in memory.layers:
            ring.step(memory.x, t, memory.gates).tanh_()
            torch.addcmul(memory.value, memory.value, memory.gate, out=memory.z)
            target.addmm_(memory.z, out)
        return memory.skips
