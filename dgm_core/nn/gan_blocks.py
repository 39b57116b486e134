"""Blocks of generators and critics: perceptrons, and pre-activation residual blocks that halve or double resolution.

Residual blocks: I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin, A. Courville, 2017. arXiv:1704.00028, appendices C
and F. Weights start uniform with the variance of Glorot, doubled in front of a ReLU as in the authors' code; biases at
zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Norm = Callable[[int], nn.Module]


def no_norm(channels: int) -> nn.Module:
    """For a network without normalisation."""
    return nn.Identity()


def conv(channels: int, out: int, kernel: int, *, gain: float = 2**0.5) -> nn.Conv2d:
    """A convolution that keeps the size; gain √2 inside a residual branch, 1 on shortcuts and at the output."""
    layer = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return layer


def linear(features: int, out: int) -> nn.Linear:
    """A linear layer with Glorot's start."""
    layer = nn.Linear(features, out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(features: int, hidden: int, depth: int, out: int) -> nn.Sequential:
    """`depth` hidden ReLU layers: (B, features) -> (B, out). Torch's own start: hinges lie off the origin."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(features, hidden), nn.ReLU()]
        features = hidden
    return nn.Sequential(*layers, nn.Linear(features, out))


class Maxout(nn.Module):
    """maxₖ (Wₖ x + bₖ) of every unit. I. Goodfellow et al., 2013. arXiv:1302.4389."""

    def __init__(self, features: int, units: int, pieces: int) -> None:
        super().__init__()
        self.shape = (units, pieces)
        self.linear = nn.Linear(features, units * pieces)

    def forward(self, x: Float[Tensor, " B features"]) -> Float[Tensor, " B units"]:
        return self.linear(x).unflatten(1, self.shape).max(-1).values


def hidden(features: int, units: int, pieces: int) -> nn.Module:
    """A hidden layer: maxout, or a ReLU layer where there is but one piece."""
    return Maxout(features, units, pieces) if pieces > 1 else nn.Sequential(nn.Linear(features, units), nn.ReLU())


def maxout_layers(
    features: int, units: int, depth: int, pieces: int, *, input_dropout: float = 0.0, dropout: float = 0.0
) -> nn.Sequential:
    """`depth` hidden layers with dropout in front of each and behind the last: (B, features) -> (B, units)."""
    layers: list[nn.Module] = [nn.Dropout(input_dropout)]
    for _ in range(depth):
        layers += [hidden(features, units, pieces), nn.Dropout(dropout)]
        features = units
    return nn.Sequential(*layers)


def start_uniform(module: nn.Module, reach: float) -> None:
    """Weights of every linear layer uniform in [−reach, reach], biases at zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.uniform_(part.weight, -reach, reach)
            nn.init.zeros_(part.bias)


def one_hot(y: Int[Tensor, " B"], classes: int, dtype: torch.dtype) -> Float[Tensor, " B classes"]:
    return (y[:, None] == torch.arange(classes, device=y.device)).to(dtype)


class ResidualBlock(nn.Module):
    """norm, ReLU, 3 × 3, norm, ReLU, 3 × 3, plus a 1 × 1 shortcut where shapes differ (figure in appendix F).

    Up: the first convolution sees the input doubled (nearest neighbour). Down: the second one's output is averaged
    over 2 × 2.
    """

    def __init__(
        self, channels: int, out: int, *, resample: Literal["up", "down"] | None = None, norm: Norm = no_norm
    ) -> None:
        super().__init__()
        self.resample = resample
        middle = channels if resample == "down" else out
        self.norm1, self.norm2 = norm(channels), norm(middle)
        self.conv1, self.conv2 = conv(channels, middle, 3), conv(middle, out, 3)
        same = channels == out and resample is None
        self.shortcut: nn.Module = nn.Identity() if same else conv(channels, out, 1, gain=1.0)

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B O h w"]:
        h = F.relu(self.norm1(x))
        h = self.conv1(_double(h) if self.resample == "up" else h)
        h = self.conv2(F.relu(self.norm2(h)))
        if self.resample == "down":
            return F.avg_pool2d(h + self.shortcut(x), 2)
        # A 1 × 1 convolution and doubling commute; this order is four times cheaper.
        shortcut = self.shortcut(x)
        return h + (_double(shortcut) if self.resample == "up" else shortcut)


class InputBlock(nn.Module):
    """A critic's first block, on pixels: 3 × 3, ReLU, 3 × 3, halved; no activation or norm in front of the data."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(channels, out, 3), conv(out, out, 3)
        self.shortcut = conv(channels, out, 1, gain=1.0)

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B O H/2 W/2"]:
        h = self.conv2(F.relu(self.conv1(x)))
        return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))


def _double(x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B C 2H 2W"]:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
