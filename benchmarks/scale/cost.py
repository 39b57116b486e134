"""The cost model: what a round takes on W GPUs, and which part of it is what.

A ring all-reduce of n bytes over W ranks is 2 (W − 1) steps, each a hop of n / W bytes over the slowest link:

    ring = 2 (W − 1) hop + 2 (W − 1) / W · n / bandwidth,    tree = 2 ⌈log₂ W⌉ hop + 2 n / bandwidth;

NCCL takes the tree for short messages and the ring for long ones, hence the lesser of the two; gloo has the ring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from benchmarks.scale.account import GRADIENTS, Account

NODE = 8  # GPUs
WORLDS = (8, 64, 512)


@dataclass(frozen=True)
class Constant:
    value: float
    unit: str
    what: str


CONSTANTS: Mapping[str, Constant] = MappingProxyType(
    {
        "GPU_BF16": Constant(100e12, "FLOP/s", "sustained by a GPU in bf16: a third of an A100's peak"),
        "GPU_FP32": Constant(12e12, "FLOP/s", "sustained in fp32, for recipes that ask for it"),
        "KERNEL": Constant(5e-6, "s", "least time of a kernel: what the host needs to launch it"),
        "NVLINK": Constant(250e9, "B/s", "of a GPU to the others of its node, each way"),
        "NETWORK": Constant(40e9, "B/s", "of a node of 8 GPUs, each way: 400 Gbit/s at 80 %"),
        "HOP_NODE": Constant(4e-6, "s", "latency a hop within a node"),
        "HOP_NETWORK": Constant(12e-6, "s", "latency a hop between nodes"),
        "STORE_STREAM": Constant(150e6, "B/s", "one stream to or from the object store"),
        "STORE_TOTAL": Constant(20e9, "B/s", "of the object store, all nodes together"),
        "DISK": Constant(1e9, "B/s", "written to a node's disk, flushed"),
        "LOG_EVERY": Constant(50, "rounds", "`cluster.log_every`"),
        "CHECKPOINT_SECONDS": Constant(120, "s", "`cluster.checkpoint_seconds`"),
        "EVALUATE_EVERY": Constant(1000, "rounds", "`recipe.evaluate_every`, assumed; by default at the end only"),
        "REPORT_SECONDS": Constant(10, "s", "`cluster.report_seconds`: least time between a worker's reports"),
    }
)
LOG_MESSAGES = 6  # small collectives of a log: non-finite losses, two of sums, stop, hurry, and whether to report


def value(name: str) -> float:
    return CONSTANTS[name].value


def ring(nbytes: float, world: int, hop: float, bandwidth: float) -> float:
    """Seconds; one rank has nobody to wait for."""
    if world == 1:
        return 0.0
    return 2 * (world - 1) * hop + 2 * (world - 1) / world * nbytes / bandwidth


def tree(nbytes: float, world: int, hop: float, bandwidth: float) -> float:
    return 2 * math.ceil(math.log2(world)) * hop + 2 * nbytes / bandwidth if world > 1 else 0.0


def all_reduce(nbytes: float, world: int) -> float:
    """Seconds on the stated GPUs: within a node over NVLink, beyond it at the speed of the nodes' network."""
    link = ("HOP_NODE", "NVLINK") if world <= NODE else ("HOP_NETWORK", "NETWORK")
    hop, bandwidth = (value(name) for name in link)
    return min(ring(nbytes, world, hop, bandwidth), tree(nbytes, world, hop, bandwidth))


@dataclass(frozen=True)
class Core:
    """What was measured of a model on one core, and what follows for a GPU."""

    matmul: float  # FLOP/s of that core in a large product
    seconds_per_flop: float  # of the model's round on that core
    read_seconds: float  # to read one example from a warm cache


@dataclass(frozen=True)
class Round:
    """Seconds of one round on `world` GPUs; `examples` are the busiest rank's of each play."""

    world: int
    examples: int
    arithmetic: float
    launching: float  # beyond the arithmetic, where there are more kernels than work
    gradients: float
    statistics: float
    gradients_latency: float  # what messages of no length would take
    statistics_latency: float
    reading: float
    logging: float
    checkpoint: float
    validation: float

    @property
    def compute(self) -> float:
        return self.arithmetic + self.launching

    @property
    def communication(self) -> float:
        return self.gradients + self.statistics

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.reading + self.logging + self.checkpoint + self.validation

    @property
    def efficiency(self) -> float:
        """Compute over compute and communication, all of which is exposed: gradients are summed after backward."""
        return self.compute / (self.compute + self.communication)

    @property
    def overlapped(self) -> float:
        """The same if gradients were summed while backward, two thirds of the compute, goes on."""
        exposed = max(0.0, self.gradients - 2 / 3 * self.compute) + self.statistics
        return self.compute / (self.compute + exposed)

    @property
    def causes(self) -> dict[str, float]:
        """Seconds lost to each, largest first."""
        lost = {
            "launching": self.launching,
            "statistics": self.statistics,
            "latency": self.gradients_latency,
            "bandwidth": self.gradients - self.gradients_latency,
            "reading": self.reading,
            "logging": self.logging,
            "checkpoint": self.checkpoint,
            "validation": self.validation,
        }
        return dict(sorted(lost.items(), key=lambda item: -item[1]))


def round_on(world: int, batch: int, a: Account, core: Core, validation: float) -> Round:
    """A round of a global batch of `batch` on `world` GPUs.

    Args:
        validation: seconds that rank 0 validates for while the others wait.
    """
    examples = math.ceil(batch / world)
    gpu = value("GPU_FP32" if a.precision == "fp32" else "GPU_BF16")
    flops = a.flops_per_example * examples + a.flops_fixed / world
    arithmetic = flops * core.seconds_per_flop * core.matmul / gpu
    times, latency = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for m in a.messages:
        times[m.place == GRADIENTS] += m.count * all_reduce(m.bytes(batch), world)
        latency[m.place == GRADIENTS] += m.count * all_reduce(0, world)
    compute = max(arithmetic, (a.kernels if world > 1 else a.kernels_alone) * value("KERNEL"))
    reading = sum(a.plays.values()) * examples * core.read_seconds
    logging = LOG_MESSAGES * all_reduce(8, world) / value("LOG_EVERY")
    so_far = compute + sum(times.values()) + reading + logging
    saving = a.checkpoint_bytes / value("DISK")
    return Round(
        world, examples, arithmetic, compute - arithmetic, times[True], times[False], latency[True], latency[False],
        reading, logging, so_far * saving / value("CHECKPOINT_SECONDS"),
        validation / value("EVALUATE_EVERY") if world > 1 else 0.0,
    )  # fmt: skip


def validation_seconds(a: Account, work: Mapping[str, float]) -> dict[str, float]:
    """Of scoring and of drawing on one GPU, from their kernels and operations."""
    gpu = value("GPU_FP32" if a.precision == "fp32" else "GPU_BF16")
    return {
        part: max(work[f"{part}_kernels"] * value("KERNEL"), work[f"{part}_flops"] / gpu) for part in ("score", "draw")
    }


def fetching(nbytes: float, world: int) -> float:
    """Seconds until every node has a data set of `nbytes`, all fetching it at once, a stream each."""
    return max(nbytes / value("STORE_STREAM"), nbytes * math.ceil(world / NODE) / value("STORE_TOTAL"))


def two_workers(half: float, messages: list[tuple[float, float]], hop: float, bandwidth: float) -> float:
    """Seconds a round on two gloo workers: one's half of the batch, and a ring for every (bytes, count)."""
    return half + sum(count * ring(nbytes, 2, hop, bandwidth) for nbytes, count in messages)


def rounds(a: Account, core: Core, validation: float) -> dict[str, list[Round | None]]:
    """On each of WORLDS, by the kind of scaling; None where a worker would have nothing to do.

    Strong: the paper's global batch. Weak: what each GPU has of it on one node stays.
    """
    share = math.ceil(a.batch / NODE)
    strong = [round_on(w, a.batch, a, core, validation) if w <= a.most_workers else None for w in WORLDS]
    return {"strong": strong, "weak": [round_on(w, share * w, a, core, validation) for w in WORLDS]}


def first_broken(a: Account, core: Core, validation: float) -> dict[str, Any]:
    """The least number of GPUs, doubling, on which one cause takes a fifth of the round or a worker has no example."""
    world = 1
    while world <= WORLDS[-1]:
        if world > a.most_workers:
            return {"world": world, "cause": "batch", "share": 1.0}
        found = round_on(world, a.batch, a, core, validation)
        cause, seconds = next(iter(found.causes.items()))
        if seconds >= found.total / 5:
            return {"world": world, "cause": cause, "share": seconds / found.total}
        world *= 2
    return {"world": None, "cause": "none", "share": 0.0}
