"""Improved techniques for training GANs. T. Salimans et al., 2016. arXiv:1606.03498.

The game of Goodfellow et al. 2014 with the six remedies that the paper and its code hold against collapse and
oscillation, each of which can be left out:

- feature matching (section 3.1): the generator also descends λ ‖E f(x) − E f(G(z))‖², f the discriminator's last hidden
  layer, per feature. The paper's own use of it is alone: `adversarial: 0`;
- minibatch discrimination (3.2): the discriminator also sees how near an example is to the others of its batch;
- historical averaging (3.3): either player pays ‖θ − (1/t) Σᵢ θ[i]‖² times its weight;
- one-sided label smoothing (3.4): the discriminator's target for data is 0.9;
- virtual batch normalisation in the generator (3.5), against a reference batch of latents; without it, plain batch
  normalisation, as in the paper's ablation;
- instance noise: N(0, σ²) on everything that the discriminator sees, as in the authors' code; here σ falls linearly to
  zero over training (C. K. Sønderby et al. 2017, arXiv:1610.04490).

Means, batch statistics and nearness are over all ranks' examples; data and samples are batches of their own. Adam with
a learning rate of 3·10⁻⁴ and β₁ = 0.5 on batches of 100, the last third of training falling to zero, as in the
authors' CIFAR-10 code.

Departures: DCGAN's networks (`dgm_core/nn/dcgan.py`), with batch normalisation in the discriminator; theirs has nine
layers with weight normalisation and dropout. No labels: their CIFAR-10 discriminator also classifies. Minibatch
discrimination has no data-dependent start. The learning rate falls linearly throughout. Vectors: perceptrons with three
hidden layers of 128, normalised in the generator.
Expected: the paper has no number on data that is at hand; modes found on toys, not run yet: `make results
ROW=toys_ring`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataSpec, Loss
from dgm_core.models.adversarial.base import AdversarialModel, only_images
from dgm_core.nn.dcgan import DCGANFeatures, DCGANGenerator, start_normal
from dgm_core.nn.gan_blocks import Norm, maxout_layers
from dgm_core.nn.minibatch import MinibatchDiscrimination
from dgm_core.nn.norm import BatchNorm
from dgm_core.nn.virtual_batch_norm import VirtualBatchNorm, WithReference
from dgm_core.objectives.gan import (
    cross_entropy_discriminator,
    feature_matching,
    historical_average,
    non_saturating_generator,
    verdicts,
)
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


class Discriminator(nn.Module):
    """(B, *shape) -> (B,) scores; `features` is the last hidden layer."""

    def __init__(self, body: nn.Module, size: int, kernels: int, dims: int) -> None:
        super().__init__()
        self.body = body
        self.nearness = MinibatchDiscrimination(size, kernels, dims) if kernels else None
        self.score = nn.Linear(size + kernels, 1)

    def features(self, x: Float[Tensor, " B *shape"]) -> Float[Tensor, " B F"]:
        return self.body(x)

    def judge(self, f: Float[Tensor, " B F"]) -> Float[Tensor, " B"]:
        seen = f if self.nearness is None else torch.cat([f, self.nearness(f).to(f.dtype)], 1)
        return self.score(seen).flatten()

    def forward(self, x: Float[Tensor, " B *shape"]) -> Float[Tensor, " B"]:
        return self.judge(self.features(x))


class Past(nn.Module):
    """Mean of a player's parameters over its steps, in one vector."""

    mean: Tensor
    steps: Tensor

    def __init__(self, player: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", _flat(player))
        self.register_buffer("steps", torch.ones(()))

    def advance(self, player: nn.Module) -> None:
        self.steps += 1
        self.mean.lerp_(_flat(player), 1 / self.steps)


class ImprovedGAN(AdversarialModel):
    """The original game with six remedies, each of which can be left out."""

    class Config(Strict):
        latents: int = Field(default=100, ge=1)
        features: int = Field(default=128, ge=1, description="hidden units, or channels at the finest resolution")
        depth: int = Field(default=3, ge=1, description="hidden layers of a perceptron")
        adversarial: float = Field(default=1.0, ge=0, description="weight of −E log D(G(z)) for the generator")
        feature_matching: float = Field(default=1.0, ge=0, description="λ; 0 leaves feature matching out")
        minibatch_kernels: int = Field(default=100, ge=0, description="B; 0 leaves minibatch discrimination out")
        minibatch_dims: int = Field(default=5, ge=1, description="C, of each kernel")
        historical_averaging: float = Field(default=1.0, ge=0, description="weight; 0 leaves it out")
        real_target: float = Field(default=0.9, gt=0, le=1, description="1 leaves label smoothing out")
        virtual_batch: int = Field(default=100, ge=0, description="latents in the reference batch; 0: plain batch norm")
        instance_noise: float = Field(default=0.2, ge=0, description="σ at the start; 0 leaves it out")

        @model_validator(mode="after")
        def _the_generator_has_an_objective(self) -> Self:
            if not self.adversarial and not self.feature_matching:
                raise ValueError("the generator needs an objective: give adversarial or feature_matching a weight")
            return self

    config: Config
    past: nn.ModuleDict

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        if data.kind == "image":
            adam = Optimizer(lr=3e-4, betas=(0.5, 0.999), schedule="linear")
            recipe = Recipe(batch_size=100, steps=100_000, optimizers={"discriminator": adam, "generator": adam})
            return cls.Config(), recipe
        adam = Optimizer(lr=1e-3, betas=(0.5, 0.999), schedule="linear")
        recipe = Recipe(batch_size=256, steps=10_000, optimizers={"discriminator": adam, "generator": adam})
        return cls.Config(latents=data.dims, features=128, minibatch_kernels=16), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=2e-3, betas=(0.5, 0.999), schedule="linear")
        recipe = Recipe(batch_size=32, steps=150, optimizers={"discriminator": adam, "generator": adam})
        config = cls.Config(latents=8, features=16, depth=2, minibatch_kernels=6, minibatch_dims=3, virtual_batch=16)
        if data.kind == "image":
            return config, recipe.merged({"steps": 100})
        return config.merged({"latents": max(2, data.dims), "features": 32}), recipe

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.latents)
        c, bounded = config, data.levels is not None
        norm: Norm = partial(VirtualBatchNorm, reference=c.virtual_batch) if c.virtual_batch else BatchNorm
        if data.kind == "vector":
            bound = nn.Tanh() if bounded else nn.Identity()
            generator = nn.Sequential(*_normed_mlp(c.latents, c.features, c.depth, data.dims, norm), bound)
            body: nn.Module = maxout_layers(data.dims, c.features, c.depth, 1)
            self.discriminator = Discriminator(body, c.features, c.minibatch_kernels, c.minibatch_dims)
        else:
            only_images(data)
            generator = DCGANGenerator(c.latents, data.shape, c.features, norm=norm, bounded=bounded)
            body = DCGANFeatures(data.shape, c.features)
            self.discriminator = Discriminator(body, body.size, c.minibatch_kernels, c.minibatch_dims)
            start_normal(self.discriminator.score)
        reference = torch.randn(c.virtual_batch, c.latents)
        self.generator = WithReference(generator, reference) if c.virtual_batch else generator
        players = (self.opponent, "generator") if c.historical_averaging else ()
        self.past = nn.ModuleDict({name: Past(self.get_submodule(name)) for name in players})

    def opponent_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        real = self.discriminator(self._noisy(self.to_network(batch.x), clock))
        score = self.discriminator(self._noisy(fake, clock))
        game = cross_entropy_discriminator(real, score, self.config.real_target)
        metrics = {**verdicts(real, score), "game": game.detach()}
        return self._with_past(game, metrics, self.opponent)

    def generator_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        c = self.config
        features = self.discriminator.features(self._noisy(fake, clock))
        value, metrics = promote(features).new_zeros(()), {}
        if c.adversarial:
            game = non_saturating_generator(self.discriminator.judge(features))
            value, metrics["game"] = value + c.adversarial * game, game.detach()
        if c.feature_matching:
            with torch.no_grad():
                of_data = self.discriminator.features(self._noisy(self.to_network(batch.x), clock))
            gap = feature_matching(of_data, features) / features.shape[1]
            value, metrics["feature_gap"] = value + c.feature_matching * gap, gap.detach()
        return self._with_past(value, metrics, "generator")

    def _noisy(self, x: Float[Tensor, " B *shape"], clock: Clock) -> Float[Tensor, " B *shape"]:
        sd = self.config.instance_noise * (1 - clock.progress)
        return x + sd * torch.randn(x.shape, device=x.device, dtype=x.dtype) if self.config.instance_noise else x

    def _with_past(self, value: Float[Tensor, ""], metrics: dict[str, Tensor], player: str) -> Loss:
        if not self.past:
            return Loss(value, metrics)
        distance = historical_average(self.get_submodule(player).parameters(), self._past(player).mean)
        metrics["distance_from_past"] = distance.detach()
        return Loss(value + self.config.historical_averaging * distance, metrics)

    def after(self, turn: str, clock: Clock) -> None:
        super().after(turn, clock)
        if self.past:
            self._past(turn).advance(self.get_submodule(turn))

    def _past(self, player: str) -> Past:
        past = self.past[player]
        assert isinstance(past, Past)
        return past


def _normed_mlp(features: int, hidden: int, depth: int, out: int, norm: Norm) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(features, hidden, bias=False), norm(hidden), nn.ReLU()]
        features = hidden
    return [*layers, nn.Linear(features, out)]


@torch.no_grad()
def _flat(module: nn.Module) -> Float[Tensor, " P"]:
    return torch.cat([p.flatten() for p in module.parameters()])
