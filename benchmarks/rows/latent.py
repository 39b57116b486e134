"""Autoencoders on MNIST: the VAE's bound, and a VQ-VAE-2 with its priors from images to joint samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_least, at_most, real_data, row
from dgm_core import runs
from dgm_core.capabilities import HasLikelihood
from dgm_core.config import Recipe
from dgm_core.contract import GenerativeModel
from dgm_core.data.batches import one_pass
from dgm_core.data.shards import Dataset, open_dataset
from dgm_core.evaluation import codes, quality
from dgm_core.evaluation.judge import Judge, fit_judge
from dgm_core.models.latent.vae import VAE
from dgm_core.models.latent.vq_vae2 import VQVAE2
from dgm_core.models.two_stage import TwoStage
from pipelines.encode import encode_all
from pipelines.params import Cluster
from pipelines.place import Place

EPOCH = 500  # batches of 100 in 50,000 examples


@row(
    model="vae",
    data="MNIST, binarised anew every epoch; 50,000 train, 10,000 test (one fixed draw)",
    estimator="ELBO of the test split, one sample an example; 10 epochs; IS-100 on its first 1,000",
    minutes=15,
    figures={
        "−ELBO": Figure("nats", at_most(105.0), published="about 100 after 10⁸ examples", source="the paper's curves"),
        "−log p, importance-weighted": Figure("nll_is100_nats"),
    },
)
def vae_mnist(workdir: Path) -> Measured:
    data = _mnist(workdir, "dynamic")
    model = fit.train("vae", data, recipe={"steps": 10 * EPOCH})
    assert isinstance(model, VAE)
    with torch.no_grad():
        bound = torch.cat([model.log_prob(batch.x).double() for batch in fit.held_out(data)])
        first = next(fit.held_out(data, 1000)).x
        weighted = torch.cat([model.log_prob(x, samples=100).double() for x in first.split(100)])
    return {"−ELBO": -bound.mean().item(), "−log p, importance-weighted": -weighted.mean().item()}


VQ = {"codes": 128, "code_features": 16, "hidden": 64, "residual": 32}
PRIOR = {"channels": 64, "hidden": 64, "blocks": 2, "depth": 2, "kernel": 3, "heads": 4, "context_depth": 2}


@row(
    model="vq_vae2",
    data="MNIST, 8 bits, padded to 32 × 32; 50,000 train, 10,000 test",
    estimator="test split; Fréchet distance on the judge's features, 5,000 samples against 10,000 test images",
    minutes=15,
    figures={
        "codes of the top level in use": Figure("share", at_least(0.9), ""),
        "codes of the bottom level in use": Figure("share", at_least(0.9), ""),
        "perplexity of the top level over K": Figure("share", at_least(1 / 3), ""),
        "perplexity of the bottom level over K": Figure("share", at_least(1 / 3), ""),
        "judge's accuracy on originals": Figure("share", at_least(0.97), ""),
        "judge agrees with the label on reconstructions": Figure("share", at_least(0.95), ""),
        "top prior, bits a code over the histogram's entropy": Figure("ratio", at_most(0.75), ""),
        "bottom prior, bits a code over the histogram's entropy": Figure("ratio", at_most(0.75), ""),
        "Fréchet distance of joint samples": Figure("frechet", unit=""),
        "Fréchet distance of the marginals' samples": Figure("frechet", unit=""),
        "the former over the latter": Figure("ratio", at_most(1 / 3), ""),
        "Fréchet distance of training images (floor)": Figure("frechet", unit=""),
    },
)
def vq_vae2_mnist(workdir: Path) -> Measured:
    data = _mnist(workdir, {"name": "pad", "to": 32})
    judge = fit_judge(
        data.spec, lambda: one_pass(data.split("train"), 1000), held_out=lambda: fit.held_out(data), seed=0
    )
    adam = {"model": {"lr": 1e-3, "schedule": "cosine", "final": 0.1}}
    model = fit.train("vq_vae2", data, config=VQ, recipe={"steps": 3000, "batch_size": 64, "optimizers": adam})
    assert isinstance(model, VQVAE2)
    measured = _codebooks(model, data, judge)

    with runs.replaced_folder(workdir / "vqvae") as folder:
        runs.save_run(folder, "vq_vae2", model, Recipe(steps=1), model.state_dict(), {})
    here, codes = Cluster(workers=0), workdir / "codes"
    encode_all(workdir / "vqvae", data.path, codes, here, Place(None), workdir / "parts")
    priors = {level: _prior(workdir / "codes" / level, measured, level) for level in ("top", "bottom")}

    with torch.no_grad():
        joint = torch.cat([TwoStage(model, priors).eval().sample(500) for _ in range(10)])
        marginal = torch.cat([model.sample(500) for _ in range(10)])
    test = judge.features(torch.cat([b.x for b in fit.held_out(data)]))
    train = judge.features(next(one_pass(data.split("train"), 5000)).x)
    a, b = (quality.frechet(judge.features(x), test) for x in (joint, marginal))
    return measured | {
        "Fréchet distance of joint samples": a,
        "Fréchet distance of the marginals' samples": b,
        "the former over the latter": a / b,
        "Fréchet distance of training images (floor)": quality.frechet(train, test),
    }


def _mnist(workdir: Path, transform: Any) -> Dataset:
    return fit.dataset(workdir, "mnist", source="idx", path=str(real_data("mnist")), val=10_000, transform=transform)


def _codebooks(model: VQVAE2, data: Dataset, judge: Judge) -> dict[str, float]:
    found: dict[str, list[Tensor]] = {"top": [], "bottom": []}
    agree: list[Tensor] = []
    with torch.no_grad():
        for batch in fit.held_out(data):
            levels = model.codes(batch.x)
            for level, kept in found.items():
                kept.append(levels[level])
            again = model.decode_codes(levels).round().to(data.spec.dtype)
            agree.append(judge.classify(again) == batch.y)
    K = model.config.codes
    measured: dict[str, float] = {}
    for level, kept in found.items():
        counts = codes.histogram(torch.cat(kept), K)
        measured[f"codes of the {level} level in use"] = codes.usage(counts)
        measured[f"perplexity of the {level} level over K"] = codes.perplexity(counts) / K
    measured["judge's accuracy on originals"] = judge.accuracy or 0.0
    measured["judge agrees with the label on reconstructions"] = torch.cat(agree).double().mean().item()
    return measured


def _prior(path: Path, measured: dict[str, float], level: str) -> GenerativeModel:
    data = open_dataset(path)
    top = level == "top"
    shape: Mapping[str, Any] = {**PRIOR, "attention": top, "output_depth": 1 if top else 0, "dropout": 0.1}
    adam = {"model": {"lr": 2e-3, "schedule": "cosine", "clip_norm": 1.0}}
    recipe = {"steps": 1200 if top else 800, "batch_size": 128, "optimizers": adam}
    model = fit.train("pixel_snail", data, config=shape, recipe=recipe)
    assert isinstance(model, HasLikelihood)
    nats, kept = [], []
    with torch.no_grad():
        for batch in fit.held_out(data):
            nats.append(-model.log_prob(batch.x, batch.y, batch.context).double())
            kept.append(batch.x)
    counts = codes.histogram(torch.cat(kept), data.spec.levels or 0)
    a_code = torch.cat(nats).mean().item() / data.spec.dims
    measured[f"{level} prior, bits a code over the histogram's entropy"] = a_code / codes.entropy(counts)
    return model
