"""Plain encoders and decoders between data and a vector of features: dense for vectors, convolutional for images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

Activation = Literal["relu", "tanh", "softplus"]
_ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "softplus": nn.Softplus}


def dense(sizes: Sequence[int], activation: Activation = "relu") -> nn.Sequential:
    """(B, sizes[0]) -> (B, sizes[-1]); an activation between layers, none after the last."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(inputs, outputs)] if i == 0 else [_ACTIVATIONS[activation](), nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


def halved(size: int, times: int) -> int:
    """`size` after so many convolutions of stride 2, each of which rounds up."""
    for _ in range(times):
        size = -(-size // 2)
    return size


class ConvEncoder(nn.Module):
    """(B, C, H, W) -> (B, features): 3 × 3 convs of stride 2, then one dense layer. Any size; halves are rounded up."""

    def __init__(
        self, shape: tuple[int, int, int], channels: Sequence[int], features: int, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        inputs, height, width = shape
        layers: list[nn.Module] = []
        for outputs in channels:
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), _ACTIVATIONS[activation]()]
            inputs = outputs
        self.convs = nn.Sequential(*layers)
        depth = len(channels)
        self.head = nn.Linear(inputs * halved(height, depth) * halved(width, depth), features)

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B features"]:
        return self.head(self.convs(x).flatten(1))


class ConvDecoder(nn.Module):
    """(B, features) -> (B, C, H, W): the mirror image of `ConvEncoder`, exact for any size."""

    def __init__(
        self, features: int, shape: tuple[int, int, int], channels: Sequence[int], activation: Activation = "relu"
    ) -> None:
        super().__init__()
        outputs, height, width = shape
        depth = len(channels)
        self.start = (channels[-1] if channels else outputs, halved(height, depth), halved(width, depth))
        self.head = nn.Linear(features, self.start[0] * self.start[1] * self.start[2])
        layers: list[nn.Module] = []
        inputs = self.start[0]
        for i in reversed(range(depth)):
            wider = channels[i - 1] if i else outputs
            # A stride of 2 maps n to 2n − 1; the padding adds the odd pixel that rounding up had taken.
            odd_h, odd_w = (halved(n, i) - (2 * halved(n, i + 1) - 1) for n in (height, width))
            layers += [
                _ACTIVATIONS[activation](),
                nn.ConvTranspose2d(inputs, wider, 3, stride=2, padding=1, output_padding=(odd_h, odd_w)),
            ]
            inputs = wider
        self.convs = nn.Sequential(*layers)

    def forward(self, h: Float[Tensor, " B features"]) -> Float[Tensor, " B C H W"]:
        return self.convs(self.head(h).unflatten(1, self.start))
