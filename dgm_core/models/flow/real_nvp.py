"""Density estimation using Real NVP. L. Dinh, J. Sohl-Dickstein, S. Bengio, 2017. arXiv:1605.08803.

Couplings z = b ⊙ x + (1 − b) ⊙ (x ⊙ exp(s(b ⊙ x)) + t(b ⊙ x)) (eq. 9), where s is a learnt multiple of a tanh (4.1).
Vectors: couplings with alternating masks. Images: at each scale three checkerboard couplings, squeeze, three
channel-wise couplings, half of the channels factored out (eqs. 13–16); four checkerboard couplings at the last scale;
hidden features double when a scale is entered and again when it is squeezed. Networks are residual, with weight and
batch normalisation, and every coupling's output is batch-normalised (3.7; `batch_norm: running` is appendix E).
Integer data: logit(α + (1 − 2α) (x + u) / levels), α = 0.05 (4.1). Minimised:

    −log p(x) + 5·10⁻⁵ Σ g²,   g the scales of the weight normalisation and of the tanh (4.1).

Adam, learning rate 10⁻³, batches of 64, gradient norm at most 100 (the authors' code).

Departures: the paper prints α + (1 − α) x / 256, whose logit is infinite at the top; the authors' code has 1 − 2α, as
here. The last layer of each network starts at zero (the paper gives no initialisation), so that training starts from
the identity. Vectors are not in the paper: 24 couplings of ReLU perceptrons, no batch normalisation, data standardised,
batches of 256, a learning rate of 5·10⁻³ that falls to zero along a cosine, gradient norm at most 1 (above, one rare
batch can undo much), averaged parameters.
Expected: at most 2.91 nats on the 8-Gaussians density, whose entropy is 2.831 (2.86 to 2.89 over seeds, in two minutes
of one core): `make results ROW=real_nvp_8gaussians`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.bijections import (
    BatchNormalization,
    Bijection,
    BoundedAffine,
    Chain,
    ChannelCoupling,
    FactorOut,
    Flatten,
    MaskedCoupling,
    SplitCoupling,
    Squeeze,
    alternating_parts,
    checkerboard_mask,
    half_parts,
)
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.models.flow.base import FlowModel
from dgm_core.nn.flow_nets import CouplingMLP, CouplingResNet
from dgm_core.nn.norm import Moments

if TYPE_CHECKING:
    from jaxtyping import Float


class RealNVP(FlowModel):
    """Affine couplings: alternating masks for vectors, the multi-scale architecture for images."""

    class Config(Strict):
        features: int = Field(
            default=32, ge=1, description="hidden features: of a vector's perceptrons, of an image's first scale"
        )
        blocks: int = Field(
            default=4, ge=1, description="residual blocks, or hidden layers of a perceptron, in a coupling"
        )
        depth: int = Field(default=8, ge=2, description="couplings of a vector")
        mask: Literal["alternating", "half"] = Field(default="alternating", description="of a vector")
        scales: int | None = Field(default=None, ge=1, description="of an image; None: down to 4 × 4")
        batch_norm: Literal["none", "batch", "running"] = "batch"
        lag: float = Field(default=0.9, ge=0, lt=1, description="ρ of appendix E, for batch_norm 'running'")
        alpha: float = Field(default=0.05, gt=0, lt=0.5, description="keeps the logit of integer data finite")
        standardize: bool = Field(
            default=True, description="centre and scale real-valued data by the training split's moments"
        )
        scale_penalty: float = Field(default=5e-5, ge=0, description="coefficient of the squared scales")

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        if data.kind != "image":
            adam = Optimizer(lr=5e-3, schedule="cosine", clip_norm=1.0, ema=0.99)
            config = cls.Config(features=64, blocks=2, depth=24, batch_norm="none")
            return config, Recipe(batch_size=256, steps=6000, optimizers={"model": adam})
        blocks = 4 if min(data.shape[1:]) < 64 else 2
        adam = Optimizer(lr=1e-3, clip_norm=100.0)
        return cls.Config(blocks=blocks), Recipe(batch_size=64, steps=100_000, optimizers={"model": adam})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        image = data.kind == "image"
        adam = Optimizer(lr=2e-2 if image else 5e-3, schedule="cosine", clip_norm=100.0)
        recipe = Recipe(batch_size=64, steps=200 if image else 150, optimizers={"model": adam})
        if image:
            return cls.Config(features=8, blocks=1, scales=min(2, _scales(data.shape))), recipe
        return cls.Config(features=32, blocks=2, depth=4, batch_norm="none"), recipe

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, alpha=config.alpha, standardize=config.standardize)
        if data.kind == "vector":
            self.flow = self._couple_vector(data.dims)
        else:
            most = _scales(data.shape, smallest=1)
            scales = _scales(data.shape) if config.scales is None else config.scales
            if scales > most:
                raise DataMismatch(
                    f"{scales} scales halve the image {scales - 1} times, which {data.shape[1:]} does not allow: at "
                    f"most {most} scales. Set config.scales, or prepare the images at another size."
                )
            self.flow = self._couple_image(data.shape, config.features, scales)

    def penalty(self) -> Float[Tensor, ""] | float:
        scales = [p.square().sum() for name, p in self.named_parameters() if name.endswith(("magnitude", "bound"))]
        return self.config.scale_penalty * torch.stack(scales).sum()

    def _couple_vector(self, dims: int) -> Bijection:
        c = self.config
        split = {"alternating": alternating_parts, "half": half_parts}[c.mask]
        parts: list[Bijection] = []
        for i in range(c.depth):
            passing, moving = split(dims, i % 2)
            seen, said = (len(range(dims)[part]) for part in (passing, moving))
            net = CouplingMLP(seen, BoundedAffine.outputs * said, c.features, c.blocks)
            parts.append(SplitCoupling((passing, moving), net, BoundedAffine()))
            parts += self._normalization(dims)
        return Chain(*parts)

    def _couple_image(self, shape: tuple[int, ...], features: int, scales: int) -> Bijection:
        """One scale and, through `FactorOut`, all that follow: (C, H, W) -> (D,)."""
        channels, height, width = shape
        parts: list[Bijection] = []
        for i in range(3 if scales > 1 else 4):
            mask = checkerboard_mask(height, width, i % 2)
            parts.append(MaskedCoupling(mask, self._net(channels, features, mask), BoundedAffine()))
            parts += self._normalization(channels)
        if scales == 1:
            return Chain(*parts, Flatten((channels, height, width)))
        parts.append(Squeeze())
        for i in range(3):
            parts.append(ChannelCoupling(self._net(2 * channels, 2 * features), BoundedAffine(), swap=i % 2 == 1))
            parts += self._normalization(4 * channels)
        height, width = height // 2, width // 2
        rest = self._couple_image((2 * channels, height, width), 2 * features, scales - 1)
        return Chain(*parts, FactorOut(rest, (4 * channels, height, width)))

    def _net(self, channels: int, features: int, mask: Tensor | None = None) -> nn.Module:
        batch_norm = self.config.batch_norm != "none"
        out = BoundedAffine.outputs * channels
        return CouplingResNet(channels, out, features, self.config.blocks, batch_norm=batch_norm, mask=mask)

    def _normalization(self, channels: int) -> list[Bijection]:
        c = self.config
        if c.batch_norm == "none":
            return []
        lag = c.lag if c.batch_norm == "running" else 0.0
        return [BatchNormalization(Moments(channels, momentum=1 - lag if lag else 0.1), lag=lag)]


def _scales(shape: tuple[int, ...], smallest: int = 4) -> int:
    """One more than the number of times that height and width can be halved without going below `smallest`."""
    height, width = shape[1:]
    scales = 1
    while height % 2 == 0 and width % 2 == 0 and min(height, width) // 2 >= smallest:
        height, width, scales = height // 2, width // 2, scales + 1
    return scales
