"""Predictability minimisation on data whose independent factors are known: does the code become factorial?"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_least, at_most, row
from dgm_core.data.batches import one_pass
from dgm_core.data.shards import Dataset
from dgm_core.models.adversarial.predictability import Predictability

FACTORS, MIXTURES, EXAMPLES, NOISE = 4, 8, 20_000, 0.05
SEEDS = (0, 1, 2)
NETWORKS = {"codes": FACTORS, "hidden": 16, "predictor_hidden": 8}


@row(
    model="predictability",
    data=f"{MIXTURES} linear mixtures of {FACTORS} independent fair bits (columns of length 1), noise of sd {NOISE:g}",
    estimator="units read as on or off at ½, plug-in estimates on the test split, worst of the seeds; without the "
    "game, units have the largest variance (V) instead, best of the seeds",
    minutes=5,
    figures={
        "largest mutual information of two units": Figure("mutual_information", at_most(0.02), "nats"),
        "total correlation": Figure("total_correlation", at_most(0.02), "nats"),
        "entropy of the code, of the factors'": Figure("share", at_least(0.95), ""),
        "largest mutual information, without the game": Figure("mutual_information", at_least(0.1), "nats"),
        "total correlation, without the game": Figure("total_correlation", None, "nats"),
    },
    seeds=SEEDS,
)
def predictability_factors(workdir: Path) -> Measured:
    game, without = [], []
    for seed in SEEDS:
        data = _mixed(workdir / str(seed), seed)
        game.append(_code(data, seed, {}))
        without.append(_code(data, seed, {"conditioned_variance": 0.0, "variance": 1.0}))
    return {
        "largest mutual information of two units": max(code[0] for code in game),
        "total correlation": max(code[1] for code in game),
        "entropy of the code, of the factors'": min(code[2] for code in game) / (FACTORS * math.log(2)),
        "largest mutual information, without the game": min(code[0] for code in without),
        "total correlation, without the game": min(code[1] for code in without),
    }


def _mixed(folder: Path, seed: int) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ways = rng.standard_normal((FACTORS, MIXTURES))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    bits = rng.integers(0, 2, (EXAMPLES, FACTORS))
    x = (2 * bits - 1) @ ways + NOISE * rng.standard_normal((EXAMPLES, MIXTURES))
    np.savez(folder / "mixed.npz", x=x.astype(np.float32))
    return fit.dataset(folder, "mixed", source="npz", path=str(folder / "mixed.npz"), kind="vector")


def _code(data: Dataset, seed: int, terms: dict[str, float]) -> tuple[float, float, float]:
    """Largest mutual information of two units, total correlation, entropy of the whole code."""
    units = {"lr": 5e-3}
    recipe = {"steps": 800, "optimizers": {"units": units, "decoder": units, "predictors": {"lr": 2e-2}}}
    model = fit.train("predictability", data, config={**NETWORKS, **terms}, recipe=recipe, seed=seed)
    assert isinstance(model, Predictability)
    found = model.measures(torch.cat([batch.x for batch in one_pass(data.split("test"), 1000)]))
    between = found["pairwise_information"]
    total = found["total_correlation"].item()
    return (between - between.diag().diag()).max().item(), total, found["entropy"].sum().item() - total
