"""Masked perceptrons: what is said of a coordinate depends on the coordinates before it alone.

M. Germain et al., 2015. arXiv:1502.03509. Hidden unit k has a degree m(k) and sees what needs no more than the first
m(k) coordinates (eqs. 8, 9); the outputs of coordinate d see units of degree below d (eq. 10). Here degrees ascend
along every layer, so that masks are staircases: a layer keeps its weight as a few blocks of rows, each as wide as its
last row sees, and what no row of a block sees is neither stored nor multiplied nor updated.

`MADE.forward` says all conditionals in one pass. `Unrolled` says them one at a time while the coordinates are drawn:
a unit is computed once, as soon as what it sees is known, so that all D steps together cost about one pass, not D.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

Activation = Literal["relu", "tanh"]
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu, torch.relu_),
    "tanh": (torch.tanh, torch.tanh_),
}
_LEAST_ROWS, _MOST_BLOCKS = 256, 8  # narrower blocks cost more calls than they save


class MaskedLinear(nn.Module):
    """Row r sees the first `reach[r]` inputs: (B, inputs) -> (B, heads · rows), for each head a row after the other.

    Weights and biases start uniform within ±1/√reach, as torch's linear layers do given the inputs that they see.

    Args:
        reach: ascending.
        zero: start at zero instead.
    """

    def __init__(self, inputs: int, reach: Sequence[int], heads: int = 1, *, zero: bool = False) -> None:
        super().__init__()
        blocks = max(1, min(_MOST_BLOCKS, len(reach), len(reach) * heads // _LEAST_ROWS))
        ends = [len(reach) * i // blocks for i in range(blocks + 1)]
        self.inputs, self.heads = inputs, heads
        self.blocks = nn.ModuleList(_Rows(reach[start:end], heads, zero) for start, end in itertools.pairwise(ends))

    def forward(self, x: Float[Tensor, " B inputs"]) -> Float[Tensor, " B heads*rows"]:
        parts = [block(x) for block in self.blocks]
        if len(parts) == 1:
            return parts[0]
        if self.heads == 1:
            return torch.cat(parts, 1)
        return torch.cat([part.unflatten(1, (self.heads, -1)) for part in parts], 2).flatten(1)

    @torch.no_grad()
    def dense(self) -> tuple[Float[Tensor, " rows heads inputs"], Float[Tensor, " rows heads"]]:
        """The masked weight and the bias in one piece, the heads of a row next to each other."""
        weights, biases = [], []
        for block in self.blocks:
            assert isinstance(block, _Rows)
            weight, bias = block.dense(self.inputs)
            weights.append(weight.unflatten(0, (self.heads, -1)))
            biases.append(bias.unflatten(0, (self.heads, -1)))
        return torch.cat(weights, 1).transpose(0, 1).contiguous(), torch.cat(biases, 1).t()


class _Rows(nn.Module):
    """Some rows of a `MaskedLinear`: a matrix of what all of them see, and beside it a masked one of what some do."""

    mask: Tensor

    def __init__(self, reach: Sequence[int], heads: int, zero: bool) -> None:
        super().__init__()
        low, self.width = reach[0], reach[-1]
        self.common = low if 2 * low >= self.width else 0
        seen = torch.tensor(reach).repeat(heads)[:, None]
        columns = torch.arange(self.common, self.width)
        self.register_buffer("mask", (columns < seen).float(), persistent=False)
        bound = 0.0 if zero else seen.clamp_min(1).rsqrt()
        start = (2 * torch.rand(len(seen), self.width + 1) - 1) * bound
        self.bias = nn.Parameter(start[:, -1].clone())
        self.matrix = nn.Parameter(start[:, : self.common].clone()) if self.common else None
        self.stair = nn.Parameter(start[:, self.common : -1] * self.mask) if self.width > self.common else None

    def forward(self, x: Float[Tensor, " B inputs"]) -> Float[Tensor, " B heads*rows"]:
        common = self.bias if self.matrix is None else F.linear(x[:, : self.common], self.matrix, self.bias)
        if self.stair is not None:
            return torch.addmm(common, x[:, self.common : self.width], (self.stair * self.mask).t())
        return common if self.matrix is not None else common.expand(x.shape[0], -1)

    def dense(self, inputs: int) -> tuple[Float[Tensor, " heads*rows inputs"], Float[Tensor, " heads*rows"]]:
        weight = self.bias.new_zeros(len(self.bias), inputs)
        if self.matrix is not None:
            weight[:, : self.common] = self.matrix
        if self.stair is not None:
            weight[:, self.common : self.width] = self.stair * self.mask
        return weight, self.bias


class MADE(nn.Module):
    """(B, D) -> (B, outputs · D): `outputs` numbers for each coordinate, the first of all of them, then the second …

    Coordinate `order[t]` depends on `order[0]` … `order[t − 1]`, and on all of them: where a layer has fewer units than
    there are degrees, inputs are connected to outputs directly as well (section 4.2). The last layer starts at zero.

    Args:
        features: hidden units of a layer.
        hidden: hidden layers; or, if `residual`, blocks h + W₂ a(W₁ a(h)) after a first layer.
        context: size of the vector that every conditional depends on, the first coordinate's too; 0 for none.
        context_in: which hidden layers it enters, by a matrix of its own.
        order: a permutation of the coordinates; None: as they come.
        direct: connect inputs to outputs even where it is not needed.
    """

    sort: Tensor | None
    unsort: Tensor | None

    def __init__(
        self,
        dims: int,
        outputs: int = 1,
        *,
        features: int,
        hidden: int = 1,
        residual: bool = False,
        activation: Activation = "relu",
        context: int = 0,
        context_in: Literal["first", "every"] = "first",
        order: Sequence[int] | None = None,
        direct: bool = False,
    ) -> None:
        super().__init__()
        lowest = 0 if context else 1  # a unit of degree 0 sees nothing but the context
        if dims <= lowest:
            raise ValueError(f"dims is {dims}: without a context a single coordinate has nothing to depend on")
        if order is not None and sorted(order) != list(range(dims)):
            raise ValueError(f"order must list each of 0 … {dims - 1} once; given: {list(order)}")
        self.dims, self.outputs, self.residual = dims, outputs, residual
        self.activate, self.activate_ = _ACTIVATIONS[activation]
        self.order = list(range(dims)) if order is None else list(order)
        position = sorted(range(dims), key=self.order.__getitem__)
        self.register_buffer("sort", None if order is None else torch.tensor(self.order), persistent=False)
        self.register_buffer("unsort", None if order is None else torch.tensor(position), persistent=False)

        degrees = [lowest + k * (dims - lowest) // features for k in range(features)]
        upto = [bisect_right(degrees, m) for m in range(dims)]  # units of degree at most m
        self.starts = [0, *upto]  # where the units of degree m begin
        layers = [MaskedLinear(dims, degrees)]
        for _ in range(2 * hidden if residual else hidden - 1):
            layers.append(MaskedLinear(features, [upto[m] for m in degrees]))
        self.layers = nn.ModuleList(layers)
        entered = 0 if not context else len(layers) if context_in == "every" else 1
        self.contexts = nn.ModuleList(nn.Linear(context, features, bias=False) for _ in range(entered))
        self.last = MaskedLinear(features, upto, outputs, zero=True)
        needed = features < dims - lowest
        self.direct = MaskedLinear(dims, range(dims), outputs, zero=True) if direct or needed else None

    def forward(
        self, x: Float[Tensor, " B D"], context: Float[Tensor, " B features"] | None = None
    ) -> Float[Tensor, " B outputs*D"]:
        if self.sort is not None:
            x = x[:, self.sort]
        h = self._hidden(0, x, context)
        if self.residual:
            for i in range(1, len(self.layers), 2):
                h = h + self._hidden(i + 1, self.activate_(self._hidden(i, self.activate(h), context)), context)
        else:
            for i in range(1, len(self.layers)):
                h = self._hidden(i, self.activate_(h), context)
        out = self.last(self.activate_(h))
        if self.direct is not None:
            out = out + self.direct(x)
        return out if self.unsort is None else out.unflatten(1, (self.outputs, -1))[..., self.unsort].flatten(1)

    def unroll(self, n: int, context: Float[Tensor, " n features"] | None = None) -> Unrolled:
        """The same network a coordinate at a time, for n examples that are yet to be drawn."""
        return Unrolled(self, n, context)

    def _hidden(self, i: int, h: Tensor, context: Tensor | None) -> Tensor:
        pre = self.layers[i](h)
        return pre + self.contexts[i](context) if i < len(self.contexts) else pre


class Unrolled:
    """A `MADE` that is told its coordinates one at a time, in its order, and computes each hidden unit once.

    `step()` gives what the network says of the next coordinate, `put(value)` tells that coordinate. No gradients.

    What a unit sees of coordinates before the present block of them is added for the whole block at once; within the
    block it is added unit by unit, from small matrices. Units and coordinates are rows here, examples are columns.

    Args:
        block: coordinates.
    """

    @torch.no_grad()
    def __init__(self, net: MADE, n: int, context: Tensor | None = None, *, block: int = 64) -> None:
        self.net, self.block = net, block
        self.order: Sequence[int] = net.order
        self.at = self.first = self.end = 0  # the next coordinate; the present block
        self.weights, self.buffers = [], []
        for i, layer in enumerate(net.layers):
            assert isinstance(layer, MaskedLinear)
            weight, bias = layer.dense()
            start = bias if i >= len(net.contexts) else bias + net.contexts[i](context).t()
            self.weights.append(weight[:, 0])
            self.buffers.append(start.expand(-1, n).clone())
        weight, bias = net.last.dense()
        self.last = weight.flatten(0, 1)
        self.said = bias.reshape(-1, 1).expand(-1, n).clone()  # (D · outputs, n)
        self.direct = None if net.direct is None else net.direct.dense()[0].flatten(0, 1)
        if net.direct is not None:
            self.said += net.direct.dense()[1].reshape(-1, 1)
        self.x = self.said.new_zeros(net.dims, n)
        # What each layer reads, and at the end what the last one reads. A residual stream is kept activated.
        self.sources = [self.x, *self.buffers]
        if net.residual:
            self.sources[1::2] = [torch.zeros_like(self.buffers[0]) for _ in self.sources[1::2]]

    @torch.no_grad()
    def step(self) -> Float[Tensor, " n outputs"]:
        """What the network says of coordinate `order[t]`, t coordinates being told."""
        t, rows = self.at, slice(self.at * self.net.outputs, (self.at + 1) * self.net.outputs)
        if t == self.end:
            self._open()
        low, high = self.net.starts[t : t + 2]
        if high > low:
            self._advance(low, high)
        known = slice(self.net.starts[self.first], high)
        self.said[rows].addmm_(self.last[rows, known], self.sources[-1][known])
        if self.direct is not None:
            self.said[rows].addmm_(self.direct[rows, self.first : t], self.x[self.first : t])
        return self.said[rows].t()

    def put(self, value: Float[Tensor, " n"]) -> None:
        self.x[self.at] = value
        self.at += 1

    def told(self) -> Float[Tensor, " n D"]:
        """All coordinates, in their own order."""
        x = self.x.t()
        return x if self.net.unsort is None else x[:, self.net.unsort]

    def all_said(self) -> Float[Tensor, " n outputs*D"]:
        """What `MADE.forward` says of `told()`."""
        said = self.said.reshape(self.net.dims, self.net.outputs, -1).permute(2, 1, 0)
        return (said if self.net.unsort is None else said[..., self.net.unsort]).flatten(1)

    def _advance(self, low: int, high: int) -> None:
        """Compute the units from `low` to `high`, which see what is told by now."""
        units, known = slice(low, high), slice(self.net.starts[self.first], high)
        stream = None
        for i, (weight, buffer) in enumerate(zip(self.weights, self.buffers, strict=True)):
            seen = known if i else slice(self.first, self.at)
            new = buffer[units].addmm_(weight[units, seen], self.sources[i][seen])
            if self.net.residual and i % 2 == 0:
                stream = new if stream is None else stream + new
                self.sources[i + 1][units] = self.net.activate(stream)
            else:
                self.net.activate_(new)

    def _open(self) -> None:
        """Begin a block: add what its units and outputs see of everything before it."""
        t, starts, outputs = self.at, self.net.starts, self.net.outputs
        self.first, self.end = t, min(t + self.block, self.net.dims)
        units, rows = slice(starts[t], starts[self.end]), slice(t * outputs, self.end * outputs)
        for i, (weight, buffer) in enumerate(zip(self.weights, self.buffers, strict=True)):
            known = starts[t] if i else t
            buffer[units].addmm_(weight[units, :known], self.sources[i][:known])
        self.said[rows].addmm_(self.last[rows, : starts[t]], self.sources[-1][: starts[t]])
        if self.direct is not None:
            self.said[rows].addmm_(self.direct[rows, :t], self.x[:t])
