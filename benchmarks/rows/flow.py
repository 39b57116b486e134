"""Flows on densities whose entropy is known: the entropy is the best that any model can reach."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_most, row
from dgm_core.models.flow.real_nvp import RealNVP


@row(
    model="real_nvp",
    data="density eight_gaussians (FFJORD's: radius 4, sd 0.5, divided by 1.414); entropy 2.831 nats",
    estimator="exact negative log-likelihood of the test split",
    minutes=5,
    figures={"test": Figure("nll_nats", at_most(2.91), published="2.831", source="the entropy, by quadrature")},
)
def real_nvp_8gaussians(workdir: Path) -> Measured:
    data = fit.dataset(workdir, "eight_gaussians", source="density", density="eight_gaussians")
    model = fit.train("real_nvp", data)
    assert isinstance(model, RealNVP)
    with torch.no_grad():
        nll = torch.cat([-model.log_prob(batch.x).double() for batch in fit.held_out(data)])
    return {"test": nll.mean().item()}
