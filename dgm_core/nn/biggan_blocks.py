"""Class-conditional residual networks: the parts that SAGAN and BigGAN are made of.

H. Zhang et al., 2018. arXiv:1805.08318; A. Brock, J. Donahue, K. Simonyan, 2018. arXiv:1809.11096. The authors' sides
are 4 × 2ⁿ. Here an image of any size is: a side is halved, and rounded up, until the shorter one is at most 4
(`dgm_core/nn/dcgan.py`); the generator goes the same way back and cuts what is too much. No block is normalised by its
spectrum: a network does that to all of its layers, once they have their start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.nn.dcgan import grids
from dgm_core.nn.norm import BatchNorm
from dgm_core.nn.spectral_norm import spectrally_normalise

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

Size = tuple[int, int]
Conditional = Callable[[int], "ConditionalBatchNorm"]  # channels -> a norm of (x, condition)


class ConditionalBatchNorm(nn.Module):
    """(1 + gain(c)) x̂ + shift(c): batch normalisation over all ranks, then what the condition says, channel by channel.

    H. de Vries et al., 2017. arXiv:1707.00683.
    """

    def __init__(self, channels: int, gain: nn.Module, shift: nn.Module) -> None:
        super().__init__()
        self.norm = BatchNorm(channels, scale=False, shift=False)
        self.gain, self.shift = gain, shift

    def forward(self, x: Float[Tensor, " B C H W"], c: Shaped[Tensor, " B *c"]) -> Float[Tensor, " B C H W"]:
        gain, shift = (part(c)[:, :, None, None] for part in (self.gain, self.shift))
        return torch.addcmul(shift, self.norm(x), 1 + gain)


def by_label(classes: int) -> Conditional:
    """A gain and a shift for each class, which start at 1 and 0: c is (B,) labels."""

    def norm(channels: int) -> ConditionalBatchNorm:
        tables = [nn.Embedding(classes, channels) for _ in range(2)]
        for table in tables:
            nn.init.zeros_(table.weight)
        return ConditionalBatchNorm(channels, *tables)

    return norm


def by_vector(size: int) -> Conditional:
    """Gain and shift linear in a vector: c is (B, size)."""

    def norm(channels: int) -> ConditionalBatchNorm:
        return ConditionalBatchNorm(channels, *(nn.Linear(size, channels, bias=False) for _ in range(2)))

    return norm


class SelfAttention(nn.Module):
    """y = γ o + x with γ from 0 (SAGAN, eqs. 1 to 3).

    o_j = v(Σᵢ β_ji h(xᵢ)), β_ji the softmax over i of f(xᵢ)ᵀ g(x_j); f, g, h, v are 1 × 1 convolutions, the first three
    onto an eighth of the channels. `pooled`: f and h see the grid halved by the greatest of 2 × 2, and h has half the
    channels, as in both papers' code; a map of a quarter of the size.
    """

    def __init__(self, channels: int, *, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        few, values = max(1, channels // 8), max(1, channels // (2 if pooled else 8))
        self.f, self.g = (nn.Conv2d(channels, few, 1, bias=False) for _ in range(2))
        self.h, self.v = nn.Conv2d(channels, values, 1, bias=False), nn.Conv2d(values, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B C H W"]:
        f, g, h = self.f(x), self.g(x), self.h(x)
        if self.pooled:
            f, h = F.max_pool2d(f, 2, ceil_mode=True), F.max_pool2d(h, 2, ceil_mode=True)
        query, key, value = (t.flatten(2).transpose(1, 2) for t in (g, f, h))
        o = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.gamma * self.v(o.transpose(1, 2).unflatten(2, x.shape[2:]))


WIDTHS = {
    4: (16, 16, 8, 4, 2),
    5: (16, 16, 8, 4, 2, 1),
    6: (16, 16, 8, 8, 4, 2, 1),
    7: (16, 16, 8, 8, 4, 2, 1, 1),
}


def generator_widths(doublings: int) -> tuple[int, ...]:
    """Multiples of the finest grid's channels, from the coarsest grid on: tables 4 to 6 of BigGAN and its code."""
    if doublings > max(WIDTHS):
        raise DataMismatch("this model makes images whose shorter side is at most 512 pixels. Prepare them smaller.")
    return WIDTHS.get(doublings, (4,) * (doublings + 1))


def discriminator_widths(doublings: int) -> tuple[int, ...]:
    """Likewise, from the image on."""
    return (1, 2, 4, 8, 16) if doublings == 4 else generator_widths(doublings)[::-1]


def halvings(doublings: int) -> int:
    """How often a discriminator halves: to the generator's coarsest grid, but on small images twice at most."""
    return doublings if doublings in WIDTHS else min(doublings, 2)


def attended(sizes: Sequence[Size], side: int) -> int | None:
    """Which grid, counted from the image, has attention: the finest with sides of at most `side` but the image itself,
    or else the coarsest; none where `side` is 0."""
    fine = [k for k, size in enumerate(sizes) if k and max(size) <= side]
    return None if not side else fine[0] if fine else len(sizes) - 1


def descent(shape: Sequence[int], features: int, side: int) -> tuple[list[int], int, int]:
    """Of BigGAN's discriminators: channels from the image on, how many of the stages behind the first channels halve,
    and which of them has attention behind it; −1: none."""
    sizes = grids(*shape[1:])
    doublings = len(sizes) - 1
    downs, at = halvings(doublings), attended(sizes, side)
    return [features * width for width in discriminator_widths(doublings)], downs, min(at or 0, downs) - 1


def double(x: Float[Tensor, " B C h w"], size: Size) -> Float[Tensor, " B C H W"]:
    """Nearest neighbour, cut to where a side was rounded up."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, : size[0], : size[1]]


def halve(x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B C h w"]:
    """Means of 2 × 2; of what there is, at the end of an odd side."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


class GeneratorBlock(nn.Module):
    """norm, ReLU, doubled, 3 × 3, norm, ReLU, 3 × 3, plus a doubled 1 × 1 shortcut (BigGAN, figure 15 (b))."""

    def __init__(self, channels: int, out: int, norm: Conditional, size: Size) -> None:
        super().__init__()
        self.size = size
        self.norm1, self.norm2 = norm(channels), norm(out)
        self.conv1, self.conv2 = _conv(channels, out, 3), _conv(out, out, 3)
        self.shortcut = _conv(channels, out, 1)

    def forward(self, x: Float[Tensor, " B C h w"], c: Shaped[Tensor, " B *c"]) -> Float[Tensor, " B O H W"]:
        h = self.conv1(double(F.relu(self.norm1(x, c)), self.size))
        h = self.conv2(F.relu(self.norm2(h, c)))
        # A 1 × 1 convolution and doubling commute; this order is four times cheaper. So does halving, below.
        return h + double(self.shortcut(x), self.size)


class DiscriminatorBlock(nn.Module):
    """ReLU, 3 × 3, ReLU, 3 × 3, halved, plus a halved 1 × 1 shortcut (figure 15 (c)); the `first` block has pixels in
    front and so no ReLU."""

    def __init__(self, channels: int, out: int, *, down: bool, first: bool = False) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.conv1, self.conv2 = _conv(channels, out, 3), _conv(out, out, 3)
        same = channels == out and not down
        self.shortcut: nn.Module = nn.Identity() if same else _conv(channels, out, 1)

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B O h w"]:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        return halve(h) + self.shortcut(halve(x)) if self.down else h + self.shortcut(x)


class DeepGeneratorBlock(nn.Module):
    """A bottleneck (figure 16 (b)): 1 × 1 to a quarter of the channels, two 3 × 3, 1 × 1, all behind a norm and a ReLU.

    Doubled in front of the first 3 × 3 where `size` is given. The shortcut drops channels and doubles: nothing learnt.
    """

    def __init__(self, channels: int, out: int, norm: Conditional, size: Size | None = None) -> None:
        super().__init__()
        self.out, self.size = out, size
        few = max(1, channels // 4)
        widths = (channels, few, few, few)
        self.norms = nn.ModuleList(norm(width) for width in widths)
        self.convs = nn.ModuleList([
            _conv(channels, few, 1), _conv(few, few, 3), _conv(few, few, 3), _conv(few, out, 1)
        ])  # fmt: skip

    def forward(self, x: Float[Tensor, " B C h w"], c: Shaped[Tensor, " B c"]) -> Float[Tensor, " B O H W"]:
        h = x
        for k, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            h = F.relu(norm(h, c))
            h = conv(double(h, self.size) if k == 1 and self.size is not None else h)
        x = x[:, : self.out]
        return h + (x if self.size is None else double(x, self.size))


class DeepDiscriminatorBlock(nn.Module):
    """A bottleneck (figure 16 (c)): ReLU and 1 × 1 to a quarter of the outputs, two 3 × 3, halved, 1 × 1. The shortcut
    halves; a 1 × 1 convolution adds the channels that are missing."""

    def __init__(self, channels: int, out: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        few = max(1, out // 4)
        self.convs = nn.ModuleList([_conv(channels, few, 1), _conv(few, few, 3), _conv(few, few, 3)])
        self.last = _conv(few, out, 1)
        self.more = _conv(channels, out - channels, 1) if out > channels else None

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B O h w"]:
        h = x
        for conv in self.convs:
            h = conv(F.relu(h))
        h = F.relu(h)
        if self.down:
            h, x = halve(h), halve(x)
        return self.last(h) + (x if self.more is None else torch.cat([x, self.more(x)], 1))


class ImageGenerator(nn.Module):
    """A linear layer onto the coarsest grid, blocks that double it, attention in front of one of them, the image.

    A concrete one sets `grid`, `enter` and its blocks, and then calls `finish`.
    """

    grid: tuple[int, int, int]
    enter: nn.Linear

    def finish(
        self, outs: Sequence[int], at: int | None, data: DataSpec, start: Callable[[nn.Module], None], *, pooled: bool
    ) -> None:
        """What stands behind the first layer, the start of all, spectral normalisation; `outs` are the channels of the
        grids from the coarsest on, `at` is the one with attention, counted from the image."""
        self.attended = None if at is None else len(outs) - 1 - at  # the block that sees that grid
        self.attention = None if self.attended is None else SelfAttention(outs[self.attended], pooled=pooled)
        self.norm, self.out = BatchNorm(outs[-1]), nn.Conv2d(outs[-1], data.shape[0], 3, padding=1)
        self.bounded = data.levels is not None
        start(self)
        spectrally_normalise(self, (nn.Conv2d, nn.Linear))

    def paint(
        self, first: Float[Tensor, " B first"], blocks: Iterable[nn.Module], told: Iterable[Shaped[Tensor, " B *c"]]
    ) -> Float[Tensor, " B C H W"]:
        """The image, of what the first layer and each block are told."""
        h = self.enter(first).unflatten(1, self.grid)
        for k, (block, c) in enumerate(zip(blocks, told, strict=True)):
            if self.attention is not None and k == self.attended:
                h = self.attention(h)
            h = block(h, c)
        x = self.out(F.relu(self.norm(h)))
        return x.tanh() if self.bounded else x


class ProjectionDiscriminator(nn.Module):
    """w·φ(x) + b + e_y·φ(x): (B, C, H, W), (B,) labels -> (B,) scores; φ the body behind a ReLU, summed over the grid.

    T. Miyato, M. Koyama, 2018. arXiv:1802.05637. All weights get this start, and are normalised.
    """

    def __init__(
        self, body: Sequence[nn.Module], features: int, classes: int, start: Callable[[nn.Module], None]
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.score, self.classes = nn.Linear(features, 1), nn.Embedding(classes, features)
        start(self)
        spectrally_normalise(self)

    def forward(self, x: Float[Tensor, " B C H W"], y: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        phi = F.relu(self.body(x)).sum((2, 3))
        return self.score(phi).flatten() + (self.classes(y) * phi).sum(1)


def start_orthogonal(module: nn.Module) -> None:
    """Weights of convolutions, linear layers and embeddings orthogonal, biases at zero (BigGAN, section 3)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear | nn.Embedding):
            nn.init.orthogonal_(part.weight)
        if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def start_glorot(module: nn.Module) -> None:
    """Weights of convolutions and linear layers uniform with Glorot's variance, biases at zero (SAGAN's code)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _conv(channels: int, out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2)
