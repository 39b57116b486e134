"""Neural Discrete Representation Learning (audio). A. van den Oord, O. Vinyals, K. Kavukcuoglu, 2017. arXiv:1711.00937.

The model of section 4.3: codes of raw audio for which any voice can be put. Six strided convolutions (stride 2, window
4) make one code of 64 samples; p(x | z, y) is a WaveNet (arXiv:1609.03499) that hears the codes, stretched to the
samples' rate, as a local condition and the speaker or class y as a global one, Π_t p(x_t | x_<t, z_q(x), y). The loss
is eq. 3:

    L = −log p(x | z_q(x), y) + ‖sg[z_e(x)] − e‖² + β ‖z_e(x) − sg[e]‖²,   β = 0.25,

each term a mean over samples or features; with D = 64 features a code of 64 samples that is the paper's sum over 64.
`log_prob` is the bound log p(x | z_q(x), y) − (codes) log K, the paper's prior in training being uniform (section 3.2).
Swapping the condition, `decode_codes(codes(x), y)`, says what x said in the voice y. A WaveNet has no mean, so decoding
draws; each sample costs one column of the network.

Departures: where the paper is silent, the encoder's width and the optimiser's rate are those of its image model (256,
    Adam at 2e-4), the decoder's sizes WaveNet's three stacks of ten layers and 256 µ-law levels, stretched by a
    transposed convolution, batches of 32. The codebook starts on k-means centres, and codes out of use are revived, as
    in `vq_vae`. Alone, the model samples codes from their recent use; with a prior it is a `TwoStage`.
Expected: 64 × fewer codes than samples, 56.9 × fewer bits at 256 levels and K = 512:
    `python -m pytest tests/families/latent/test_vq_vae_wavenet.py -k reduction`. Spoken digits whose reconstructions
    are recognised at 60 % or better: `make results ROW=vq_vae_wavenet_digits`, not measured yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.capabilities import HasLikelihood
from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.distributions.observation import to_network, to_stored
from dgm_core.models.latent.base import CodebookConfig, QuantisedModel, halvings
from dgm_core.nn.causal import Pointwise
from dgm_core.nn.incremental import draw_grid
from dgm_core.nn.wavenet import Upsampling, WaveNetNetwork, WaveNetSizes, stretch
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LEVELS = 256


class VQVAEWaveNet(QuantisedModel, HasLikelihood):
    """One sequence of codes, decoded by a WaveNet."""

    class Config(CodebookConfig):
        hidden: int = Field(default=256, ge=2, description="channels of the encoder's convolutions")
        downsample: int = Field(default=64, ge=2, description="samples a code, a power of two")
        decoder: WaveNetSizes = Field(default_factory=WaveNetSizes)
        condition: int = Field(default=128, ge=1, description="features that codes and label become, in sum")
        upsampling: Upsampling = Field(default="transposed", description="of the codes to the samples' rate")

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]
    kind: ClassVar[Literal["image", "audio"]] = "audio"
    exact = False

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(codebook="loss", conditional=data.classes > 0)
        return config, Recipe(batch_size=32, steps=250_000, optimizers={"model": Optimizer(lr=2e-4)})

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        config = cls.Config(
            codes=4,
            code_features=8,
            codebook="loss",
            hidden=16,
            downsample=max(2, math.gcd(data.dims, 8)),
            conditional=data.classes > 0,
            decoder=WaveNetSizes(stacks=1, depth=4, channels=24, hidden=24, skip=24, head=24),
            condition=8,
        )
        return config, Recipe(batch_size=32, steps=150, optimizers={"model": Optimizer(lr=3e-3)})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, levels=1, label_features=config.condition)
        if data.levels is None or data.levels > LEVELS:
            raise DataMismatch(
                f"VQVAEWaveNet accepts audio of 2 to {LEVELS} levels; this has {data.levels}. Prepare the data set's "
                f"variant mu_law with {LEVELS} levels."
            )
        layers: list[nn.Module] = []
        inputs = 1
        for _ in range(halvings(config.downsample)):
            layers += [nn.Conv1d(inputs, config.hidden, 4, stride=2, padding=1), nn.ReLU()]
            inputs = config.hidden
        self.encoder = nn.Sequential(*layers)
        self.to_code = nn.Conv1d(config.hidden, config.code_features, 1)
        self.to_condition = Pointwise(config.code_features, config.condition)
        self.upsample = stretch(config.condition, config.downsample, config.upsampling)
        self.network = WaveNetNetwork(config.decoder, data, config.condition, data.levels, one_hot=True)

    def features(self, x: Float[Tensor, " B T"]) -> Sequence[Float[Tensor, " B hidden t"]]:
        return [self.encoder(x[:, None])]

    def project(self, level: int, features: Float[Tensor, " B hidden t"], state: Tensor | None) -> Tensor:
        return self.to_code(features)

    def merge(self, level: int, state: Tensor | None, e: Float[Tensor, " B D t"]) -> Float[Tensor, " B D t"]:
        return e

    def misfit(
        self, batch: Batch, x: Float[Tensor, " B T"], state: Float[Tensor, " B D t"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        nats = -self._log_likelihood(batch.x, state, batch.y).mean() / self.data.dims
        return nats, {"bits_per_dim_given_codes": nats.detach() / math.log(2)}

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """log p(x | z_q(x), y) − (codes) log K, nats: below log p(x | y) for codes drawn uniformly.

        The posterior is one sequence of codes, so that further `samples` would be the same.
        """
        state, _ = self._encode(to_network(x, self.data, self.dtype))
        cost = math.prod(self.grids[self.names[0]]) * math.log(self.config.codes)
        return self._log_likelihood(x, state, y) - cost

    def decode_state(
        self, state: Float[Tensor, " B D t"], y: Tensor | None, *, temperature: float = 1.0, top_p: float = 1.0
    ) -> Float[Tensor, " B T"]:
        """A draw of p(x | z, y); `temperature` divides the logits, `top_p` keeps the nucleus of that mass."""
        shape, condition = (1, 1, self.data.dims), self._condition(state, y)
        x = draw_grid(self.network, shape, condition, temperature=temperature, top_p=top_p)
        return x[:, 0, 0].to(promote(state).dtype)

    def decode_codes(
        self,
        codes: Mapping[str, Tensor],
        y: Tensor | None = None,
        context: Mapping[str, Tensor] = {},
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Float[Tensor, " B T"]:
        """A draw given the codes, float, in data units: in another voice than the encoded one's, if y says so."""
        return self.decode_state(self._merged(codes), y, temperature=temperature, top_p=top_p)

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        context: Mapping[str, Tensor] = {},
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Int[Tensor, " n T"]:
        """Codes drawn independently from their recent use, then decoded: the baseline that a prior has to beat."""
        y = self.labels_for(n, y) if self.config.conditional else None
        drawn = self.decode_codes(self.draw_codes(n), y, temperature=temperature, top_p=top_p)
        return to_stored(drawn, self.data)

    def _condition(self, state: Float[Tensor, " B D t"], y: Tensor | None) -> Float[Tensor, " B condition 1 T"]:
        return self.labelled(self.upsample(self.to_condition(state[:, :, None])), y)

    def _log_likelihood(
        self, x: Int[Tensor, " B T"], state: Float[Tensor, " B D t"], y: Tensor | None
    ) -> Float[Tensor, " B"]:
        grid = x[:, None, None].to(self.device).long()
        logits = promote(self.network(grid, self._condition(state, y)))
        return -F.cross_entropy(logits.movedim(-1, 1), grid, reduction="none").flatten(1).sum(1)
