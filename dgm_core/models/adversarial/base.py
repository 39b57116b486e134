"""What implicit models share: the way between data and network units, and sampling; and what games of two players do.

Networks see integers as 2 (x + u) / levels − 1 with dequantisation noise u ∈ [0, 1), and real values centred and
scaled by the training split's moments; samples go the same way back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from dgm_core.capabilities import HasCritic, HasDecoder
from dgm_core.config import Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss, Turn
from dgm_core.nn.norm import channel_moments, settle, standing_statistics

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class ImplicitModel(GenerativeModel, HasDecoder):
    """A model known by its samples alone: x = G(z), or G(z, y), in data units.

    A concrete model builds `generator` (latents, and labels if conditional -> network units).

    Args:
        latents: size of the generator's noise, N(0, I) unless `draw_latent` says otherwise.
        conditional: whether the class is told; samples then take the labels of the batch that they are held against,
            which are draws from the training marginals.
    """

    generator: nn.Module
    shift: Tensor
    scale: Tensor

    def __init__(self, config: Strict, data: DataSpec, *, latents: int, conditional: bool = False) -> None:
        super().__init__(config, data)
        if data.kind not in ("vector", "image"):
            raise DataMismatch(
                f"this model generates vectors and images; the data is of kind {data.kind!r}. Use an autoregressive "
                "model for codes and audio."
            )
        if conditional and not data.classes:
            raise DataMismatch(
                "this model generates examples of a given class; the data has no classes. Prepare it with labels, or "
                "use a model without them: gan, dcgan, improved_gan, wgan or wgan_gp."
            )
        self.latents, self.conditional = latents, conditional
        half = 0.5 * (data.levels or 2)
        self.register_buffer("shift", torch.full((data.shape[0],), 0.0 if data.levels is None else half))
        self.register_buffer("scale", torch.full((data.shape[0],), half))

    def measure_units(self, batches: Iterator[Batch]) -> None:
        """Centre and scale real values by one pass of the data; integers have their units already."""
        if self.data.levels is None:
            mean, variance = channel_moments((batch.x for batch in batches), self.shift)
            self.shift.copy_(mean)
            self.scale.copy_(torch.where(variance > 0, variance, 1).sqrt())

    def draw_latent(self, n: int) -> Float[Tensor, " n latents"]:
        return torch.randn(n, self.latents, device=self.device, dtype=self._dtype)

    def generate(self, z: Float[Tensor, " B latents"], y: Int[Tensor, " B"] | None) -> Float[Tensor, " B *shape"]:
        """Samples in network units; labels where the model is conditional."""
        x = self.generator(z) if y is None else self.generator(z, y)
        return x.to(self._dtype)

    def labels_of(self, batch: Batch) -> Int[Tensor, " B"]:
        if batch.y is None:
            raise DataMismatch("this model learns from labels; the batch has none")
        return batch.y

    def decode(
        self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        """The one sample of this z (and class)."""
        labels = self.labels_for(z.shape[0], y) if self.conditional else None
        return self.to_units(self.generate(z.to(self._dtype), labels))

    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        labels = self.labels_for(n, y) if self.conditional else None
        return self.to_stored(self.generate(self.draw_latent(n), labels))

    def to_network(self, x: Tensor) -> Float[Tensor, " B *shape"]:
        x = x.to(self._dtype)
        if self.data.levels is not None:
            x = x + torch.rand(x.shape, device=x.device, dtype=x.dtype)
        return (x - self._lift(self.shift)) / self._lift(self.scale)

    def to_data(self, x: Float[Tensor, " B *shape"]) -> Float[Tensor, " B *shape"]:
        return x * self._lift(self.scale) + self._lift(self.shift)

    def to_units(self, x: Float[Tensor, " B *shape"]) -> Float[Tensor, " B *shape"]:
        """As `decode` gives it: for integers the middle of the interval that is rounded to each."""
        x = self.to_data(x)
        return x if self.data.levels is None else (x - 0.5).clamp(0, self.data.levels - 1)

    def to_stored(self, x: Float[Tensor, " B *shape"]) -> Tensor:
        """As the data is stored: integers are those whose interval x lies in."""
        x = self.to_data(x)
        if self.data.levels is not None:
            x = x.floor().clamp(0, self.data.levels - 1)
        return x.to(self.data.dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self.shift.dtype

    def _lift(self, channels: Float[Tensor, " C"]) -> Tensor:
        return channels.reshape(-1, *(1,) * (len(self.data.shape) - 1))


class AdversarialModel(ImplicitModel, HasCritic):
    """A concrete model builds the generator and its opponent (network units -> (B,) scores), and states their two
    losses.

    The opponent is a module, a player and a turn of one name: `discriminator` where σ(score) is a probability, `critic`
    where the score is a number without bounds. A model may give it further turns. On none of them does it see the
    generator's graph.

    Args:
        latents: size of the generator's noise.
        plays: of the opponent for each of the generator.
        conditional: whether both sides are told the class.
    """

    opponent: ClassVar[Literal["discriminator", "critic"]] = "discriminator"

    def __init__(
        self, config: Strict, data: DataSpec, *, latents: int, plays: int = 1, conditional: bool = False
    ) -> None:
        super().__init__(config, data, latents=latents, conditional=conditional)
        self.plays = plays

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {name: list(self.get_submodule(name).parameters()) for name in (self.opponent, "generator")}

    def turns(self) -> Sequence[Turn]:
        return [Turn(self.opponent, (self.opponent,), repeat=self.plays), Turn("generator", ("generator",))]

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        if turn == self.opponent:
            self.measure_units(batches)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        z, y = self.draw_latent(batch.x.shape[0]), self.labels_of(batch) if self.conditional else None
        if turn == "generator":
            return self.generator_loss(batch, self.generate(z, y), clock)
        with torch.no_grad():
            fake = self.generate(z, y)
        return self.opponent_loss(batch, fake, clock)

    @abstractmethod
    def opponent_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        """Of a batch of data, as stored, and one of samples, in network units and without a graph."""

    @abstractmethod
    def generator_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        """Of a batch of samples, in network units, and the data that came with its turn."""

    @property
    def threshold(self) -> float | None:
        return 0.0 if self.opponent == "discriminator" else None

    def data_scores(self, x: Tensor, y: Tensor | None = None) -> Float[Tensor, " B"]:
        return self.score(self.to_network(x), self.labels_of(Batch(x, y)) if self.conditional else None)

    def sample_scores(self, n: int) -> Float[Tensor, " n"]:
        y = self.draw_labels(n) if self.conditional else None
        return self.score(self.generate(self.draw_latent(n), y), y)

    def score(self, x: Float[Tensor, " B *shape"], y: Int[Tensor, " B"] | None) -> Float[Tensor, " B"]:
        """The opponent's, of what is in network units."""
        opponent = self.get_submodule(self.opponent)
        return opponent(x) if y is None else opponent(x, y)

    def after(self, turn: str, clock: Clock) -> None:
        settle(self)

    def calibrate(self, batches: Iterator[Batch], *, passes: int = 16, batch_size: int = 256) -> None:
        """Average the generator's batch statistics afresh, over `passes` batches of its own noise and labels."""

        def draw() -> Tensor:
            y = self.draw_labels(batch_size) if self.conditional else None
            return self.generate(self.draw_latent(batch_size), y)

        standing_statistics(self.generator, draw, passes)


def only_images(data: DataSpec) -> None:
    """For networks of convolutions."""
    if data.kind != "image":
        raise DataMismatch(
            f"this model makes images, with convolutions; the data is of kind {data.kind!r}. Use gan, improved_gan, "
            "wgan or wgan_gp for vectors."
        )
    if min(data.shape[1:]) < 8:
        raise DataMismatch(
            f"this model makes images of at least 8 × 8 pixels; given {data.shape[1]} × {data.shape[2]}. Prepare "
            "them larger (size: 8, 16, 28, 32, 64, …)."
        )
