"""Glow: Generative Flow with Invertible 1×1 Convolutions. D. P. Kingma, P. Dhariwal, 2018. arXiv:1807.03039.

Squeeze, K steps of flow, split off half of the channels, at each of L levels (figure 2). A step is activation
normalisation (3.1), an invertible 1 × 1 convolution (3.2, eqs. 9–11) and a coupling in which the first half of the
channels moves the second (3.3, table 1); what is split off has a Gaussian prior given what goes on, and so has the top
its own. Integer data: (x + u) / levels − ½. Minimised: −log p(x).

A coupling's network is three convolutions, 3 × 3, 1 × 1, 3 × 3; the hidden ones are activation-normalised, the last
one starts at zero and is multiplied by exp(3 l), l learnt for each channel. Affine couplings scale by σ(ŝ + 2). With
`conditional` the top prior's mean and scale depend on the label (all of this as in the authors' code).
`dequantization: variational` learns u's density by a flow given x (J. Ho et al., 2019. arXiv:1902.00275).

Adam, learning rate 10⁻³, batches of 512 (appendix), warm-up over ten times 50,000 images (the authors' code).

Departures: no border channel in the convolutions; the top prior has a mean and a scale for each coordinate, not each
channel; no classifier beside a conditional model; a learnt u starts from uniform noise, not Gaussian.
Expected: at most 1.30 bits/dim on MNIST in half an hour with less than a million parameters, not run yet:
`make results ROW=glow_mnist`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.bijections import (
    ActNorm,
    ActNormConv2d,
    Additive,
    Bijection,
    BoundedAffine,
    Chain,
    ChannelCoupling,
    Context,
    DeepChain,
    Flatten,
    Invert,
    LUConvolution,
    Memory,
    NormalizedConvolution,
    Permutation,
    PlainConvolution,
    Rescale,
    Reverse,
    ScaledLogit,
    SigmoidAffine,
    SplitPrior,
    Squeeze,
    VariationalDequantizer,
    starting,
)
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.models.flow.base import FlowModel
from dgm_core.nn.norm import batch_moments
from dgm_core.precision import full_precision, promote
from dgm_core.shapes import sum_event

if TYPE_CHECKING:
    from jaxtyping import Float

DEQUANTIZER_DEPTH = 4  # couplings
FIRST = 256  # images, at least, set the activation normalisation (the authors' code)


class _ZeroConv2d(nn.Module):
    """A 3 × 3 convolution that starts at zero, times exp(3 l)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out))
        self.log_scale = nn.Parameter(torch.zeros(out))

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B O H W"]:
        scale = (3 * self.log_scale).exp()
        return F.conv2d(x, self.weight * scale.reshape(-1, 1, 1, 1), self.bias * scale, padding=1)


class _CouplingNet(nn.Module):
    """(B, C, H, W) -> (B, out, H, W). A label has its say in the top prior, not here."""

    def __init__(self, channels: int, out: int, features: int) -> None:
        super().__init__()
        self.enter = ActNormConv2d(channels, features, 3)
        self.hidden = ActNormConv2d(features, features, 1)
        self.out = _ZeroConv2d(features, out)

    def forward(self, x: Float[Tensor, " B C H W"], context: Context = None) -> Float[Tensor, " B O H W"]:
        return self.out(F.relu_(self.hidden(F.relu_(self.enter(x)))))


class _Beside(nn.Module):
    """A network of x and, in further channels, of the image that is its context."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Float[Tensor, " B C H W"], context: Float[Tensor, " B E H W"]) -> Float[Tensor, " B O H W"]:
        return self.net(torch.cat([x, context], 1))


class _Squeezed(nn.Module):
    """(B, C, H, W) -> (B, 4C, H/2, W/2), with no log-determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = Squeeze()

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B 4C H/2 W/2"]:
        return self.squeeze(x)[0]


class _TopPrior(Bijection):
    """z = (x − μ(y)) exp(−log σ(y)): one mean and scale a coordinate, to which a label adds some a channel."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.constant = nn.Parameter(torch.zeros(2 * channels, height, width))
        self.log_scale = nn.Parameter(torch.zeros(2 * channels, 1, 1))
        self.of_label = nn.Parameter(torch.zeros(classes, 2 * channels)) if classes else None

    def forward(
        self, x: Float[Tensor, " B C H W"], context: Context = None
    ) -> tuple[Float[Tensor, " B C H W"], Float[Tensor, " B"]]:
        mean, log_scale = self._moments(x, context)
        return (promote(x) - mean) * (-log_scale).exp(), -sum_event(log_scale)

    def inverse(
        self, z: Float[Tensor, " B C H W"], context: Context = None
    ) -> tuple[Float[Tensor, " B C H W"], Float[Tensor, " B"]]:
        mean, log_scale = self._moments(z, context)
        return promote(z) * log_scale.exp() + mean, sum_event(log_scale)

    def _moments(self, like: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        h = self.constant
        if self.of_label is not None:
            assert context is not None
            with full_precision(like.device):
                h = h + (context @ self.of_label)[:, :, None, None]
        h = h * (3 * self.log_scale).exp()
        mean, log_scale = h.expand(like.shape[0], -1, -1, -1).chunk(2, 1)
        return mean, log_scale


class Glow(FlowModel):
    """Levels of steps of flow on images."""

    class Config(Strict):
        levels: int = Field(default=3, ge=1, description="L: how often the image is halved")
        depth: int = Field(default=32, ge=1, description="K: steps of flow in a level")
        features: int = Field(default=512, ge=1, description="of a coupling's hidden convolutions")
        coupling: Literal["additive", "affine"] = "affine"
        permutation: Literal["lu", "plain", "shuffle", "reverse"] = Field(
            default="lu", description="1 × 1 convolution by its LU factors or its entries; or channels in a fixed order"
        )
        conditional: bool = Field(default=False, description="model p(x | y)")
        alpha: float | None = Field(
            default=None,
            gt=0,
            lt=0.5,
            description="integers through Real NVP's logit of α + (1 − 2α) x; None: linearly",
        )
        dequantization: Literal["uniform", "variational"] = "uniform"
        memory: Memory = Field(default="store", description="what a level keeps of its steps for the backward pass")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=1e-3, warmup=977)
        config = cls.Config(levels=min(3, max(1, _halvings(data.shape))), memory="checkpoint")
        return config, Recipe(batch_size=512, steps=100_000, optimizers={"model": adam})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=5e-3, warmup=20, schedule="cosine", clip_norm=100.0)
        config = cls.Config(levels=min(2, max(1, _halvings(data.shape))), depth=4, features=16)
        return config, Recipe(batch_size=64, steps=200, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, conditional=config.conditional)
        if data.kind != "image":
            raise DataMismatch(
                f"Glow halves images and models nothing else; this data is of kind {data.kind!r}. Use real_nvp or maf "
                "for vectors."
            )
        most = _halvings(data.shape)
        if config.levels > most:
            raise DataMismatch(
                f"{config.levels} levels halve the image {config.levels} times, which {data.shape[1:]} does not allow: "
                f"at most {most}. Set config.levels, or prepare the images at another size (transform pad)."
            )
        if data.levels is None and (config.dequantization == "variational" or config.alpha is not None):
            raise DataMismatch("alpha and dequantization: variational are for integers, and this data is real-valued")
        if data.levels is not None:
            self.to_real = (
                Rescale(-0.5, 1 / data.levels) if config.alpha is None else ScaledLogit(data.levels, config.alpha)
            )
        if config.dequantization == "variational":
            self.dequantizer = self._variational(data)
        self.flow = self._level(data.shape, config.levels)

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        first = list(islice(batches, 1))
        together = sum(distributed.row_counts(first[0].x.shape[0] if first else 0, self.device))
        first += islice(batches, -(-FIRST // max(1, together)) - 1)  # as many batches on every rank
        super().enter(turn, chain(first, batches))
        if not first:  # a rank without a share of a small data set still takes part in the moments of all ranks
            nothing = torch.empty(0, *self.data.shape, dtype=self.data.dtype, device=self.device)
            first = [Batch(nothing, torch.empty(0, dtype=torch.int64, device=self.device))]
        with starting(self, batch_moments):
            x = torch.cat([self._dequantize(batch.x)[0] for batch in first])
            labels = [self.context_of(batch.y) for batch in first]
            self._normalize(x, torch.cat([y for y in labels if y is not None]) if self.conditional else None)

    def _level(self, shape: tuple[int, ...], levels: int) -> Bijection:
        """One level and, through `SplitPrior`, all that follow: (C, H, W) -> (D,)."""
        channels, height, width = 4 * shape[0], shape[1] // 2, shape[2] // 2
        steps = DeepChain(*(self._step(channels) for _ in range(self.config.depth)), memory=self.config.memory)
        inner = (channels, height, width)
        if levels == 1:
            classes = self.data.classes if self.conditional else 0
            return Chain(Squeeze(), steps, _TopPrior(inner, classes), Flatten(inner))
        rest = self._level((channels // 2, height, width), levels - 1)
        return Chain(Squeeze(), steps, SplitPrior(rest, _ZeroConv2d(channels // 2, channels), inner))

    def _step(self, channels: int) -> Bijection:
        c, norm = self.config, ActNorm(channels)
        mix: Bijection
        if c.permutation in ("shuffle", "reverse"):
            mix = Chain(norm, Reverse() if c.permutation == "reverse" else Permutation(torch.randperm(channels)))
        else:
            mix = NormalizedConvolution(norm, {"lu": LUConvolution, "plain": PlainConvolution}[c.permutation](channels))
        transformer = {"additive": Additive, "affine": SigmoidAffine}[c.coupling]()
        net = _CouplingNet(channels // 2, transformer.outputs * channels // 2, c.features)
        return Chain(mix, ChannelCoupling(net, transformer, swap=False))

    def _variational(self, data: DataSpec) -> VariationalDequantizer:
        """Couplings of the noise, squeezed, whose networks see the squeezed image."""
        assert data.levels is not None
        half = 2 * data.shape[0]
        parts: list[Bijection] = [Squeeze()]
        for i in range(DEQUANTIZER_DEPTH):
            net = _Beside(_CouplingNet(3 * half, BoundedAffine.outputs * half, self.config.features))
            parts.append(ChannelCoupling(net, BoundedAffine(), swap=i % 2 == 1))
        return VariationalDequantizer(Chain(*parts, Invert(Squeeze())), _Squeezed(), data.levels)


def _halvings(shape: tuple[int, ...]) -> int:
    """How often height and width can be halved."""
    if len(shape) != 3:
        return 0
    common = math.gcd(*shape[1:])
    return (common & -common).bit_length() - 1
