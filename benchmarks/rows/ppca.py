"""Probabilistic PCA has one right answer: scikit-learn's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_most, real_data, row, within
from dgm_core.models.latent.ppca import PPCA


@row(
    model="ppca",
    data="MNIST, logit with λ = 1e-6; 50,000 train, 10,000 test",
    estimator="exact log-likelihood of the test split, q = 10, closed form",
    minutes=15,
    figures={
        "test log-likelihood": Figure("log_likelihood_nats", within(-1744.0, 0.5)),
        "scikit-learn's PCA.score": Figure("log_likelihood_nats"),
        "distance to it": Figure("nats", at_most(0.05)),
    },
)
def ppca_logit_mnist(workdir: Path) -> Measured:
    data = fit.dataset(
        workdir, "mnist", source="idx", path=str(real_data("mnist")), transform={"name": "logit", "lam": 1e-6}
    )
    model = fit.train("ppca", data, config={"latents": 10})
    assert isinstance(model, PPCA)
    with torch.no_grad():
        ours = torch.cat([model.log_prob(batch.x).double() for batch in fit.held_out(data)]).mean().item()
    train, test = (
        data.split(name).rows(np.arange(len(data.split(name)))).x.flatten(1).double().numpy()
        for name in ("train", "test")
    )
    theirs = float(PCA(n_components=10, svd_solver="covariance_eigh").fit(train).score(test))
    return {
        "test log-likelihood": ours,
        "scikit-learn's PCA.score": theirs,
        "distance to it": abs(ours - theirs),
    }
