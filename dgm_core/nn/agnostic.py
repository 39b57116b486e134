"""Masked perceptrons whose order and connectivity change: one set of weights under many masks.

M. Germain et al., 2015. arXiv:1502.03509: order-agnostic and connectivity-agnostic training. Hidden unit k has a degree
m(k) and sees what needs no more than the first m(k) coordinates of an order; the outputs of a coordinate see units of
degree below its place in it. Orders and sets of degrees are drawn once and kept. With one of each, `nn.masked.MADE`
does the same at half the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.stack import Stack

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class AgnosticMADE(nn.Module):
    """(B, D · width) -> (B, D, outputs): what is said of each coordinate, given those before it in the order.

    `width` inputs stand for one coordinate, next to each other. Where all coordinates that precede are to be seen
    whatever the degrees, `direct` connects inputs to outputs.

    Args:
        features: hidden units of a layer.
        hidden: hidden layers.
        context: size of the vector that every conditional depends on, the first coordinate's too; 0 for none.
        orders: how many; one is the order in which the coordinates come, several are drawn.
        masks: sets of degrees; with several, or if `random`, they are drawn, at least the least degree of the layer
            below; otherwise they ascend evenly.
    """

    orders: Tensor
    degrees: Tensor

    def __init__(
        self,
        dims: int,
        outputs: int,
        *,
        features: int,
        hidden: int = 1,
        width: int = 1,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        context: int = 0,
        direct: bool = False,
        orders: int = 1,
        masks: int = 1,
        random: bool = False,
    ) -> None:
        super().__init__()
        self.dims, self.outputs, self.width, self.activation = dims, outputs, width, activation
        lowest = 0 if context else 1  # a unit of degree 0 sees nothing but the context
        place = torch.arange(dims)[None] if orders == 1 else torch.rand(orders, dims).argsort(1)
        if random or masks > 1:
            degrees = [torch.rand(masks, features).mul(dims - lowest).long() + lowest]
            for _ in range(hidden - 1):
                least = degrees[-1].min(1, keepdim=True).values
                degrees.append((torch.rand(masks, features) * (dims - least)).long() + least)
        else:
            degrees = [(lowest + torch.arange(features) * (dims - lowest) // features)[None]] * hidden
        self.register_buffer("orders", place)  # the coordinates, first to last
        self.register_buffer("degrees", torch.stack(degrees, 1))
        inputs = dims * width
        self.layers = Stack(nn.Linear(features if i else inputs, features) for i in range(hidden))
        self.context = nn.Linear(context, features, bias=False) if context else None
        self.last = nn.Linear(features, dims * outputs)
        self.direct = nn.Linear(inputs, dims * outputs, bias=False) if direct else None
        for layer in (self.last, self.direct):
            for parameter in layer.parameters() if layer is not None else ():
                nn.init.zeros_(parameter)

    def forward(
        self, x: Float[Tensor, " B D*width"], context: Tensor | None = None, *, order: int = 0, mask: int = 0
    ) -> Float[Tensor, " B D outputs"]:
        ranks = self.ranks(order, mask)
        h = x
        for i, layer in enumerate(self.layers):
            h = F.linear(h, layer.weight * sees(ranks[i], ranks[i + 1]), layer.bias)
            if i == 0 and self.context is not None:
                h = h + self.context(context)
            h = self.activation(h)
        said = F.linear(h, self.last.weight * sees(ranks[-2], ranks[-1]), self.last.bias)
        if self.direct is not None:
            said = said + F.linear(x, self.direct.weight * sees(ranks[0], ranks[-1]))
        return said.unflatten(1, (self.dims, self.outputs))

    def ranks(self, order: int, mask: int) -> list[Int[Tensor, " units"]]:
        """Of inputs, each hidden layer's units, and outputs: a unit sees those below it whose rank is not above its.

        An input's rank is how many coordinates are known when it is, a unit's its degree, an output's how many are
        known before its coordinate.
        """
        place = self.orders[order].argsort()
        return [
            (place + 1).repeat_interleave(self.width),
            *self.degrees[mask],
            place.repeat_interleave(self.outputs),
        ]

    def unroll(self, n: int, context: Tensor | None = None, *, order: int = 0, mask: int = 0) -> Unrolled:
        """The same network a coordinate at a time, for n examples that are yet to be drawn."""
        return Unrolled(self, n, context, order, mask)


def sees(below: Int[Tensor, " inputs"], above: Int[Tensor, " outputs"]) -> Bool[Tensor, " outputs inputs"]:
    return above[:, None] >= below[None]


class Unrolled:
    """An `AgnosticMADE` that is told its coordinates one at a time, in an order, and computes each unit once.

    `step()` gives what the network says of the next coordinate, `put(value)` tells that coordinate. No gradients.
    Units are sorted by rank, so that those that become known together, and all that they see, lie together.
    """

    @torch.no_grad()
    def __init__(self, net: AgnosticMADE, n: int, context: Tensor | None, order: int, mask: int) -> None:
        self.net, self.at = net, 0
        ranks = net.ranks(order, mask)
        sort = [rank.argsort(stable=True) for rank in ranks]
        layers = [(i, i + 1, layer) for i, layer in enumerate([*net.layers, net.last])]
        self.weights = [
            (layer.weight * sees(ranks[i], ranks[j]))[sort[j]][:, sort[i]].t().contiguous() for i, j, layer in layers
        ]
        self.biases = [layer.bias[sort[j]].expand(n, -1) for _, j, layer in layers]
        if net.context is not None:
            self.biases[0] = self.biases[0] + net.context(context)[:, sort[1]]
        self.direct = None
        if net.direct is not None:
            self.direct = (net.direct.weight * sees(ranks[0], ranks[-1]))[sort[-1]][:, sort[0]].t().contiguous()
        counts = torch.arange(net.dims, device=ranks[0].device)
        self.known = [torch.searchsorted(rank.sort().values, counts, right=True).tolist() for rank in ranks[:-1]]
        self.values = [self.biases[0].new_empty(n, len(rank)) for rank in ranks[:-1]]

    @torch.no_grad()
    def step(self) -> Float[Tensor, " n outputs"]:
        """What the network says of the order's coordinate t, t coordinates being told."""
        t, outputs = self.at, self.net.outputs
        for i, (below, above) in enumerate(zip(self.values, self.values[1:], strict=False)):
            low, high = self.known[i + 1][t - 1] if t else 0, self.known[i + 1][t]
            if high > low:
                seen = self.known[i][t]
                new = torch.addmm(self.biases[i][:, low:high], below[:, :seen], self.weights[i][:seen, low:high])
                above[:, low:high] = self.net.activation(new)
        said, seen = slice(t * outputs, (t + 1) * outputs), self.known[-1][t]
        out = torch.addmm(self.biases[-1][:, said], self.values[-1][:, :seen], self.weights[-1][:seen, said])
        if self.direct is not None:
            out = out.addmm_(self.values[0][:, : t * self.net.width], self.direct[: t * self.net.width, said])
        return out

    def put(self, value: Float[Tensor, " n width"]) -> None:
        width = self.net.width
        self.values[0][:, self.at * width : (self.at + 1) * width] = value
        self.at += 1
