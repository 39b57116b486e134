"""The cost model against two real workers: two processes, gloo over loopback, one thread each, the project's trainer.

Predicted: what one of the two takes for its half of the batch, with the same code and no messages, plus a ring for every
message, from a hop and a bandwidth measured on their own. Halves are timed on both processes at once, so that they
share the machine as the two workers do. All are taken in turn, `PAIRS` times; medians count.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import fit
from benchmarks.harness import ROOT
from benchmarks.scale import cost
from benchmarks.scale.account import account, pretend
from benchmarks.scale.measure import Timed
from dgm_core.config import Recipe
from dgm_core.data.shards import open_dataset
from dgm_core.models import CATALOG
from dgm_core.training.trainer import Trainer

PAIRS = 5
SKIP = 2  # rounds at the start of a block
SMALL, LARGE = 8, 8 * 2**20  # bytes of the messages that hop and bandwidth are taken from


@dataclass(frozen=True)
class Case:
    """A run of params.yaml, on its data, and rounds in a block."""

    run: str
    rounds: int
    transform: str | None = None


CASES = (Case("vae", 60, "threshold"), Case("flow", 12), Case("vqvae", 25))


class Pair:
    """Two processes that do what they are asked at the same time, with a gloo group between them or without."""

    def __init__(self, *, connected: bool) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="dgm-pair-")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            store = f"file://{self.folder.name}/store" if connected else None
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results = [pipe.recv() for pipe in self.pipes]
        for ok, found in results:
            if not ok:
                raise RuntimeError(f"a worker failed:\n{found}")
        return [found for _, found in results]

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def _serve(rank: int, store: str | None, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if store is not None:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort the interpreter's teardown


def block(job: Mapping[str, Any], alone: bool) -> float:
    """Median seconds of a round of a fresh trainer; `alone`: as one of two workers that never wait for each other."""
    from pipelines.train import Training

    data = open_dataset(job["data"])
    recipe = Recipe.model_validate(job["recipe"])
    model_class = CATALOG[job["model"]]
    torch.manual_seed(0)
    with pretend() if alone else contextlib.nullcontext():
        model = model_class(model_class.Config.model_validate(job["config"]), data.spec)
        source = Timed(Training(data, recipe, 0))
        Trainer(model, recipe, source).fit()
    plays = sum(turn.repeat for turn in model.turns())
    return statistics.median(source.rounds(plays, SKIP))


def messages(nbytes: int, repeats: int) -> float:
    """Seconds an all-reduce of `nbytes` takes, back to back."""
    x = torch.zeros(nbytes // 4)
    dist.all_reduce(x)
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(x)
    return (time.perf_counter() - start) / repeats


def link(pair: Pair) -> tuple[float, float]:
    """Hop (seconds) and bandwidth (bytes a second) of two gloo workers, by the ring's formula."""
    hop = statistics.median(max(pair.run(messages, SMALL, 100)) for _ in range(3)) / 2
    long = statistics.median(max(pair.run(messages, LARGE, 4)) for _ in range(3))
    return hop, LARGE / max(long - 2 * hop, 1e-9)


def compare(folder: Path) -> list[dict[str, Any]]:
    """Every case: predicted and measured seconds of a round on two workers, and what they were made of."""
    jobs = [(case, *_job(case, folder)) for case in CASES]
    with _pair(connected=True) as two, _pair(connected=False) as apart:
        return [_case(case, job, sizes, two, apart) for case, job, sizes in jobs]


def _case(case: Case, job: Mapping[str, Any], sizes: list[tuple[float, float]], two: Pair, apart: Pair) -> dict[str, Any]:
    found: dict[str, list[float]] = {key: [] for key in ("one", "half", "two", "hop", "bandwidth", "predicted", "ratio")}
    for i in range(PAIRS):
        hop, bandwidth = link(two)
        both = [lambda: max(apart.run(block, job, True)), lambda: max(two.run(block, job, False))]
        half, measured = (f() for f in both) if i % 2 else reversed([f() for f in reversed(both)])
        whole = max(apart.run(block, job, False))
        predicted = cost.two_workers(half, sizes, hop, bandwidth)
        row = (whole, half, measured, hop, bandwidth, predicted, measured / predicted)
        for key, figure in zip(found, row, strict=True):
            found[key].append(figure)
    return {
        "run": case.run,
        "model": job["model"],
        "batch": job["recipe"]["batch_size"],
        "messages": sum(count for _, count in sizes),
        "bytes": sum(nbytes * count for nbytes, count in sizes),
        **{key: statistics.median(figures) for key, figures in found.items()},
        "ratios": found["ratio"],
    }


def _job(case: Case, folder: Path) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    from pipelines.params import load_params, resolve

    run = load_params(ROOT / "params.yaml").runs[case.run]
    source = {"source": "digits", "size": 16, **({"transform": case.transform} if case.transform else {})}
    data = fit.dataset(folder, case.run, **source)
    model_class, config, recipe = resolve(case.run, run, data.spec)
    recipe = recipe.merged({"steps": case.rounds, "evaluate_every": None, "monitor": None})
    found = account(lambda: model_class(config, data.spec), recipe, data.spec, "cpu")
    job = {
        "model": run.model, "data": str(data.path),
        "config": config.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json"),
    }  # fmt: skip
    return job, [(m.bytes(found.batch), m.count) for m in found.messages]


@contextlib.contextmanager
def _pair(*, connected: bool) -> Iterator[Pair]:
    pair = Pair(connected=connected)
    try:
        yield pair
    finally:
        pair.close()
