"""GANs on mixtures whose modes are known: are they found, and do samples lie on them?"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_least, row
from dgm_core.evaluation import quality


@row(
    model="wgan_gp",
    data="density ring: 8 Gaussians of sd 0.02 on a circle of radius 2",
    estimator="10,000 samples; a sample is good within 3 sd of a mode; λ = 0.1, as in the paper's toys",
    minutes=3,
    figures={
        "share of good samples": Figure("share", at_least(0.9), "", "98.9 %", "a perfect model"),
        "poorest mode, of its fair share": Figure("share", at_least(0.2), ""),
        "modes found, of 8": Figure("modes", at_least(8), ""),
    },
)
def wgan_gp_ring(workdir: Path) -> Measured:
    data = fit.dataset(workdir, "ring", source="density", density="ring", radius=2.0, sd=0.02)
    model = fit.train("wgan_gp", data)
    torch.manual_seed(1)
    with torch.no_grad():
        samples = model.sample(10_000)
    known = data.info["density"]
    found = quality.modes(samples, torch.tensor(known["modes"]), known["sd"])
    return {
        "share of good samples": found["good_samples"],
        "poorest mode, of its fair share": found["least_mode_share"],
        "modes found, of 8": found["modes_found"],
    }
