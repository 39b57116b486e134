"""A small RBM, whose likelihood is exact, beside published runs with and without centring; deep nets by the bound."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_least, real_data, row
from dgm_core.capabilities import HasEnergy, HasLikelihood
from dgm_core.contract import GenerativeModel
from dgm_core.data.shards import Dataset
from dgm_core.evaluation import ais

EPOCH = 600  # batches of 100 in 60,000 examples
PYDEEP = "PyDeep's documentation"
DEEP_EPOCH = 500  # batches of 100 in 50,000 examples
STATIC = "MNIST, binarised once (an own draw, not Salakhutdinov & Murray's); 50,000 train, 10,000 test"
MURRAY = "Salakhutdinov & Murray 2008"
CD = {1: "125.53", 3: "105.50", 25: "86.34"}  # k -> nats a test example
CD_EPOCHS = 20


@row(
    model="rbm",
    data="MNIST, thresholded at ½; 60,000 train (one of them set aside, as val), 10,000 test",
    estimator="exact log-likelihood of the test split, mean of epochs 46 to 50; 16 hidden units, PCD-1, 100 chains",
    minutes=15,
    figures={
        "centred": Figure("log_likelihood_nats", at_least(-144.5), published="−142.6", source=PYDEEP),
        "not centred": Figure("log_likelihood_nats", at_least(-150.0), published="−149.1", source=PYDEEP),
        "the former over the latter": Figure("nats", at_least(2.0), published="6.5", source=PYDEEP),
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

    with_offsets, without = fitted(True), fitted(False)
    return {"centred": with_offsets, "not centred": without, "the former over the latter": with_offsets - without}


@row(
    model="rbm",
    data=STATIC,
    estimator=(
        "free energy of the test split plus log Z by annealed importance sampling and reverse AIS, 100 chains × 10,000 "
        f"temperatures; 500 hidden units, CD-k, {CD_EPOCHS} epochs each"
    ),
    minutes=15,
    figures={
        **{
            f"CD-{k}{what}": Figure(f"nll_{'reverse_' if what else ''}ais_nats", published=value, source=MURRAY)
            for k, published in CD.items()
            for what, value in (("", published), (", reverse AIS", ""))
        },
        "CD-3 below CD-1": Figure("nats", at_least(0.0), published="20.03", source=MURRAY),
        "CD-25 below CD-3": Figure("nats", at_least(0.0), published="19.16", source=MURRAY),
    },
)
def rbm_500_mnist(workdir: Path) -> Measured:
    data = fit.dataset(workdir, "mnist", source="idx", path=str(real_data("mnist")), transform="static")
    found: dict[str, float] = {}
    for k in CD:
        model = fit.train(
            "rbm", data, config={"hidden": 500, "negative": "cd", "gibbs": k}, recipe={"steps": CD_EPOCHS * DEEP_EPOCH}
        )
        found[f"CD-{k}"], found[f"CD-{k}, reverse AIS"] = _annealed(model, data, 10_000)
    return {
        **found,
        "CD-3 below CD-1": found["CD-1"] - found["CD-3"],
        "CD-25 below CD-3": found["CD-3"] - found["CD-25"],
    }


@row(
    model="dbn",
    data=STATIC,
    estimator=(
        "variational free energy of the test split plus log Z of the top by annealed importance sampling, 100 chains × "
        "10,000 temperatures; 500–500 hidden units, CD-1, 30 epochs a layer, 30 of up–down; the RBM is the first layer "
        "after its window, its free energy exact"
    ),
    minutes=15,
    figures={
        "up–down": Figure("nll_ais_nats", published="≤ 86.22 (500–2000 units)", source=MURRAY),
        "two layers, before up–down": Figure("nll_ais_nats"),
        "its RBM": Figure("nll_ais_nats", published="125.5 (CD-1), 86.34 (CD-25)", source=MURRAY),
        "up–down, reverse AIS": Figure("nll_reverse_ais_nats"),
        "its RBM, reverse AIS": Figure("nll_reverse_ais_nats"),
        "how far up–down lies above its RBM": Figure("nats", at_least(0.0)),
    },
)
def dbn_mnist(workdir: Path) -> Measured:
    data = fit.dataset(workdir, "mnist", source="idx", path=str(real_data("mnist")), transform="static")
    stages: list[tuple[float, float]] = []

    def stage(model: GenerativeModel) -> Mapping[str, float]:
        """At the end of every third of the run, which a stage takes."""
        stages.append(_annealed(model, data, 10_000))
        return {"val/nll_ais_nats": stages[-1][0]}

    fit.train(
        "dbn", data, config={"greedy": 2 / 3},
        recipe={"steps": 90 * DEEP_EPOCH, "evaluate_every": 30 * DEEP_EPOCH}, evaluate=stage,
    )  # fmt: skip
    rbm, greedy, whole = stages
    return {
        "up–down": whole[0],
        "two layers, before up–down": greedy[0],
        "its RBM": rbm[0],
        "up–down, reverse AIS": whole[1],
        "its RBM, reverse AIS": rbm[1],
        "how far up–down lies above its RBM": rbm[0] - whole[0],
    }


@row(
    model="dbm",
    data=STATIC,
    estimator=(
        "variational free energy of the test split plus log Z by annealed importance sampling, 100 chains × 20,000 "
        "temperatures; 200–200 hidden units, 20 epochs of pre-training a layer, 60 of joint learning"
    ),
    minutes=15,
    figures={
        "200–200 units": Figure(
            "nll_ais_nats",
            published="≤ 84.62 (500–1000 units, 500 epochs); 86.4 (a re-implementation)",
            source="Salakhutdinov & Hinton 2009",
        ),
        "200–200 units, reverse AIS": Figure("nll_reverse_ais_nats"),
    },
)
def dbm_mnist(workdir: Path) -> Measured:
    data = fit.dataset(workdir, "mnist", source="idx", path=str(real_data("mnist")), transform="static")
    model = fit.train("dbm", data, config={"hidden": (200, 200)}, recipe={"steps": 100 * DEEP_EPOCH})
    forward, reverse = _annealed(model, data, 20_000)
    return {"200–200 units": forward, "200–200 units, reverse AIS": reverse}


def _annealed(model: GenerativeModel, data: Dataset, temperatures: int) -> tuple[float, float]:
    """Nats a test example with log Z by annealing forwards, and backwards from where that ended."""
    assert isinstance(model, HasEnergy)
    energy = torch.cat([model.free_energy(batch.x).double() for batch in fit.held_out(data)]).mean().item()
    betas = ais.temperatures(temperatures)
    forward = ais.ais(model, chains=100, betas=betas)
    reverse = ais.reverse_ais(model, ais.model_states(model, forward), betas=betas)
    return energy + forward.log_z, energy + reverse.log_z
