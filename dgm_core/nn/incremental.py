"""Drawing from autoregressive networks one coordinate at a time, each at the cost of one column.

The order is raster: rows, within a row columns, within a pixel channels. A network computes what depends on the rows
above once a row and what depends on the pixel's own row once a coordinate; its layers remember the rest. A sequence is
a grid of one row; a network whose state is recurrent keeps it in `start`'s memory, and one that can take in a whole
prefix at once (`TakesPrefix`) is not stepped through what is observed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Memory = TypeVar("Memory")


class Incremental(Protocol[Memory]):
    """What the engine needs of a network."""

    def start(self, x: Int[Tensor, " n C H W"], condition: Tensor | None) -> Memory:
        """Allocate the memory. `x` is the canvas that the engine fills in place; `condition` is known in full."""
        ...

    def row(self, memory: Memory, r: int) -> None:
        """Compute what row r needs of the rows above it, all of which are drawn."""
        ...

    def step(self, memory: Memory, r: int, c: int, k: int) -> Float[Tensor, " n params"]:
        """What `draw` is told of channel k of pixel (r, c), all coordinates before it being drawn: logits, say."""
        ...


class TakesPrefix(ABC):
    """Networks of sequences that need no step for columns that are known from the start."""

    @abstractmethod
    def take_prefix(self, memory: Any, columns: int) -> None:
        """Straight after `start`: leave the memory as if the canvas's first columns had been stepped."""


def draw_categorical(
    logits: Float[Tensor, " n levels"],
    uniform: Float[Tensor, " n"],
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Int[Tensor, " n"]:
    """Draws by inverse CDF, one uniform number in [0, 1) each.

    Logits are divided by `temperature`; of the result only the nucleus remains (Holtzman et al. 2020,
    arXiv:1904.09751): the fewest most probable levels whose mass reaches `top_p`, renormalised.
    """
    logits = promote(logits)
    probs = (logits / temperature).softmax(1)
    if top_p < 1:
        ranked, order = probs.sort(dim=1, descending=True, stable=True)
        ranked = ranked * (ranked.cumsum(1) - ranked < top_p)
        probs = torch.zeros_like(probs).scatter(1, order, ranked)
    cdf = probs.cumsum(1)
    target = uniform[:, None].to(cdf.dtype) * cdf[:, -1:]
    # Where rounding carries the target to the total itself, no level lies above it: the most probable one is taken.
    drawn = torch.searchsorted(cdf, target, right=True)[:, 0]
    return torch.where(drawn < probs.shape[1], drawn, probs.argmax(1))


def draw_noise(canvas: Int[Tensor, " n C H W"], dtype: torch.dtype) -> Float[Tensor, " n C H W"]:
    """The uniform numbers that decide every coordinate, the batch leading; at least in single precision."""
    return torch.rand(canvas.shape, device=canvas.device, dtype=torch.promote_types(dtype, torch.float32))


def fill(
    network: Incremental[Memory],
    canvas: Int[Tensor, " n C H W"],
    noise: Float[Tensor, " n C H W"],
    condition: Tensor | None = None,
    observed: Bool[Tensor, " n C H W"] | None = None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    draw: Callable[[Tensor, Tensor, float, float], Tensor] = draw_categorical,
) -> Int[Tensor, " n C H W"]:
    """Draw the canvas in place, in order, keeping what is observed.

    `draw` makes values of what the network says, of a uniform number each, of the temperature and of `top_p`.
    """
    _, channels, height, width = canvas.shape
    memory = network.start(canvas, condition)
    first = 0
    if isinstance(network, TakesPrefix) and observed is not None and height == 1:
        first = int(observed.all(0).all(0)[0].long().cumprod(0).sum())
        if first:
            network.take_prefix(memory, first)
    for r in range(height):
        network.row(memory, r)
        for c in range(first, width):
            for k in range(channels):
                drawn = draw(network.step(memory, r, c, k), noise[:, k, r, c], temperature, top_p)
                if observed is not None:
                    drawn = torch.where(observed[:, k, r, c], canvas[:, k, r, c], drawn)
                canvas[:, k, r, c] = drawn
    return canvas


@torch.no_grad()
def draw_grid(
    network: Incremental[Memory], shape: Sequence[int], condition: Tensor, *, temperature: float, top_p: float
) -> Int[Tensor, " n C H W"]:
    """Grids of that shape (C, H, W), one for each row of the condition, all drawn."""
    if not (temperature > 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature > 0 and 0 < top_p <= 1 are accepted; given: {temperature} and {top_p}")
    canvas = torch.zeros(condition.shape[0], *shape, dtype=torch.int64, device=condition.device)
    noise = draw_noise(canvas, condition.dtype)
    return fill(network, canvas, noise, condition, temperature=temperature, top_p=top_p)
