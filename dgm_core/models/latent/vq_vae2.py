"""Generating Diverse High-Fidelity Images with VQ-VAE-2. A. Razavi et al., 2019. arXiv:1906.00446.

A hierarchy of codes: the coarsest grid holds what is global, each finer one what the coarser left out (algorithm 1):

    h_top ← E_top(E_bottom(x)),  e_top ← quantise(h_top),  e_bottom ← quantise(E_bottom(x), D_top(e_top)),
    x̂ ← D(e_top, e_bottom),    L = ‖x − x̂‖² + β Σ_levels ‖z − sg[e]‖²  (eq. 2),  codebooks by moving averages,

β = 0.25, decay 0.99; the scale and units of the terms are in `latent/base.py`. Networks (section 3.1, and the
appendix's hyperparameters): the finest encoder shrinks the image by 4, each coarser one by a further 2; 128 channels,
two residual blocks of 64 in each stack, D = 64, K = 512. With n levels, level i sees the codes of all coarser ones: the
state at its size is the coarser state, upsampled, beside its own codes; the image is decoded from the finest state.

Departures: codebooks start on k-means centres, level by level, and codes out of use are revived (`latent/base.py`);
    where the image does not divide by 8, or is smaller than 32, `downsample` is 2; `conditional` tells the decoder the
    class, where the paper's is unconditional. Priors are separate models: see `TwoStage`.
Expected: on MNIST padded to 32 × 32, both codebooks ≥ 90 % in use on test images, with a perplexity of at least K / 3:
    `make results ROW=vq_vae2_mnist`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import DataSpec
from dgm_core.models.latent.base import QuantisedAutoencoder, ResidualConfig, halvings
from dgm_core.nn.residual import strided_decoder, strided_encoder

if TYPE_CHECKING:
    from jaxtyping import Float


class VQVAE2(QuantisedAutoencoder):
    """Grids of codes, each twice as fine as the one above."""

    class Config(ResidualConfig):
        levels: int = Field(default=2, ge=1, description="grids of codes")

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        height, width = data.shape[-2:] if data.kind == "image" else (0, 0)
        paper = height % 8 == 0 and width % 8 == 0 and min(height, width) >= 32
        config = cls.Config(downsample=4 if paper else 2)
        adam = Optimizer(algorithm="adam", lr=3e-4)
        return config, Recipe(batch_size=128, steps=250_000, optimizers={"model": adam})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        sides = data.shape[-2:] if data.kind == "image" else (0, 0)
        config = cls.Config(
            levels=2 if all(side % 4 == 0 for side in sides) else 1,
            codes=16,
            code_features=8,
            hidden=32,
            residual=16,
            depth=1,
            downsample=2,
        )
        adam = Optimizer(algorithm="adam", lr=3e-3)
        return config, Recipe(batch_size=32, steps=300, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        n, D, image = config.levels, config.code_features, data.shape[0]
        super().__init__(config, data, levels=n, label_features=n * D)
        hidden, residual, depth = config.hidden, config.residual, config.depth
        times, narrow = halvings(config.downsample), max(1, hidden // 2)
        self.encoders = nn.ModuleList(  # finest first: each feeds the next
            strided_encoder(hidden if i else image, hidden, residual, depth, 1 if i else times, narrow)
            for i in range(n)
        )
        self.conditioners = nn.ModuleList(  # of level i + 1: the state of level i, decoded to its size
            strided_decoder((i + 1) * D, hidden, residual, depth, 1, narrow, outputs=D) for i in range(n - 1)
        )
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose2d((i + 1) * D, (i + 1) * D, 4, stride=2, padding=1) for i in range(n - 1)
        )
        self.to_codes = nn.ModuleList(nn.Conv2d(hidden + (D if i else 0), D, 1) for i in range(n))
        self.decoder = strided_decoder(n * D, hidden, residual, depth, times, narrow, outputs=image)

    def features(self, x: Float[Tensor, " B C H W"]) -> Sequence[Float[Tensor, " B hidden h w"]]:
        h = []
        for encoder in self.encoders:
            x = encoder(x)
            h.append(x)
        return h[::-1]

    def project(
        self, level: int, features: Float[Tensor, " B hidden h w"], state: Tensor | None
    ) -> Float[Tensor, " B D h w"]:
        if state is not None:
            features = torch.cat([self.conditioners[level - 1](state), features], 1)
        return self.to_codes[level](features)

    def merge(self, level: int, state: Tensor | None, e: Float[Tensor, " B D h w"]) -> Float[Tensor, " B S h w"]:
        return e if state is None else torch.cat([self.upsamplers[level - 1](state), e], 1)

    def render(self, state: Float[Tensor, " B S h w"]) -> Float[Tensor, " B C H W"]:
        return self.decoder(state)
