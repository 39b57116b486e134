"""Sigmoid belief nets: on MNIST by each way of learning a recognition net, and small ones whose log p is exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_least, at_most, real_data, row
from dgm_core.contract import GenerativeModel
from dgm_core.data.shards import Dataset
from dgm_core.models.belief.base import BeliefNet

EPOCH = 500  # batches of 100 in 50,000 examples
SAMPLES = 500  # K of the importance-sampled likelihood
DATA = "MNIST, binarised once (an own draw, not Salakhutdinov & Murray's); 50,000 train, 10,000 test"
CONCRETE = "Maddison et al. 2017"
RWS = "Bornschein & Bengio 2015"

# Way of learning -> model, configuration, epochs: about as many as twenty minutes hold.
WAYS: Mapping[str, tuple[str, Mapping[str, Any], int]] = {
    "nvil": ("nvil", {}, 250),
    "vimco, 5 draws": ("nvil", {"objective": "vimco", "samples": 5}, 120),
    "reweighted wake–sleep, 5 draws": (
        "helmholtz",
        {"objective": "rws", "samples": 5, "recognition_turn": "both"},
        100,
    ),
    "wake–sleep": ("helmholtz", {}, 250),
}
ESTIMATOR = (
    f"importance sampling of the test split with K = {SAMPLES} draws of the recognition net; each net up to twenty "
    f"minutes: {', '.join(f'{way} {epochs} epochs' for way, (_, _, epochs) in WAYS.items())}"
)


def _figures(published: Mapping[str, tuple[str, str]]) -> dict[str, Figure]:
    found = {way: Figure(f"nll_is{SAMPLES}_nats", published=p, source=s) for way, (p, s) in published.items()}
    return {**found, "how much worse wake–sleep is than the worst other": Figure("nats", at_least(0.0))}


def _measure(workdir: Path, hidden: tuple[int, ...]) -> Measured:
    data = fit.dataset(workdir, "mnist", source="idx", path=str(real_data("mnist")), transform="static")
    found = {way: _fitted(data, name, {"hidden": hidden, **config}, n) for way, (name, config, n) in WAYS.items()}
    worst = max(value for way, value in found.items() if way != "wake–sleep")
    return {**found, "how much worse wake–sleep is than the worst other": found["wake–sleep"] - worst}


def _fitted(data: Dataset, name: str, config: Mapping[str, Any], epochs: int) -> float:
    model = fit.train(name, data, config=config, recipe={"batch_size": 100, "steps": epochs * EPOCH})
    return _nll(model, data, SAMPLES)


def _nll(model: GenerativeModel, data: Dataset, samples: int) -> float:
    assert isinstance(model, BeliefNet)
    parts = [model.log_prob(batch.x, samples=samples).double() for batch in fit.held_out(data, 100)]
    return -torch.cat(parts).mean().item()


@row(
    model="nvil",
    data=DATA,
    estimator=f"200 hidden units; {ESTIMATOR}",
    minutes=80,
    figures=_figures(
        {
            "nvil": ("104.4", CONCRETE),
            "vimco, 5 draws": ("101.9", CONCRETE),
            "reweighted wake–sleep, 5 draws": ("103.1", RWS),
            "wake–sleep": ("116.3", RWS),
        }
    ),
)
def belief_mnist_200(workdir: Path) -> Measured:
    return _measure(workdir, (200,))


@row(
    model="helmholtz",
    data=DATA,
    estimator=f"200–200 hidden units; {ESTIMATOR}",
    minutes=80,
    figures=_figures(
        {
            "wake–sleep": ("106.9", RWS),
            "reweighted wake–sleep, 5 draws": ("93.4", RWS),
            "nvil": ("92.9", CONCRETE),
            "vimco, 5 draws": ("91.7", CONCRETE),
        }
    ),
)
def belief_mnist_200_200(workdir: Path) -> Measured:
    return _measure(workdir, (200, 200))


@row(
    model="sbn",
    data="scikit-learn's digits, 8 × 8, thresholded at ½; test split of a seeded carve-out",
    estimator="exact, by enumeration; 8 and 8–8 hidden units, 50 epochs of Gibbs learning or of mean-field EM",
    minutes=15,
    figures={
        "Gibbs, 8 units": Figure("nll_nats", at_most(20.5)),
        "Gibbs, 8–8 units": Figure("nll_nats", at_most(20.5)),
        "mean field, 8 units": Figure("nll_nats", at_most(20.8)),
        "mean field, 8–8 units": Figure("nll_nats"),
    },
)
def sbn_digits(workdir: Path) -> Measured:
    data = fit.dataset(workdir, "digits", source="digits", size=8, transform="threshold")
    found = {}
    for way, inference in (("Gibbs", "gibbs"), ("mean field", "mean_field")):
        for hidden in ((8,), (8, 8)):
            config = {"hidden": hidden, "inference": inference}
            steps = 50 * (len(data.split("train")) // 50)
            model = fit.train("sbn", data, config=config, recipe={"batch_size": 50, "steps": steps})
            found[f"{way}, {'–'.join(map(str, hidden))} units"] = _nll(model, data, 1)
    return found
