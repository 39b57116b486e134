"""WaveNet on spoken digits: what a sample costs in bits, and whether what it says can be understood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_least, real_data, row
from dgm_core.data.batches import one_pass
from dgm_core.data.shards import Dataset
from dgm_core.evaluation import codes
from dgm_core.evaluation.judge import Judge, fit_judge
from dgm_core.models.autoregressive.wavenet import WaveNet

DIGITS = {"source": "parquet", "length": 2048, "short": "drop", "crops": "centre", "transform": "mu_law"}
DATA = "Spoken digits, 8 kHz, the middle 2,048 samples of each clip that has as many, 256 µ-law levels; 2,284 train, "
SAMPLES = 300
COOLER = 0.9
FIGURES = {
    "test": Figure("bits_per_dim", unit="bits a sample"),
    "entropy of the test split's histogram": Figure("entropy", unit="bits a sample"),
    "the latter minus the former": Figure("difference", at_least(1.5), "bits a sample"),
    "judge's accuracy on recordings (ceiling)": Figure("share", unit=""),
    "judge recognises the class of a sample": Figure("class_agreement", at_least(0.6), ""),
    f"the same at temperature {COOLER:g}": Figure("class_agreement", unit=""),
    "parameters": Figure("parameters", unit="M"),
}
ESTIMATOR = f"exact, of the test split; {SAMPLES} samples of equally many of each class, temperature 1"


@row(model="wavenet", data=f"{DATA}270 test", estimator=ESTIMATOR, minutes=15, figures=FIGURES)
def wavenet_digits(workdir: Path) -> Measured:
    """One stack whose dilations reach over a whole clip."""
    widths = {"channels": 64, "hidden": 64, "skip": 64, "head": 64, "condition": 16}
    adam = {"lr": 6e-3, "warmup": 100, "schedule": "cosine", "final": 0.02, "ema": 0.998}
    recipe = {"batch_size": 4, "steps": 5000, "precision": "bf16", "optimizers": {"model": adam}}
    return _digits(workdir, {"stacks": 1, "depth": 11, **widths}, recipe)


@row(
    model="wavenet",
    data=f"{DATA}270 test; a long run, for an accelerator",
    estimator=ESTIMATOR,
    minutes=60,
    figures=FIGURES,
)
def wavenet_digits_long(workdir: Path) -> Measured:
    """The paper's three stacks of ten layers."""
    widths = {"channels": 128, "hidden": 128, "skip": 128, "head": 256, "condition": 32}
    adam = {"lr": 1e-3, "warmup": 500, "schedule": "cosine", "final": 0.02, "ema": 0.999}
    recipe = {"batch_size": 16, "steps": 6000, "optimizers": {"model": adam}}
    return _digits(workdir, widths, recipe)


def _digits(workdir: Path, config: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, float]:
    data = fit.dataset(workdir, "digits", path=str(real_data("spoken_digits")), **DIGITS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge = fit_judge(
        data.spec, partial(one_pass, data.split("train"), 512), held_out=partial(fit.held_out, data), seed=0
    )
    model = fit.train("wavenet", data, config=config, recipe=recipe, device=device)
    assert isinstance(model, WaveNet)
    bits, x = _bits(model, data)
    entropy = codes.entropy(codes.histogram(x, data.spec.levels or 0)) / math.log(2)
    return {
        "test": bits,
        "entropy of the test split's histogram": entropy,
        "the latter minus the former": entropy - bits,
        "judge's accuracy on recordings (ceiling)": judge.accuracy or 0.0,
        "judge recognises the class of a sample": _recognised(model, judge, 1.0),
        f"the same at temperature {COOLER:g}": _recognised(model, judge, COOLER),
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
    }


@torch.no_grad()
def _bits(model: WaveNet, data: Dataset) -> tuple[float, Tensor]:
    """Bits a sample of the test split, and the split."""
    seen, nats = [], []
    for batch in fit.held_out(data, 30):
        on = batch.to(model.device)
        nats.append(-model.log_prob(on.x, on.y).double().cpu())
        seen.append(batch.x)
    return torch.cat(nats).mean().item() / (data.spec.dims * math.log(2)), torch.cat(seen)


def _recognised(model: WaveNet, judge: Judge, temperature: float) -> float:
    torch.manual_seed(0)
    y = torch.arange(SAMPLES) % model.data.classes
    drawn = torch.cat([model.sample(len(part), part, temperature=temperature).cpu() for part in y.split(SAMPLES // 2)])
    return (judge.classify(drawn) == y).double().mean().item()
