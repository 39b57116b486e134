"""GANs that grow, on images: how near their samples come to the data, beside the floor and a VAE's samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import fit
from benchmarks.rows import Bound, Figure, Measured, at_least, at_most, real_data, row
from dgm_core.contract import GenerativeModel
from dgm_core.data.batches import one_pass
from dgm_core.data.shards import Dataset
from dgm_core.evaluation import quality
from dgm_core.evaluation.judge import fit_judge

SAMPLES = 5000
ESTIMATOR = "Fréchet distance on the judge's features, 5,000 samples against the test split"
MNIST = "MNIST, 8 bits, padded to 32 × 32; 50,000 train, 10,000 test"
NET64 = "ten classes of Tiny ImageNet, 64 × 64, colour; 5,000 train, 500 test; a long run, for an accelerator"


def figures(accuracy: Bound | None) -> dict[str, Figure]:
    return {
        "judge's accuracy on originals": Figure("share", accuracy, ""),
        "Fréchet distance": Figure("frechet", unit=""),
        "Fréchet distance of a VAE's samples": Figure("frechet", unit=""),
        "the former over the latter": Figure("ratio", at_most(1.0), ""),
        "Fréchet distance of training images (floor)": Figure("frechet", unit=""),
    }


# Small networks and few images at 32 pixels: what two cores can do.
SMALL = {"latents": 64, "features": 64, "taper": 512, "growth": ((0.1, 0.2), (0.3, 0.4), (0.55, 0.65))}
ADAM = {"lr": 3e-3, "schedule": "linear", "final": 0.1}


@row(
    model="pro_gan",
    data=MNIST,
    estimator=f"{ESTIMATOR}; 64 channels, 16 at 32 pixels; 3,000 rounds of 32",
    minutes=15,
    figures=figures(at_least(0.97)),
)
def pro_gan_mnist(workdir: Path) -> Measured:
    players = {"critic": ADAM, "generator": {**ADAM, "ema": 0.995}}
    recipe = {"batch_size": 32, "steps": 3000, "optimizers": players}
    return _measure("pro_gan", _mnist(workdir), SMALL, recipe)


@row(
    model="stylegan",
    data=MNIST,
    estimator=f"{ESTIMATOR}, no truncation; 64 channels, 16 at 32 pixels; R1 every 8 rounds; 4,000 rounds of 32",
    minutes=15,
    figures=figures(at_least(0.97)),
)
def stylegan_mnist(workdir: Path) -> Measured:
    config = {**SMALL, "mapping": 4, "penalty": 1.0, "penalty_every": 8}
    players = {"discriminator": ADAM, "generator": {**ADAM, "ema": 0.995}}
    recipe = {"batch_size": 32, "steps": 4000, "optimizers": players}
    return _measure("stylegan", _mnist(workdir), config, recipe)


@row(
    model="pro_gan",
    data=NET64,
    estimator=f"{ESTIMATOR}; 256 channels, 128 at 64 pixels; 100,000 rounds of 16, mirrored images",
    minutes=600,
    figures=figures(None),
)
def pro_gan_imagenet64(workdir: Path) -> Measured:
    growth = ((0.08, 0.16), (0.24, 0.32), (0.4, 0.48), (0.56, 0.64))
    config = {"features": 256, "taper": 8192, "growth": growth}
    recipe = {"batch_size": 16, "steps": 100_000, "augment": ("hflip",)}
    return _measure("pro_gan", _net64(workdir), config, recipe)


@row(
    model="stylegan",
    data=NET64,
    estimator=f"{ESTIMATOR}, no truncation; 256 channels, 128 at 64 pixels; 100,000 rounds of 32, mirrored images",
    minutes=600,
    figures=figures(None),
)
def stylegan_imagenet64(workdir: Path) -> Measured:
    config = {"features": 256, "taper": 8192, "growth": ((0.1, 0.2), (0.3, 0.4), (0.5, 0.6))}
    recipe = {"batch_size": 32, "steps": 100_000, "augment": ("hflip",)}
    return _measure("stylegan", _net64(workdir), config, recipe)


def _measure(name: str, data: Dataset, config: Mapping[str, Any], recipe: Mapping[str, Any]) -> Measured:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge = fit_judge(
        data.spec, lambda: one_pass(data.split("train"), 1000), held_out=lambda: fit.held_out(data), seed=0
    )
    model = fit.train(name, data, config=config, recipe=recipe, device=device)
    vae = fit.train("vae", data, recipe={"steps": 3000}, device=device)
    test = judge.features(torch.cat([batch.x for batch in fit.held_out(data)]))
    train = judge.features(next(one_pass(data.split("train"), SAMPLES)).x)
    ours, theirs = (quality.frechet(judge.features(_samples(m)), test) for m in (model, vae))
    return {
        "judge's accuracy on originals": judge.accuracy or 0.0,
        "Fréchet distance": ours,
        "Fréchet distance of a VAE's samples": theirs,
        "the former over the latter": ours / theirs,
        "Fréchet distance of training images (floor)": quality.frechet(train, test),
    }


@torch.no_grad()
def _samples(model: GenerativeModel) -> Tensor:
    torch.manual_seed(1)
    return torch.cat([model.sample(500).cpu() for _ in range(SAMPLES // 500)])


def _mnist(workdir: Path) -> Dataset:
    pad = {"name": "pad", "to": 32}
    return fit.dataset(workdir, "mnist", source="idx", path=str(real_data("mnist")), val=10_000, transform=pad)


def _net64(workdir: Path) -> Dataset:
    return fit.dataset(workdir, "net64", source="parquet", path=str(real_data("tiny_imagenet10")), channels=3)
