"""What every generator-against-critic model shares: the two players, the way between data and network units, sampling.

Networks see integers as 2 (x + u) / levels − 1 with dequantisation noise u ∈ [0, 1), and real values centred and
scaled by the training split's moments; samples go the same way back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgm_core.capabilities import HasDecoder
from dgm_core.config import Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss, Turn
from dgm_core.nn.norm import channel_moments, settle, standing_statistics

if TYPE_CHECKING:
    from jaxtyping import Float


class AdversarialModel(GenerativeModel, HasDecoder):
    """A concrete model builds `generator` (latents -> network units) and `critic` (network units -> (B,) scores), and
    states their two losses.

    Args:
        latents: size of the generator's noise, N(0, I).
        critic_steps: plays of the critic for each of the generator.
    """

    generator: nn.Module
    critic: nn.Module
    shift: Tensor
    scale: Tensor

    def __init__(self, config: Strict, data: DataSpec, *, latents: int, critic_steps: int) -> None:
        super().__init__(config, data)
        if data.kind not in ("vector", "image"):
            raise DataMismatch(
                f"this model generates vectors and images; the data is of kind {data.kind!r}. Use an autoregressive "
                "model for codes and audio."
            )
        self.latents, self.critic_steps = latents, critic_steps
        half = 0.5 * (data.levels or 2)
        self.register_buffer("shift", torch.full((data.shape[0],), 0.0 if data.levels is None else half))
        self.register_buffer("scale", torch.full((data.shape[0],), half))

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"critic": list(self.critic.parameters()), "generator": list(self.generator.parameters())}

    def turns(self) -> Sequence[Turn]:
        return [Turn("critic", ("critic",), repeat=self.critic_steps), Turn("generator", ("generator",))]

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        if turn == "critic" and self.data.levels is None:
            mean, variance = channel_moments((batch.x for batch in batches), self.shift)
            self.shift.copy_(mean)
            self.scale.copy_(torch.where(variance > 0, variance, 1).sqrt())

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        fake = self.generator(self.draw_latent(batch.x.shape[0]))
        if turn == "critic":
            return self.critic_loss(self.to_network(batch.x), fake)
        return self.generator_loss(fake)

    @abstractmethod
    def critic_loss(self, real: Float[Tensor, " B *shape"], fake: Float[Tensor, " B *shape"]) -> Loss:
        """Of a batch of data and one of samples, both in network units."""

    @abstractmethod
    def generator_loss(self, fake: Float[Tensor, " B *shape"]) -> Loss:
        """Of a batch of samples, in network units."""

    def after(self, turn: str, clock: Clock) -> None:
        settle(self)

    def calibrate(self, batches: Iterator[Batch], *, passes: int = 16, batch_size: int = 256) -> None:
        """Average the generator's batch statistics afresh, over `passes` batches of its own noise."""
        standing_statistics(self.generator, lambda: self.generator(self.draw_latent(batch_size)), passes)

    def draw_latent(self, n: int) -> Float[Tensor, " n latents"]:
        return torch.randn(n, self.latents, device=self.device, dtype=self._dtype)

    def decode(
        self, z: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        """The one sample of this z; for integers the middle of the interval that is rounded to it."""
        x = self.to_data(self.generator(z.to(self._dtype)))
        return x if self.data.levels is None else (x - 0.5).clamp(0, self.data.levels - 1)

    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        x = self.to_data(self.generator(self.draw_latent(n)))
        if self.data.levels is not None:
            x = x.floor().clamp(0, self.data.levels - 1)
        return x.to(self.data.dtype)

    def to_network(self, x: Tensor) -> Float[Tensor, " B *shape"]:
        x = x.to(self._dtype)
        if self.data.levels is not None:
            x = x + torch.rand(x.shape, device=x.device, dtype=x.dtype)
        return (x - self._lift(self.shift)) / self._lift(self.scale)

    def to_data(self, x: Float[Tensor, " B *shape"]) -> Float[Tensor, " B *shape"]:
        return x.to(self._dtype) * self._lift(self.scale) + self._lift(self.shift)

    @property
    def _dtype(self) -> torch.dtype:
        return self.shift.dtype

    def _lift(self, channels: Float[Tensor, " C"]) -> Tensor:
        return channels.reshape(-1, *(1,) * (len(self.data.shape) - 1))
