"""The cost model against two real workers: two processes, gloo over loopback, one thread each, the project's trainer.

Predicted: what one of two takes for its half of the batch, with the same code and no messages, plus a ring for every
message, from a hop and a bandwidth measured on their own. Halves are timed on two processes at once, so that they share
the machine as the two workers do. All are taken in turn, in short blocks; medians count.
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
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.harness import ROOT
from benchmarks.scale import cost
from benchmarks.scale.account import account
from benchmarks.scale.measure import Stored, Timed
from dgm_core.config import Recipe
from dgm_core.data.prepare import prepare
from dgm_core.data.shards import open_dataset
from dgm_core.data.sources import parse
from dgm_core.models import CATALOG
from dgm_core.training.trainer import Schedule, Trainer

PAIRS, FEWEST, BUDGET = 11, 3, 25.0  # repetitions of a case: as many as go into so many seconds
SMALL, LARGE = 8, 8 * 2**20  # bytes of the messages that hop and bandwidth are taken from
Group = Literal["gloo", "fake"] | None  # fake: the other rank does not exist, nobody is waited for


@dataclass(frozen=True)
class Case:
    """A run of params.yaml on its data, and the rounds of a block; the first is not counted."""

    run: str
    rounds: int
    transform: str | None = None


CASES = (Case("vae", 24, "threshold"), Case("flow", 4), Case("vqvae", 12))
_trainers: dict[str, tuple[Trainer, Timed]] = {}  # of this worker


class Workers:
    """Processes that do what they are asked at the same time."""

    def __init__(self, count: int, group: Group) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="dgm-workers-")
        self.pipes: list[Any] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            store = f"file://{self.folder.name}/store"
            process = context.Process(target=_serve, args=(rank, count, group, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Every process's result.

        Raises:
            RuntimeError: one failed; the message is its traceback.
        """
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


def _serve(rank: int, count: int, group: Group, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if group == "gloo":
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    elif group == "fake":
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort the interpreter's teardown


def prepare_run(name: str, job: Mapping[str, Any], rounds: int) -> None:
    """Make the trainer, and play a first block."""
    data = open_dataset(job["data"])
    recipe = Recipe.model_validate(job["recipe"])
    model_class = CATALOG[job["model"]]
    torch.manual_seed(0)
    model = model_class(model_class.Config.model_validate(job["config"]), data.spec)
    source = Timed(Stored(data, recipe))
    # It is asked to stop at the end of every block, and goes on when `fit` is called again.
    schedule = Schedule(log_every=rounds)
    trainer = Trainer(model, recipe, source, schedule=schedule, stop=lambda: trainer.step % rounds == 0)
    trainer.entered = [turn.name for turn in trainer.turns]  # starts from data are no part of a round
    _trainers[name] = trainer, source
    block(name)


def block(name: str) -> float:
    """Median seconds of a block's rounds."""
    trainer, source = _trainers[name]
    source.asked.clear()
    if trainer.fit().stopped != "interrupted":
        raise RuntimeError(f"{name} has run out of rounds")
    return statistics.median(source.rounds(sum(turn.repeat for turn in trainer.turns)))


def messages(nbytes: int, repeats: int) -> float:
    """Seconds an all-reduce of `nbytes` takes, back to back."""
    x = torch.zeros(nbytes // 4)
    dist.all_reduce(x)
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(x)
    return (time.perf_counter() - start) / repeats


def compare(folder: Path) -> list[dict[str, Any]]:
    """Every case: predicted and measured seconds of a round on two workers, and what they were made of."""
    jobs = {case: _job(case, folder) for case in CASES}
    with _workers(1, None) as one, _workers(2, "fake") as half, _workers(2, "gloo") as two:
        kinds = {"one": one, "half": half, "two": two}
        for case, (job, _) in jobs.items():
            for workers in kinds.values():
                workers.run(prepare_run, case.run, job, case.rounds)
        return [_case(case, job, sizes, kinds) for case, (job, sizes) in jobs.items()]


def _case(
    case: Case, job: Mapping[str, Any], sizes: list[tuple[float, float]], kinds: Mapping[str, Workers]
) -> dict[str, Any]:
    taken: dict[str, list[float]] = {key: [] for key in (*kinds, "small", "large", "predicted")}
    started = time.monotonic()
    for i in range(PAIRS):
        if i >= FEWEST and time.monotonic() - started > BUDGET:
            break
        for key in list(kinds) if i % 2 else list(kinds)[::-1]:
            taken[key].append(max(kinds[key].run(block, case.run)))
        taken["small"].append(max(kinds["two"].run(messages, SMALL, 50)))
        taken["large"].append(max(kinds["two"].run(messages, LARGE, 2)))
        half, small, large = (taken[key][-1] for key in ("half", "small", "large"))
        taken["predicted"].append(_predicted(half, small, large, sizes)[0])
    median = {key: statistics.median(seconds) for key, seconds in taken.items()}
    predicted, hop, bandwidth = _predicted(median["half"], median["small"], median["large"], sizes)
    return {
        "run": case.run,
        "model": job["model"],
        "batch": job["recipe"]["batch_size"],
        "messages": sum(count for _, count in sizes),
        "bytes": sum(nbytes * count for nbytes, count in sizes),
        **{key: median[key] for key in kinds},
        "hop": hop,
        "bandwidth": bandwidth,
        "predicted": predicted,
        "ratio": median["two"] / predicted,
        "ratios": [t / p for t, p in zip(taken["two"], taken["predicted"], strict=True)],
        "load": os.getloadavg()[0],
    }


def _predicted(half: float, small: float, large: float, sizes: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Of a round on two workers; and the hop and the bandwidth, by the ring's formula from two messages."""
    hop = small / 2
    bandwidth = LARGE / max(large - small, 1e-9)
    return cost.two_workers(half, sizes, hop, bandwidth), hop, bandwidth


def _job(case: Case, folder: Path) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    from pipelines.params import load_params, resolve

    run = load_params(ROOT / "params.yaml").runs[case.run]
    source = {"source": "digits", "size": 16, **({"transform": case.transform} if case.transform else {})}
    data = prepare(parse(source), folder / case.run, name=case.run)
    model_class, config, recipe = resolve(case.run, run, data.spec)
    recipe = recipe.merged({"steps": 10**9, "evaluate_every": None, "monitor": None})
    found = account(lambda: model_class(config, data.spec), recipe, data.spec, "cpu")
    job = {
        "model": run.model, "data": str(data.path),
        "config": config.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json"),
    }  # fmt: skip
    return job, [(m.bytes(found.batch), m.count) for m in found.messages]


@contextlib.contextmanager
def _workers(count: int, group: Group) -> Iterator[Workers]:
    workers = Workers(count, group)
    try:
        yield workers
    finally:
        workers.close()
