"""Updates of DCGAN and WGAN-GP by the trainer beside a plain script of the same: `python -m benchmarks.gan`.

Ours is `Trainer.fit` as the pipeline runs it: batches from Arrow shards, metrics, the watch for losses that are not
finite, schedules, a report every fifty rounds. The script is what one would write by hand for this game alone: the same
networks with torch's own batch normalisation, the same fused Adam, its data one uint8 tensor in memory, whose shuffled
rows it takes; no metrics. Both do the same work, fresh noise on every turn and no gradients for the player that stands
still, in single precision; a rate is of whole rounds (DCGAN: one play each; WGAN-GP: five of the critic). That both
learn the same is checked first, in double precision with plain gradient descent, from the same batches and noise.

A line without a goal has the script as PyTorch's tutorial has it: the samples that the discriminator saw serve the
generator, too, which spares a pass of the generator, and the discriminator's gradients are computed in vain.

`--tiny` runs a few rounds of small networks, to see that it works; it has no goals and stores nothing.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import fit
from benchmarks.harness import RESULTS, Row, interleave, report
from dgm_core.config import Recipe
from dgm_core.data.shards import Dataset
from dgm_core.models import CATALOG
from dgm_core.models.adversarial.base import AdversarialModel
from dgm_core.models.adversarial.wgan_gp import WGANGP
from dgm_core.nn.norm import BatchNorm
from dgm_core.training.trainer import Trainer
from pipelines.training_job import Training

SIDE, BATCH, FEATURES = 32, 64, 32
ROUNDS = {"dcgan": 10, "wgan_gp": 2}
AT_LEAST = 0.97
FOREVER = 10**6  # rounds: none of the schedules falls noticeably while it is timed
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Ours:
    """Our trainer, some rounds at a time."""

    def __init__(self, model: AdversarialModel, recipe: Recipe, data: Dataset) -> None:
        self.goal = 0
        training = Training(data, recipe, 0)
        self.trainer = Trainer(model, recipe, training, device=DEVICE, stop=lambda: self.trainer.step >= self.goal)

    def rounds(self, count: int) -> None:
        self.goal = self.trainer.step + count
        self.trainer.fit()


class Script(ABC):
    """The game by hand; `update` is one round on the batches that come."""

    def __init__(self, model: AdversarialModel, recipe: Recipe) -> None:
        networks = (model.generator, model.get_submodule(model.opponent))
        self.generator, self.opponent = (with_torchs_norm(copy.deepcopy(n)).to(DEVICE) for n in networks)
        self.latents, self.config = model.latents, model.config
        self.optimizers = [
            self._optimizer(network, recipe, name)
            for network, name in ((self.generator, "generator"), (self.opponent, model.opponent))
        ]

    def _optimizer(self, network: nn.Module, recipe: Recipe, name: str) -> torch.optim.Optimizer:
        settings = recipe.optimizers[name]
        if settings.algorithm == "sgd":
            return torch.optim.SGD(network.parameters(), lr=settings.lr)
        return torch.optim.Adam(network.parameters(), lr=settings.lr, betas=settings.betas, fused=True)

    def noise(self, n: int) -> Tensor:
        weight = next(self.generator.parameters())
        return torch.randn(n, self.latents, device=weight.device, dtype=weight.dtype)

    def prepared(self, x: Tensor) -> Tensor:
        x = x.to(DEVICE, next(self.generator.parameters()).dtype)
        return (x + torch.rand_like(x)) / 128 - 1

    def generator_step(self, n: int, loss: Callable[[Tensor], Tensor]) -> None:
        self.opponent.requires_grad_(False)
        self.optimizers[0].zero_grad()
        loss(self.opponent(self.generator(self.noise(n)))).backward()
        self.optimizers[0].step()
        self.opponent.requires_grad_(True)

    def opponent_step(self, loss: Tensor) -> None:
        self.optimizers[1].zero_grad()
        loss.backward()
        self.optimizers[1].step()

    @abstractmethod
    def update(self, batches: Iterator[Tensor]) -> None:
        """A turn of each, on the batches that it needs."""


class PlainDCGAN(Script):
    def update(self, batches: Iterator[Tensor]) -> None:
        batch = next(batches)
        with torch.no_grad():
            fake = self.generator(self.noise(len(batch)))
        self.opponent_step(self.loss(self.prepared(batch), fake))
        self.generator_step(len(batch), lambda score: F.softplus(-score).mean())

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        real, fake = self.opponent(real), self.opponent(fake)
        return F.softplus(-real).mean() + F.softplus(fake).mean()


class TutorialDCGAN(PlainDCGAN):
    def update(self, batches: Iterator[Tensor]) -> None:
        batch = next(batches)
        fake = self.generator(self.noise(len(batch)))
        self.opponent_step(self.loss(self.prepared(batch), fake.detach()))
        self.optimizers[0].zero_grad()
        F.softplus(-self.opponent(fake)).mean().backward()
        self.optimizers[0].step()


class PlainWGANGP(Script):
    def update(self, batches: Iterator[Tensor]) -> None:
        assert isinstance(self.config, WGANGP.Config)
        n = 0
        for _ in range(self.config.critic_steps):
            batch = next(batches)
            n = len(batch)
            with torch.no_grad():
                fake = self.generator(self.noise(n))
            real = self.prepared(batch)
            epsilon = torch.rand(n, device=real.device, dtype=real.dtype)[:, None, None, None]
            between = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(self.opponent(between).sum(), between, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            distance = self.opponent(real).mean() - self.opponent(fake).mean()
            self.opponent_step(self.config.gradient_penalty * penalty - distance)
        self.generator_step(n, lambda score: -score.mean())


def with_torchs_norm(network: nn.Module) -> nn.Module:
    """The network with `torch.nn.BatchNorm2d` for our batch normalisation."""
    for name, part in list(network.named_modules()):
        if isinstance(part, BatchNorm):
            plain = nn.BatchNorm2d(part.moments.running_mean.shape[0]).to(part.moments.running_mean)
            assert part.weight is not None
            assert part.bias is not None
            plain.load_state_dict({"weight": part.weight, "bias": part.bias}, strict=False)
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, plain)
    return network


def shuffled(x: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of a tensor in memory, epoch after epoch."""
    while True:
        order = torch.randperm(len(x))
        for start in range(0, len(x) - size + 1, size):
            yield x[order[start : start + size]]


def build(name: str, data: Dataset, features: int, **changes: object) -> tuple[AdversarialModel, Recipe]:
    kind = CATALOG[name]
    config, recipe = kind.defaults(data.spec)
    torch.manual_seed(0)
    model = kind(config.merged({"features": features}), data.spec)
    assert isinstance(model, AdversarialModel)
    return model, recipe.merged({"batch_size": BATCH, "steps": FOREVER, "precision": "fp32", **changes})


def disagreement(name: str, script: type[Script], data: Dataset) -> float:
    """Greatest difference of any parameter after two rounds of gradient descent from the same start."""
    sgd = {"algorithm": "sgd", "lr": 1e-3, "momentum": 0.0, "schedule": "constant"}
    players = dict.fromkeys(build(name, data, 4)[1].optimizers, sgd)
    model, recipe = build(name, data, 4, batch_size=8, precision="fp64", optimizers=players)
    model.double()
    theirs = script(model, recipe)
    ours = Ours(model, recipe, data)
    start = ours.trainer.position
    torch.manual_seed(1)
    ours.rounds(2)
    plays = sum(turn.repeat for turn in model.turns())
    # The generator's plays have a batch of data, too, of which they make no use.
    positions = [start + 8 * i for i in range(2 * plays) if (i + 1) % plays]
    torch.manual_seed(1)
    batches = (ours.trainer.data.at(position, 8).x for position in positions)
    for _ in range(2):
        theirs.update(batches)
    pairs = [(model.generator, theirs.generator), (model.get_submodule(model.opponent), theirs.opponent)]
    return max(
        (a - b).abs().max().item()
        for mine, plain in pairs
        for a, b in zip(mine.parameters(), plain.parameters(), strict=True)
    )


def beside(
    name: str, script: type[Script], data: Dataset, features: int, rounds: int, pairs: int
) -> tuple[float, float]:
    """How many times the script's rate ours is, and seconds a round of ours."""
    model, recipe = build(name, data, features)
    theirs, ours = script(model, recipe), Ours(model, recipe, data)
    batches = shuffled(torch.cat([batch.x for batch in ours.trainer.data.one_pass(256)]), BATCH)

    def peer() -> None:
        for _ in range(rounds):
            theirs.update(batches)

    found = interleave(lambda: ours.rounds(rounds), peer, pairs)
    return found.ratio, statistics.median(found.ours) / rounds


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small networks, few rounds; nothing is stored")
    tiny = parser.parse_args(arguments).tiny
    features, pairs = (4, 3) if tiny else (FEATURES, 9)
    setting = f"{SIDE}×{SIDE} grey, {features} channels, batch {BATCH}, float32"
    rows = []
    with tempfile.TemporaryDirectory(prefix="dgm-gan-") as folder:
        data = fit.dataset(Path(folder), "digits", source="digits", size=SIDE)
        for name, script in (("dcgan", PlainDCGAN), ("wgan_gp", PlainWGANGP)):
            difference = disagreement(name, script, data)
            ratio, seconds = beside(name, script, data, features, ROUNDS[name], pairs)
            rows.append(Row(f"{name}: greatest difference of both (float64)", difference, 1e-9, False, ""))
            rows.append(Row(f"{name}: our rate over the script's ({setting})", ratio, None if tiny else AT_LEAST))
            rows.append(Row(f"{name}: seconds a round, ours", seconds, None, unit="s"))
        ratio, _ = beside("dcgan", TutorialDCGAN, data, features, ROUNDS["dcgan"], pairs)
        rows.append(Row("dcgan: our rate over the tutorial's script, which shares samples", ratio, None))
        return report("gan", rows, Path(folder) if tiny else RESULTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
