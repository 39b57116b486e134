"""GANs side by side on the ring of 8 and the grid of 25 Gaussians: the modes that they find, and how good samples are.

One row a data set, with every model in it, so that the literature's order can be read off it: plain GAN worst.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import fit
from benchmarks.rows import Bound, Figure, Measured, at_least, at_most, row
from dgm_core.data.shards import Dataset
from dgm_core.evaluation import quality

MODELS = ("gan", "improved_gan", "wgan", "wgan_gp", "gmmn")
SEEDS = (0, 1, 2)
MINUTES = 3.0  # a run
BUDGET = MINUTES * len(MODELS) * len(SEEDS)
ESTIMATOR = (
    f"{', '.join(MODELS)}, each with its own defaults for vectors; 10,000 samples; a sample is good within 3 sd of a "
    "mode, a mode is found if it has 20 % of its fair share of good samples"
)
VEEGAN = "A. Srivastava et al., 2017, arXiv:1705.07761, table 1: other networks"


def _figures(published: tuple[str, str], modes: Bound, good: Bound) -> dict[str, Figure]:
    """Of every model its modes and its share of good samples, a value a seed; then what must hold, and the order."""
    figures = {
        "gan: modes found": Figure("modes", None, "", published[0], VEEGAN),
        "gan: share of good samples": Figure("share", None, "", published[1], VEEGAN),
    }
    for model in MODELS[1:]:
        figures[f"{model}: modes found"] = Figure("modes", None, "")
        figures[f"{model}: share of good samples"] = Figure("share", None, "")
    figures["wgan_gp: modes found, worst seed"] = Figure("modes", modes, "")
    figures["wgan_gp: share of good samples, worst seed"] = Figure("share", good, "")
    order = "4: the literature's order, plain GAN worst"
    figures["models better than gan, of 4: more modes, or as many and better samples"] = Figure(
        "models", None, "", order
    )
    figures["longest run"] = Figure("minutes", at_most(MINUTES), "min")
    return figures


@row(
    model="gan",
    data="density ring: 8 Gaussians of sd 0.02 on a circle of radius 2",
    estimator=ESTIMATOR,
    minutes=BUDGET,
    figures=_figures(("1", "99.3 %"), at_least(8), at_least(0.9)),
    seeds=SEEDS,
)
def toys_ring(workdir: Path) -> Measured:
    return _measure(fit.dataset(workdir, "ring", source="density", density="ring", radius=2.0, sd=0.02))


@row(
    model="gan",
    data="density grid: 5 × 5 Gaussians of sd 0.05, 2 apart",
    estimator=ESTIMATOR,
    minutes=BUDGET,
    figures=_figures(("3.3", "0.5 %"), at_least(23), at_least(0.6)),
    seeds=SEEDS,
)
def toys_grid(workdir: Path) -> Measured:
    return _measure(fit.dataset(workdir, "grid", source="density", density="grid", side=5, spacing=2.0, sd=0.05))


def _measure(data: Dataset) -> Measured:
    found: dict[str, list[Mapping[str, float]]] = {model: [] for model in MODELS}
    longest = 0.0
    for model in MODELS:
        for seed in SEEDS:
            start = time.monotonic()
            found[model].append(_modes(model, data, seed))
            longest = max(longest, (time.monotonic() - start) / 60)
            print(f"  {model}, seed {seed}: {found[model][-1]}", flush=True)
    measured: dict[str, float | Sequence[float]] = {}
    for model, runs in found.items():
        measured[f"{model}: modes found"] = [run["modes_found"] for run in runs]
        measured[f"{model}: share of good samples"] = [run["good_samples"] for run in runs]
    measured["wgan_gp: modes found, worst seed"] = min(run["modes_found"] for run in found["wgan_gp"])
    measured["wgan_gp: share of good samples, worst seed"] = min(run["good_samples"] for run in found["wgan_gp"])
    better = sum(_merit(found[model]) > _merit(found["gan"]) for model in MODELS[1:])
    measured["models better than gan, of 4: more modes, or as many and better samples"] = float(better)
    measured["longest run"] = longest
    return measured


def _modes(model: str, data: Dataset, seed: int) -> Mapping[str, float]:
    fitted = fit.train(model, data, seed=seed)
    torch.manual_seed(1)
    with torch.no_grad():
        samples = fitted.sample(10_000)
    known = data.info["density"]
    return quality.modes(samples, torch.tensor(known["modes"]), known["sd"])


def _merit(runs: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """By which models are ordered: modes found, then the share of good samples, over the seeds together."""
    return sum(run["modes_found"] for run in runs), sum(run["good_samples"] for run in runs)
