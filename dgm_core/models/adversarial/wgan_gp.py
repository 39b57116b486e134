"""Improved training of Wasserstein GANs. I. Gulrajani et al., 2017. arXiv:1704.00028.

The critic minimises (eq. 3)

    E f(x̃) − E f(x) + λ E (‖∇ f(x̂)‖₂ − 1)²,   x̂ = ε x + (1 − ε) x̃, ε ~ U[0, 1),

the generator −E f(x̃), once for every `critic_steps` of the critic, each on a fresh batch (algorithm 1). Images: the
ResNets of appendix F (its CIFAR-10 table), λ = 10, Adam with β = (0, 0.9) and a learning rate of 2·10⁻⁴ that falls
linearly to zero over 100,000 rounds of 64. Vectors: ReLU perceptrons with three hidden layers, λ = 0.1, batches of 256
and two latents for two coordinates, as in the authors' toy problems.

Departures: image sizes other than 32 × 32 change the number of up- and down-sampling blocks, nothing else; real-valued
images have no tanh at the end. The generator's batch is the critic's (theirs is twice that). Sampling uses running
batch statistics (theirs, the sample's own batch). Vectors: 128 hidden units with torch's initialisation, a learning
rate of 2·10⁻³ that falls linearly to zero over 4000 rounds, β₁ = 0 and an averaged generator, where the authors' toy
code has 512 units with He's, 10⁻⁴ throughout, β₁ = 0.5, 100,000 rounds and no average: what two cores can do in three
minutes.
Expected: on the ring of 8 Gaussians (radius 2, σ = 0.02) 96 % of samples within 3 σ of a mode (a perfect model:
98.9 %) and every mode with at least 90 % of its share there: `make results ROW=wgan_gp_ring`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, Loss
from dgm_core.models.adversarial.base import AdversarialModel
from dgm_core.nn.gan_blocks import InputBlock, Norm, ResidualBlock, conv, linear, mlp, no_norm
from dgm_core.nn.norm import BatchNorm, LayerNorm
from dgm_core.objectives.gan import (
    gradient_norm,
    gradient_penalty,
    interpolate,
    wasserstein_critic,
    wasserstein_generator,
)

if TYPE_CHECKING:
    from jaxtyping import Float


class ResNetGenerator(nn.Module):
    """A linear layer onto the smallest grid, then blocks that double it: (B, latents) -> (B, C, H, W)."""

    def __init__(self, latents: int, shape: tuple[int, ...], features: int) -> None:
        super().__init__()
        channels, height, width = shape
        doublings = _halvings(shape)
        self.grid = (features, height >> doublings, width >> doublings)
        self.enter = linear(latents, self.grid[0] * self.grid[1] * self.grid[2])
        self.blocks = nn.Sequential(
            *(ResidualBlock(features, features, resample="up", norm=BatchNorm) for _ in range(doublings))
        )
        self.norm = BatchNorm(features)
        self.out = conv(features, channels, 3, gain=1.0)

    def forward(self, z: Float[Tensor, " B latents"]) -> Float[Tensor, " B C H W"]:
        h = self.blocks(self.enter(z).unflatten(1, self.grid))
        return self.out(F.relu(self.norm(h)))


class ResNetCritic(nn.Module):
    """Blocks that halve, two that do not, the mean over the grid: (B, C, H, W) -> (B, 1)."""

    def __init__(self, shape: tuple[int, ...], features: int, norm: Norm) -> None:
        super().__init__()
        halvings = max(1, _halvings(shape) - 1)
        self.enter = InputBlock(shape[0], features)
        self.blocks = nn.Sequential(
            *(ResidualBlock(features, features, resample="down", norm=norm) for _ in range(halvings - 1)),
            *(ResidualBlock(features, features, norm=norm) for _ in range(2)),
        )
        self.out = linear(features, 1)

    def forward(self, x: Float[Tensor, " B C H W"]) -> Float[Tensor, " B 1"]:
        return self.out(F.relu(self.blocks(self.enter(x))).mean((2, 3)))


class WGANGP(AdversarialModel):
    """Wasserstein GAN with gradient penalty: perceptrons for vectors, ResNets for images."""

    class Config(Strict):
        latents: int = Field(default=128, ge=1)
        features: int = Field(default=128, ge=1, description="hidden units of a perceptron, channels of a ResNet")
        depth: int = Field(default=3, ge=1, description="hidden layers of a perceptron")
        gradient_penalty: float = Field(default=10.0, ge=0, description="λ")
        critic_steps: int = Field(default=5, ge=1, description="plays of the critic for each of the generator")
        critic_norm: Literal["none", "layer"] = Field(default="none", description="of a ResNet critic")

    config: Config
    opponent = "critic"

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        if data.kind != "image":
            critic = Optimizer(lr=2e-3, betas=(0.0, 0.9), schedule="linear")
            generator = critic.merged({"ema": 0.99})
            config = cls.Config(latents=data.dims, gradient_penalty=0.1)
            return config, Recipe(batch_size=256, steps=4000, optimizers={"critic": critic, "generator": generator})
        adam = Optimizer(lr=2e-4, betas=(0.0, 0.9), schedule="linear")
        recipe = Recipe(batch_size=64, steps=100_000, optimizers={"critic": adam, "generator": adam})
        return cls.Config(), recipe

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        adam = Optimizer(lr=1e-3, betas=(0.0, 0.9), schedule="linear")
        recipe = Recipe(batch_size=64, steps=200, optimizers={"critic": adam, "generator": adam})
        if data.kind != "image":
            return cls.Config(latents=max(2, data.dims), features=32, depth=2, gradient_penalty=0.1), recipe
        return cls.Config(latents=16, features=8), recipe.merged({"steps": 60, "batch_size": 32})

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.latents, plays=config.critic_steps)
        f = config.features
        if data.kind == "vector":
            body: nn.Module = mlp(config.latents, f, config.depth, data.dims)
            self.critic = nn.Sequential(mlp(data.dims, f, config.depth, 1), nn.Flatten(0))
        else:
            if any(side % 4 or side < 8 for side in data.shape[1:]):
                raise DataMismatch(
                    f"wgan_gp makes images whose height and width are multiples of 4, at least 8; given "
                    f"{data.shape[1:]}. Prepare the images padded or resized (size: 16, 28, 32, 64, …)."
                )
            body = ResNetGenerator(config.latents, data.shape, f)
            norm = LayerNorm if config.critic_norm == "layer" else no_norm
            self.critic = nn.Sequential(ResNetCritic(data.shape, f, norm), nn.Flatten(0))
        self.generator = body if data.levels is None else nn.Sequential(body, nn.Tanh())

    def opponent_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        real = self.to_network(batch.x)
        epsilon = torch.rand(real.shape[0], device=real.device, dtype=real.dtype)
        # Examples do not meet in the critic, so that one pass scores both batches.
        scores = self.critic(torch.cat([real, fake]))
        distance = -wasserstein_critic(*scores.chunk(2))
        norm = gradient_norm(self.critic, interpolate(real, fake, epsilon))
        penalty = gradient_penalty(norm)
        metrics = {"wasserstein": distance, "gradient_penalty": penalty, "gradient_norm": norm.mean()}
        value = self.config.gradient_penalty * penalty - distance
        return Loss(value, {name: metric.detach() for name, metric in metrics.items()})

    def generator_loss(self, batch: Batch, fake: Float[Tensor, " B *shape"], clock: Clock) -> Loss:
        return Loss(wasserstein_generator(self.critic(fake)))


def _halvings(shape: tuple[int, ...]) -> int:
    """How often height and width halve without going below 4."""
    height, width = shape[1:]
    times = 0
    while height % 2 == 0 and width % 2 == 0 and min(height, width) >= 8:
        height, width, times = height // 2, width // 2, times + 1
    return times
