"""A small RBM, whose likelihood is exact, against the published runs with and without centring."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_least, real_data, row
from dgm_core.capabilities import HasLikelihood
from dgm_core.contract import GenerativeModel

EPOCH = 600  # batches of 100 in 60,000 examples
PYDEEP = "PyDeep's documentation"


@row(
    model="rbm",
    data="MNIST, thresholded at ½; 60,000 train (one of them set aside, as val), 10,000 test",
    estimator="exact log-likelihood of the test split, mean of epochs 46 to 50; 16 hidden units, PCD-1, 100 chains",
    minutes=15,
    figures={
        "centred": Figure("log_likelihood_nats", at_least(-144.5), published="−142.6", source=PYDEEP),
        "not centred": Figure("log_likelihood_nats", at_least(-150.0), published="−149.1", source=PYDEEP),
    },
)
def rbm_mnist(workdir: Path) -> Measured:
    data = fit.dataset(workdir, "mnist", source="idx", path=str(real_data("mnist")), val=1, transform="threshold")
    test = torch.cat([batch.x for batch in fit.held_out(data)])

    def fitted(centred: bool) -> float:
        values: list[float] = []

        def exact(model: GenerativeModel) -> Mapping[str, float]:
            assert isinstance(model, HasLikelihood)
            values.append(model.log_prob(test).double().mean().item())
            return {"val/log_likelihood": values[-1]}

        fit.train(
            "rbm", data, config={"hidden": 16, "centred": centred},
            recipe={"steps": 50 * EPOCH, "evaluate_every": EPOCH}, evaluate=exact,
        )  # fmt: skip
        return statistics.fmean(values[45:50])

    return {"centred": fitted(True), "not centred": fitted(False)}
