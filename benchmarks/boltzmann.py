"""Training speed of RBMs and of annealing: `python -m benchmarks.boltzmann`.

An epoch of 60,000 binary examples in batches of 100 by an RBM of 784 visible and 500 hidden units, each with its own
library's training loop: ours is the trainer over shards on disk, the peers have their data in memory. Like is compared
with like: CD-1 beside learnergy 2.0.2 (over a `TensorDataset`; each of its batches also estimates a pseudo-likelihood,
which cannot be switched off), PCD-1 with 100 chains beside scikit-learn's BernoulliRBM, which knows nothing else. Ours
is not centred, as neither peer is. scikit-learn runs in double precision as it comes, and in single precision where its
data is; ours in single precision, and with products in bfloat16 where the processor has them. All have the same
threads.

Annealed importance sampling estimates log Z of a 500-unit RBM with weights of the size that training leaves.

learnergy is no dependency of this project: without it its row is left out. `--tiny` runs everything on a hundredth of
the work and stores nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neural_network import BernoulliRBM

from benchmarks.harness import RESULTS, Pairs, Row, interleave, report
from dgm_core.contract import Batch, DataSpec
from dgm_core.data.shards import Dataset, write_dataset
from dgm_core.evaluation import ais
from dgm_core.models.boltzmann.rbm import RBM
from dgm_core.training.trainer import Trainer
from pipelines.training_job import Training

SPEC = DataSpec("image", (1, 28, 28), 2)
HIDDEN, BATCH, RATE = 500, 100, 0.01
EXAMPLES, CHAINS, TEMPERATURES = 60_000, 100, 10_000
PEER = "learnergy"


def bits(count: int) -> Iterator[Batch]:
    """Sparse, as thresholded digits are."""
    rng = np.random.default_rng(0)
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        yield Batch(torch.from_numpy((rng.random((size, 1, 28, 28)) < 0.13).astype(np.uint8)))


def epochs(dataset: Dataset, negative: str, precision: str) -> Callable[[], Any]:
    """Each call goes on for another epoch."""
    config = RBM.Config(hidden=HIDDEN, negative=negative, chains=BATCH, centred=False)  # type: ignore[arg-type]
    rounds = len(dataset.split("train")) // BATCH
    plain = {"batch_size": BATCH, "steps": 1000 * rounds, "precision": precision}
    recipe = RBM.defaults(SPEC)[1].merged({**plain, "optimizers": {"model": {"lr": RATE}}})

    def stop() -> bool:
        return trainer.step % rounds == 0

    trainer = Trainer(RBM(config, SPEC), recipe, Training(dataset, recipe, 0), stop=stop)
    return trainer.fit


def scikit_learn(x: np.ndarray) -> Callable[[], Any]:
    rbm = BernoulliRBM(n_components=HIDDEN, learning_rate=RATE, batch_size=BATCH, n_iter=1, random_state=0)
    return lambda: rbm.fit(x)


def learnergy(x: np.ndarray) -> Callable[[], Any]:
    rbm_module: Any = importlib.import_module("learnergy.models.bernoulli.rbm")
    rbm = rbm_module.RBM(SPEC.dims, HIDDEN, steps=1, learning_rate=RATE)
    data = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.zeros(len(x)))
    return lambda: rbm.fit(data, batch_size=BATCH, epochs=1)


def annealing(temperatures: int, runs: int) -> float:
    """Seconds, the median of several runs."""
    torch.manual_seed(0)
    model = RBM(RBM.Config(hidden=HIDDEN), SPEC).eval()
    with torch.no_grad():
        model.layer.weight.normal_(0, 0.1)
        model.layer.hidden_bias.fill_(-1.0)
    betas = ais.temperatures(temperatures)
    seconds = []
    for run in range(runs + 1):
        start = time.perf_counter()
        ais.ais(model, chains=CHAINS, betas=ais.temperatures(100) if run == 0 else betas)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def half_precision_products() -> bool:
    """Whether the processor multiplies in bfloat16; elsewhere such products are slower than single precision's."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8") if path.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def measure(examples: int, temperatures: int, pairs: int) -> list[Row]:
    setting = f"{SPEC.dims} × {HIDDEN}, batch {BATCH}, {examples:,} examples"
    with tempfile.TemporaryDirectory() as folder:
        splits = {"train": bits(examples), "val": bits(1), "test": bits(1)}
        dataset = write_dataset(Path(folder) / "bits", SPEC, splits, {"name": "bits"})
        x = torch.cat([batch.x for batch in bits(examples)]).flatten(1).numpy()
        single, double = x.astype(np.float32), x.astype(np.float64)

        def compare(ours: Callable[[], Any], peer: Callable[[], Any]) -> Pairs:
            return interleave(ours, peer, pairs=pairs)

        rows = []
        if importlib.util.find_spec(PEER) is None:
            print(f"{PEER} is not installed: its row is left out")
        else:
            cd = compare(epochs(dataset, "cd", "fp32"), learnergy(single))
            rows.append(Row(f"CD-1 (float32) over {PEER}'s (float32; {setting})", cd.ratio, 2.0))
            rows += [Row("  ours, an epoch", statistics.median(cd.ours), None, unit="s"),
                     Row(f"  {PEER}, an epoch", statistics.median(cd.peer), None, unit="s")]  # fmt: skip
        cases = [("fp32", "float32", double, "float64, as it comes", 2.0), ("fp32", "float32", single, "float32", 1.0)]
        if half_precision_products():
            cases.append(("bf16", "float32, products bfloat16", single, "float32", 1.5))
        else:
            print("this processor has no bfloat16 products: their row is left out")
        for precision, ours, data, theirs, goal in cases:
            pcd = compare(epochs(dataset, "pcd", precision), scikit_learn(data))
            rows.append(Row(f"PCD-1 ({ours}) over scikit-learn's ({theirs}; {setting})", pcd.ratio, goal))
            rows += [Row("  ours, an epoch", statistics.median(pcd.ours), None, unit="s"),
                     Row("  scikit-learn, an epoch", statistics.median(pcd.peer), None, unit="s")]  # fmt: skip
    what = f"AIS, {CHAINS} chains × {temperatures:,} temperatures, {SPEC.dims} × {HIDDEN}, float32"
    rows.append(Row(what, annealing(temperatures, min(pairs, 3)), 45.0, at_least=False, unit="s"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a hundredth of the work, nothing stored")
    if not parser.parse_args().tiny:
        return report("boltzmann", measure(EXAMPLES, TEMPERATURES, 7), RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        return report("boltzmann", measure(EXAMPLES // 100, TEMPERATURES // 100, 3), Path(folder))


if __name__ == "__main__":
    sys.exit(main())
