"""What ProGAN and StyleGAN share: the game of networks that grow, a turn of each player at each resolution.

A turn is live in its resolution's window (`critic_8`, `critic_16`, …), so that the resolution is the turn's and how far
it has faded in a function of the clock: a resumed run needs nothing else. What is sampled shows the resolution that
training has reached, enlarged to the data's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dgm_core.capabilities import HasCritic
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataSpec, Loss, Turn
from dgm_core.models.adversarial.base import ImplicitModel, only_images
from dgm_core.nn.growing import Fades, Growth, Stage, Steps, growth, widths_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class GrowingConfig(Strict):
    """What both can be told; each adds its loss."""

    latents: int = Field(default=512, ge=1)
    features: int = Field(default=512, ge=1, description="channels of coarse grids")
    taper: int = Field(default=16_384, ge=256, description="a grid has no more channels than this over its side")
    growth: Fades = Field(
        default=(),
        description="shares of training [start, end] in which each finer resolution fades in; none: no growing",
    )


class GrowingGAN(ImplicitModel, HasCritic):
    """A concrete model builds `generator` (latents, stage -> image at the stage's size) and its opponent, of grids with
    so many channels as `widths` says."""

    config: GrowingConfig
    opponent: ClassVar[Literal["discriminator", "critic"]] = "discriminator"
    grown: Tensor

    def __init__(self, config: GrowingConfig, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.latents)
        only_images(data)
        self.growth: Growth = growth(data, config.growth)
        self.widths = widths_of(self.growth.sizes, config.features, config.taper)
        # The stage that training has reached, as one number: the level below, and what has faded in of the next.
        self.register_buffer("grown", torch.tensor(float(self.growth.first)))

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {name: list(self.get_submodule(name).parameters()) for name in (self.opponent, "generator")}

    def moves(self) -> Sequence[Turn]:
        """The turns of one resolution."""
        return [Turn(self.opponent, (self.opponent,)), Turn("generator", ("generator",))]

    def turns(self) -> Sequence[Turn]:
        return [
            replace(move, name=f"{move.name}_{side}", window=self.growth.window(level))
            for side, level in self.growth.sides.items()
            for move in self.moves()
        ]

    def where(self, turn: str, clock: Clock) -> tuple[str, Stage]:
        """The move that a turn is, and the stage that it is made at."""
        move, side = turn.rsplit("_", 1)
        return move, self.growth.stage(self.growth.sides[int(side)], clock.progress)

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        if turn == self.turns()[0].name:
            self.measure_units(batches)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        move, stage = self.where(turn, clock)
        z = self.draw_latent(batch.x.shape[0])
        if move == "generator":
            return self.generator_loss(self.generator(z, stage).to(self._dtype), stage)
        with torch.no_grad():
            fake = self.generator(z, stage).to(self._dtype)
        return self.opponent_loss(self.shown(batch, stage), fake, stage)

    def shown(self, batch: Batch, stage: Stage) -> Float[Tensor, " B C h w"]:
        """Data in network units, as the opponent sees it at this stage."""
        return self.growth.shown(self.to_network(batch.x), stage)

    @abstractmethod
    def opponent_loss(self, real: Float[Tensor, " B C h w"], fake: Float[Tensor, " B C h w"], stage: Stage) -> Loss:
        """Of data and samples in network units, without a graph."""

    @abstractmethod
    def generator_loss(self, fake: Float[Tensor, " B C h w"], stage: Stage) -> Loss:
        """Of samples in network units."""

    def after(self, turn: str, clock: Clock) -> None:
        _, stage = self.where(turn, clock)
        self.grown.fill_(stage.level - 1 + stage.alpha)

    @property
    def threshold(self) -> float | None:
        return 0.0 if self.opponent == "discriminator" else None

    def data_scores(self, x: Tensor, y: Tensor | None = None) -> Float[Tensor, " B"]:
        return self.get_submodule(self.opponent)(self.shown(Batch(x), self.stage), self.stage)

    def sample_scores(self, n: int) -> Float[Tensor, " n"]:
        fake = self.generator(self.draw_latent(n), self.stage).to(self._dtype)
        return self.get_submodule(self.opponent)(fake, self.stage)

    @property
    def stage(self) -> Stage:
        """What training has reached."""
        return self.growth.at(self.growth.last if self.grown.is_meta else self.grown.item())

    def generate(self, z: Float[Tensor, " B latents"], y: Int[Tensor, " B"] | None) -> Float[Tensor, " B *shape"]:
        return self.growth.enlarged(self.generator(z, self.stage).to(self._dtype), self.stage)


def recipe_of(opponent: str, adam: Optimizer, ema: float, batch_size: Steps, steps: int) -> Recipe:
    """Both players step alike; the generator is averaged."""
    sizes = [size for _, size in batch_size]
    size = batch_size if len(sizes) > 1 else sizes[0]
    players = {opponent: adam, "generator": adam.merged({"ema": ema})}
    return Recipe(batch_size=size, steps=steps, optimizers=players)
