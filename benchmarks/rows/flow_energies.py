"""Flows fitted by reverse KL to Rezende and Mohamed's energies, whose log Z is known: how far the bound stays below."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import fit
from benchmarks.rows import Bound, Figure, Measured, at_most, row
from dgm_core.data import densities
from dgm_core.evaluation.energies import energy_metrics

DRAWS = 200_000
SEEDS = (0, 1, 2)
SECONDS = 120  # a fit, on two idle cores
GAPS = {"u1": 0.05, "u2": 0.05, "u3": 0.15, "u4": 0.05}  # nats, of the bound that a planar flow reaches


def _measure(model: str, energy: str, workdir: Path) -> Measured:
    """Worst of the seeds; the examples are never looked at."""
    data = fit.dataset(workdir, energy, source="density", density=energy, train=2000, val=2, test=2)
    truth, found = densities.named(energy).log_z(), []
    for seed in SEEDS:
        started = time.perf_counter()
        fitted = fit.train(model, data, seed=seed)
        seconds = time.perf_counter() - started
        torch.manual_seed(seed)
        values = {name: m.value for name, m in energy_metrics(fitted, data.spec, DRAWS).items()}
        found.append({**{name: float("nan") if v is None else v for name, v in values.items()}, "seconds": seconds})
    return {
        "gap of the bound": max(f["reverse_kl_nats"] for f in found),
        "importance-sampled log Z, from the truth": max(abs(f["log_z_is_nats"] - truth) for f in found),
        "effective sample size": min(f["effective_sample_size"] for f in found),
        "a fit": max(f["seconds"] for f in found),
    }


def _figures(bounds: Mapping[str, Bound], energy: str) -> dict[str, Figure]:
    truth = f"log Z = {densities.named(energy).log_z():.3f}"
    return {
        "gap of the bound": Figure("reverse_kl_nats", bounds.get("gap"), published="0", source=truth),
        "importance-sampled log Z, from the truth": Figure("|log_z_is_nats − log Z|", bounds.get("log_z")),
        "effective sample size": Figure("effective_sample_size", bounds.get("share"), unit="share of the draws"),
        "a fit": Figure("seconds", bounds.get("seconds"), unit="s"),
    }


def _declare(model: str, energy: str, bounds: Mapping[str, Bound]) -> None:
    def run(workdir: Path) -> Measured:
        return _measure(model, energy, workdir)

    run.__name__ = f"{model}_{energy}"
    box = "" if energy == "u1" else ", with a soft wall at |z₁| = 4"
    row(
        model=model,
        data=f"energy {energy.upper()} of Rezende & Mohamed 2015{box}",
        estimator=f"KL(q ‖ p) and importance sampling by {DRAWS:,} draws of the model; the worst of {len(SEEDS)} seeds",
        minutes=len(SEEDS) * SECONDS / 60,
        figures=_figures(bounds, energy),
        seeds=SEEDS,
    )(run)


for _energy, _gap in GAPS.items():
    _bounds = {"gap": at_most(_gap), "log_z": at_most(0.03), "seconds": at_most(SECONDS)}
    _declare("planar_flow", _energy, _bounds)
    _declare("radial_flow", _energy, {})
