"""Glow on images: MNIST within a size and a time, and CIFAR-10 beside another library's Glow in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import fit
from benchmarks.glow import normflows
from benchmarks.rows import Figure, Measured, at_least, at_most, real_data, row
from dgm_core.contract import Batch, Clock, GenerativeModel
from dgm_core.data.batches import Stream
from dgm_core.data.shards import Dataset
from dgm_core.models.flow.glow import Glow

EVERY = 100  # rounds between two looks at the losses
MILLION = Figure("parameters", at_most(1.0), "M")


def glow_figures(bits: float) -> dict[str, Figure]:
    return {
        "test": Figure("bits_per_dim", at_most(bits), "bits", "1.05", "Glow in table 2 of arXiv:1810.01367"),
        "test, one draw of the noise": Figure("bits_per_dim", unit="bits"),
        "parameters": MILLION,
        "greatest error of the inverse": Figure("inverse_error", unit="levels"),
    }


MNIST = "MNIST, 8 bits, 28 × 28; 50,000 train, 10,000 test"
SMALL = {"levels": 2, "depth": 8, "features": 64, "dequantization": "variational", "memory": "store"}
LARGE = {"levels": 2, "depth": 16, "features": 128, "dequantization": "variational", "memory": "store"}


@row(
    model="glow",
    data=MNIST,
    estimator="bound by learnt noise on the test split, 8 draws an image; one draw beside it",
    minutes=30,
    figures=glow_figures(1.30),
)
def glow_mnist(workdir: Path) -> Measured:
    adam = {"lr": 2e-3, "warmup": 200, "schedule": "cosine", "clip_norm": 100.0}
    recipe = {"batch_size": 64, "steps": 8000, "precision": "bf16", "optimizers": {"model": adam}}
    return _mnist(workdir, SMALL, recipe)


@row(
    model="glow",
    data=f"{MNIST}; a long run, for an accelerator",
    estimator="bound by learnt noise on the test split, 8 draws an image; one draw beside it",
    minutes=240,
    figures=glow_figures(1.08),
)
def glow_mnist_long(workdir: Path) -> Measured:
    adam = {"lr": 1e-3, "warmup": 1000, "schedule": "cosine", "clip_norm": 100.0, "ema": 0.999}
    recipe = {"batch_size": 128, "steps": 150 * 391, "optimizers": {"model": adam}}
    return _mnist(workdir, LARGE, recipe)


def _mnist(workdir: Path, config: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, float]:
    data = fit.dataset(workdir, "mnist", source="idx", path=str(real_data("mnist")), val=10_000)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fit.train("glow", data, config=config, recipe=recipe, device=device)
    assert isinstance(model, Glow)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    nats = {1: 0.0, 8: 0.0}
    with torch.no_grad():
        for batch in fit.held_out(data, 500):
            x = batch.x.to(device)
            for samples in nats:
                nats[samples] -= model.log_prob(x, samples=samples).double().sum().item()
        error = model.inverse_error(next(fit.held_out(data, 500)).x.to(device)).max().item()
    total = len(data.split("test")) * data.spec.dims * math.log(2)
    return {
        "test": nats[8] / total,
        "test, one draw of the noise": nats[1] / total,
        "parameters": size,
        "greatest error of the inverse": error,
    }


@row(
    model="glow",
    data="scikit-learn's digits, 8 × 8, 17 levels",
    estimator="one level of K = 32 affine steps, 8 features, the paper's learning rate and warm-up, batches of 16; "
    "training stops at the first loss that is not finite",
    minutes=5,
    figures={
        "rounds without one": Figure("rounds", at_least(2000), ""),
        "test": Figure("bits_per_dim", unit="bits"),
        "greatest error of the inverse": Figure("inverse_error", at_most(0.5), "levels"),
    },
)
def glow_deep(workdir: Path) -> Measured:
    data = fit.dataset(workdir, "digits", source="digits")
    done: list[int] = []

    def count(model: GenerativeModel) -> dict[str, float]:
        done.append(EVERY)
        return {}

    config = {"levels": 1, "depth": 32, "features": 8, "memory": "store"}
    recipe = {"batch_size": 16, "steps": 2000, "evaluate_every": EVERY}
    model = fit.train("glow", data, config=config, recipe=recipe, evaluate=count)
    assert isinstance(model, Glow)
    with torch.no_grad():
        x = next(fit.held_out(data)).x
        bits = -model.log_prob(x, samples=8).double().mean().item() / (data.spec.dims * math.log(2))
        error = model.inverse_error(x).max().item()
    return {"rounds without one": sum(done), "test": bits, "greatest error of the inverse": error}


SAME = {"levels": 3, "depth": 4, "features": 64}
STEPS, BATCH, WARMUP, RATE = 1500, 32, 100, 1e-3


@row(
    model="glow",
    data="CIFAR-10 recompressed as JPEG (not comparable with published figures); 50,000 train, 10,000 test",
    estimator="bound by uniform noise on the first 2,000 test images; 1,500 steps of 32, taken in turns; Adam, 10⁻³",
    minutes=15,
    figures={
        "test": Figure("bits_per_dim", unit="bits"),
        "test, normflows' Glow": Figure("bits_per_dim", unit="bits"),
        "the former minus the latter": Figure("difference", at_most(0.0), "bits"),
        "rate of training over normflows'": Figure("ratio", at_least(1.0), "×"),
        "parameters": Figure("parameters", unit="M"),
        "parameters, normflows' Glow": Figure("parameters", unit="M"),
    },
)
def glow_cifar(workdir: Path) -> Measured:
    """Both with L = 3 levels of K = 4 steps, 64 features, LU, affine; normflows' otherwise with its defaults."""
    data = fit.dataset(workdir, "cifar", source="parquet", path=str(real_data("cifar10_jpeg")))
    torch.manual_seed(0)
    ours = Glow(Glow.Config.model_validate(SAME), data.spec).train()
    ours.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    peer = normflows(data.spec.shape, **SAME).train()
    stream = Stream(data.split("train"), seed=0)
    first = stream.at(0, 256)
    with torch.no_grad():
        ours.enter("model", iter([first]))
        _peer_nats(peer, first.x)

    learners = [
        _Learner(ours, lambda x: ours.loss(Batch(x), "model", Clock(0, 1)).value),
        _Learner(peer, lambda x: _peer_nats(peer, x).mean()),
    ]
    for step in range(STEPS):
        x = stream.at(step * BATCH, BATCH).x
        for learner in learners if step % 2 else reversed(learners):
            learner.step(x, step)
        if step % 100 == 0:
            print(f"  round {step} of {STEPS}: {[round(learner.bits, 3) for learner in learners]}", flush=True)

    with torch.no_grad():
        mine = _bits(data, lambda x: -ours.eval().log_prob(x))
        theirs = _bits(data, lambda x: _peer_nats(peer.eval(), x))
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (ours, peer)]
    return {
        "test": mine,
        "test, normflows' Glow": theirs,
        "the former minus the latter": mine - theirs,
        "rate of training over normflows'": learners[1].seconds / learners[0].seconds,
        "parameters": sizes[0],
        "parameters, normflows' Glow": sizes[1],
    }


class _Learner:
    """One model's steps, and the seconds they take."""

    def __init__(self, model: nn.Module, nats: Callable[[Tensor], Tensor]) -> None:
        self.nats, self.parameters = nats, list(model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, RATE, fused=True)
        self.seconds = self.bits = 0.0

    def step(self, x: Tensor, step: int) -> None:
        start = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.nats(x)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 100.0)
        self.optimizer.step()
        self.bits = loss.item() / (x[0].numel() * math.log(2))
        self.seconds += time.perf_counter() - start


def _peer_nats(peer: Any, x: Tensor) -> Tensor:
    """−log P(x) bounded by uniform noise, in nats of the integers."""
    scaled = (x + torch.rand(x.shape)) / 256 - 0.5
    return x[0].numel() * math.log(256) - peer.log_prob(scaled, None)


def _bits(data: Dataset, nats: Callable[[Tensor], Tensor], first: int = 2000, size: int = 250) -> float:
    def batches() -> Iterable[Tensor]:
        for i, batch in enumerate(fit.held_out(data, size)):
            if i * size == first:
                return
            yield batch.x

    torch.manual_seed(1)
    return torch.cat([nats(x).double() for x in batches()]).mean().item() / (data.spec.dims * math.log(2))
