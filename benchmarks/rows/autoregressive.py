"""Models of pixels on MNIST, binarised anew every epoch: MADE, and small pixel models side by side at equal epochs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import fit
from benchmarks.rows import Bound, Figure, Measured, at_most, real_data, row
from dgm_core.capabilities import HasLikelihood

EPOCH = 500  # batches of 100 in 50,000 examples
DATA = "MNIST, binarised anew every epoch; 50,000 train, 10,000 test (one fixed draw)"
EXACT = "exact, of the test split"
ADAM = {"algorithm": "adam", "schedule": "cosine", "final": 0.01, "ema": 0.999}


def _figures(bound: Bound, published: str = "", source: str = "") -> dict[str, Figure]:
    return {
        "test": Figure("nll_nats", bound, published=published, source=source),
        "parameters": Figure("parameters", unit="M"),
    }


MADE = "84.9", "a public implementation, 85 epochs"


@row(model="made", data=DATA, estimator=f"{EXACT}; 1 × 8000 units", minutes=10, figures=_figures(at_most(86.0), *MADE))
def made_mnist(workdir: Path) -> Measured:
    return _fitted(workdir, "made", {}, {"lr": 1e-3}, epochs=8)


@row(
    model="made",
    data=f"{DATA}; a long run, for an accelerator",
    estimator=f"{EXACT}; 1 × 8000 units",
    minutes=60,
    figures=_figures(at_most(84.0), *MADE),
)
def made_mnist_long(workdir: Path) -> Measured:
    return _fitted(workdir, "made", {}, {"lr": 1e-3}, epochs=85)


SMALL = f"{EXACT}; at most 50,000 parameters, 10 epochs"


@row(model="pixel_cnn", data=DATA, estimator=SMALL, minutes=45, figures=_figures(at_most(89.5)))
def pixel_cnn_mnist(workdir: Path) -> Measured:
    return _fitted(workdir, "pixel_cnn", {"hidden": 16, "depth": 12, "head": 32}, {"lr": 4e-3}, epochs=10)


@row(model="gated_pixel_cnn", data=DATA, estimator=SMALL, minutes=45, figures=_figures(at_most(89.5)))
def gated_pixel_cnn_mnist(workdir: Path) -> Measured:
    config = {"channels": 16, "depth": 9, "kernel": 3, "head": 32, "conditional": False}
    return _fitted(workdir, "gated_pixel_cnn", config, {"lr": 4e-3}, epochs=10)


@row(model="row_lstm", data=DATA, estimator=SMALL, minutes=45, figures=_figures(at_most(89.5)))
def row_lstm_mnist(workdir: Path) -> Measured:
    return _fitted(workdir, "row_lstm", {"hidden": 16, "depth": 5}, {"lr": 4e-3}, epochs=10)


@row(model="diagonal_bilstm", data=DATA, estimator=SMALL, minutes=45, figures=_figures(at_most(86.0)))
def diagonal_bilstm_mnist(workdir: Path) -> Measured:
    return _fitted(workdir, "diagonal_bilstm", {"hidden": 32, "depth": 1}, {"lr": 4e-3}, epochs=10)


@row(model="pixel_snail", data=DATA, estimator=SMALL, minutes=45, figures=_figures(at_most(89.5)))
def pixel_snail_mnist(workdir: Path) -> Measured:
    config = {
        "channels": 16, "hidden": 24, "blocks": 2, "depth": 2, "kernel": 3, "heads": 2, "output_depth": 0,
        "dropout": 0.0, "conditional": False,
    }  # fmt: skip
    return _fitted(workdir, "pixel_snail", config, {"lr": 4e-3}, epochs=10)


def _fitted(
    workdir: Path, name: str, config: Mapping[str, Any], optimizer: Mapping[str, Any], epochs: int
) -> dict[str, float]:
    data = fit.dataset(workdir, "mnist", source="idx", path=str(real_data("mnist")), val=10_000, transform="dynamic")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = {"batch_size": 100, "steps": epochs * EPOCH, "optimizers": {"model": {**ADAM, **optimizer}}}
    model = fit.train(name, data, config=config, recipe=recipe, device=device)
    assert isinstance(model, HasLikelihood)
    with torch.no_grad():
        parts = [-model.log_prob(batch.x.to(device)).double().cpu() for batch in fit.held_out(data, 500)]
    return {
        "test": torch.cat(parts).mean().item(),
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
    }
