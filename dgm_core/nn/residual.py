"""Residual stacks of the VQ-VAE papers (van den Oord et al. 2017, section 4.1), and the strided ends around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


class ResidualBlock(nn.Module):
    """x + (ReLU, 3 × 3 conv, ReLU, 1 × 1 conv)(x)."""

    def __init__(self, channels: int, residual: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, residual, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(residual, channels, 1),
        )

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B C H W"]:
        return x + self.branch(x)


def residual_stack(channels: int, residual: int, depth: int) -> nn.Sequential:
    """`depth` blocks and a closing ReLU."""
    return nn.Sequential(*(ResidualBlock(channels, residual) for _ in range(depth)), nn.ReLU())


def strided_encoder(inputs: int, channels: int, residual: int, depth: int, halvings: int, narrow: int) -> nn.Sequential:
    """(B, inputs, H, W) -> (B, channels, H / 2^halvings, W / 2^halvings): 4 × 4 convs of stride 2, a 3 × 3 one, blocks.

    The first strided conv, and every further one but a last, has `narrow` channels.
    """
    layers: list[nn.Module] = []
    for i in range(halvings):
        outputs = channels if 0 < i == halvings - 1 else narrow
        layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Conv2d(inputs, channels, 3, padding=1), residual_stack(channels, residual, depth))


def strided_decoder(
    inputs: int, channels: int, residual: int, depth: int, halvings: int, narrow: int, outputs: int
) -> nn.Sequential:
    """(B, inputs, H, W) -> (B, outputs, H · 2^halvings, W · 2^halvings): 3 × 3 conv, blocks, transposed 4 × 4 ones."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, channels, 3, padding=1), residual_stack(channels, residual, depth)]
    width = channels
    for _ in range(halvings - 1):
        layers += [nn.ConvTranspose2d(width, narrow, 4, stride=2, padding=1), nn.ReLU()]
        width = narrow
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, outputs, 4, stride=2, padding=1))
