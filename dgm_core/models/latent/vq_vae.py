"""Neural Discrete Representation Learning. A. van den Oord, O. Vinyals, K. Kavukcuoglu, 2017. arXiv:1711.00937.

The encoder's vectors are replaced by the nearest code (eqs. 1, 2); gradients pass straight through. The loss (eq. 3):

    L = log p(x | z_q(x)) + ‖sg[z_e(x)] − e‖² + β ‖z_e(x) − sg[e]‖²,   β = 0.25,

the first term a Gaussian's, that is the MSE; its scale and units are in `latent/base.py`. Networks (section 4.1): two
4 × 4 convolutions of stride 2 and two residual blocks (ReLU, 3 × 3, ReLU, 1 × 1), all of 256 channels; the decoder
mirrors them. `codebook: ema` is appendix A.1.

Departures: a 3 × 3 convolution joins the strided layers to the residual blocks, as in the authors' code. The codebook
    starts on k-means centres, and codes out of use are put on the encoder's outputs: without these, few codes stay in
    use. `start: uniform` and `revive_below: 0` give the paper's. Alone, the model samples codes from their recent use;
    with a prior it is a `TwoStage`.
Expected: 128 × 128 × 3 images become 32 × 32 codes of 512: a reduction of 42.7 (the paper's "approximately 42.6"),
    `python -m pytest tests/families/latent/test_vq.py -k reduction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import DataSpec
from dgm_core.models.latent.base import QuantisedAutoencoder, ResidualConfig, halvings
from dgm_core.nn.residual import strided_decoder, strided_encoder

if TYPE_CHECKING:
    from jaxtyping import Float


class VQVAE(QuantisedAutoencoder):
    """One grid of codes."""

    class Config(ResidualConfig):
        pass

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(codebook="loss", hidden=256, residual=256)
        adam = Optimizer(algorithm="adam", lr=2e-4)
        return config, Recipe(batch_size=128, steps=250_000, optimizers={"model": adam})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(codes=16, code_features=8, codebook="loss", hidden=32, residual=16, depth=1, downsample=2)
        adam = Optimizer(algorithm="adam", lr=3e-3)
        return config, Recipe(batch_size=32, steps=300, optimizers={"model": adam})

    def __init__(self, config: Config, data: DataSpec) -> None:
        D = config.code_features
        super().__init__(config, data, levels=1, label_features=D)
        image, times, c = data.shape[0], halvings(config.downsample), config
        self.encoder = strided_encoder(image, c.hidden, c.residual, c.depth, times, narrow=c.hidden)
        self.to_code = nn.Conv2d(c.hidden, D, 1)
        self.decoder = strided_decoder(D, c.hidden, c.residual, c.depth, times, narrow=c.hidden, outputs=image)

    def features(self, x: Float[Tensor, " B C H W"]) -> Sequence[Float[Tensor, " B hidden h w"]]:
        return [self.encoder(x)]

    def project(
        self, level: int, features: Float[Tensor, " B hidden h w"], state: Tensor | None
    ) -> Float[Tensor, " B D h w"]:
        return self.to_code(features)

    def merge(self, level: int, state: Tensor | None, e: Float[Tensor, " B D h w"]) -> Float[Tensor, " B D h w"]:
        return e

    def render(self, state: Float[Tensor, " B D h w"]) -> Float[Tensor, " B C H W"]:
        return self.decoder(state)
