"""Glow beside normflows', of equal size, and what depth costs in memory: `python -m benchmarks.glow`.

A training step is the mean negative log-likelihood of a batch of 8-bit images with fresh noise, its gradient and a step
of fused Adam. Both flows have L levels of K steps, affine couplings whose networks have the same three convolutions,
and LU convolutions; normflows' has its defaults otherwise, which leave out the networks' activation normalisation and
the learnt prior of what is split off.

Memory is the most that tensors held at once (weights, gradients, Adam's moments and activations, by torch's own record)
while a model was built and made two steps; on a CPU the process's growth stands beside it, with all that its allocator
keeps for later. Each way of keeping activations has a process of its own.

normflows is no dependency of this project: install it beside it (`pip install normflows`).
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Row, interleave, report
from dgm_core.bijections import Memory
from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.flow.glow import Glow

VERSION = "1.7.3"  # of normflows, that this was written against
IMAGE = DataSpec("image", (3, 32, 32), 256)
SIZES = {"K = 8, 128 features, batch 32": (8, 128, 32), "K = 4, 512 features, batch 16": (4, 512, 16)}
LEVELS = 3
SPEED, MEMORY = 1.0, 0.25
DEEP = {"depth": 32, "features": 128}
DEEP_BATCH = 64


def normflows(shape: tuple[int, ...], levels: int, depth: int, features: int) -> Any:
    """Its multi-scale Glow; `log_prob(x, None)` takes images in [−½, ½]."""
    if importlib.util.find_spec("normflows") is None:
        raise SystemExit(
            f"normflows is missing: it is an optional peer; install normflows=={VERSION} beside this project"
        )
    nf = importlib.import_module("normflows")
    channels, height, width = shape
    bases, merges, flows = [], [], []
    for i in range(levels):  # the coarsest first
        inner = channels * 2 ** (levels + 1 - i)
        blocks = [nf.flows.GlowBlock(inner, features, scale=True) for _ in range(depth)]
        flows.append([*blocks, nf.flows.Squeeze()])
        merges += [nf.flows.Merge()] if i else []
        split = inner // 2 if i else inner
        side = 2 ** (levels - i)
        bases.append(nf.distributions.GlowBase((split, height // side, width // side)))
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=False)


def training_step(parameters: list[nn.Parameter], nats: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nats().backward()
        optimizer.step()

    return step


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def images(batch: int) -> Tensor:
    return torch.randint(0, 256, (batch, *IMAGE.shape), dtype=torch.uint8).to(device())


def our_step(depth: int, features: int, x: Tensor, memory: Memory = "store") -> tuple[Glow, Callable[[], None]]:
    config = Glow.Config(levels=LEVELS, depth=depth, features=features, memory=memory)
    model = Glow(config, IMAGE).to(device()).train()
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        model.enter("model", iter([Batch(x)]))
    batch = Batch(x)
    return model, training_step(list(model.parameters()), lambda: model.loss(batch, "model", Clock(0, 1)).value)


def their_step(depth: int, features: int, x: Tensor) -> tuple[nn.Module, Callable[[], None]]:
    model = normflows(IMAGE.shape, LEVELS, depth, features).to(device()).train()

    def nats() -> Tensor:
        return -model.log_prob((x + torch.rand(x.shape, device=x.device)) / 256 - 0.5, None).mean()

    with torch.no_grad():
        nats()  # sets its activation normalisation
    return model, training_step(list(model.parameters()), nats)


def speed() -> list[Row]:
    rows = []
    for size, (depth, features, batch) in SIZES.items():
        x = images(batch)
        (mine, ours), (their, peer) = our_step(depth, features, x), their_step(depth, features, x)
        pairs = interleave(ours, peer)
        ms = 1e3 * statistics.median(pairs.ours)
        counts = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (mine, their)]
        rows += [
            Row(f"training step over normflows' ({LEVELS} levels, {size}, 3×32×32, float32)", pairs.ratio, SPEED),
            Row("  ours", ms, None, unit="ms"),
            Row("  parameters, ours", counts[0], None, unit="M"),
            Row("  parameters, normflows", counts[1], None, unit="M"),
        ]
    return rows


class Peak(NamedTuple):
    """Of a model's construction and two training steps: what tensors held at most, and by how much the process grew."""

    tensors: float  # MiB
    resident: float  # MiB
    seconds: float  # of the second step


def peak(memory: Memory, threads: int) -> Peak:
    """To be run in a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _, warm = our_step(1, 8, images(1), memory)  # what is loaded and compiled at first use is not the model's
    warm()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = images(DEEP_BATCH)
    _, step = our_step(**DEEP, x=x, memory=memory)
    step()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    resident = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    del step
    return Peak(_most_held(lambda: our_step(**DEEP, x=x, memory=memory)[1]), resident, seconds)


def _most_held(build: Callable[[], Callable[[], None]]) -> float:
    """MiB that torch's allocator had handed out at the worst moment of building and two steps."""

    def run() -> None:
        step = build()
        step()
        step()

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    traced: Any = profiler.profiler
    events = [e for e in traced.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes)) / 2**20


def gradient_error() -> float:
    """‖g(invertible) − g(store)‖ / ‖g(store)‖ of all parameters in single precision, after some steps of training."""
    found = []
    for memory in ("store", "invertible"):
        torch.manual_seed(0)
        x = images(8)
        model, step = our_step(32, 32, x)
        for _ in range(5):
            step()
        deep = Glow(model.config.merged({"memory": memory}), IMAGE).to(device())
        deep.load_state_dict(model.state_dict())
        deep.loss(Batch(x), "model", Clock(0, 1)).value.backward()
        found.append(torch.cat([p.grad.flatten() for p in deep.parameters() if p.grad is not None]))
    store, invertible = found
    return ((invertible - store).norm() / store.norm()).item()


def main() -> int:
    torch.manual_seed(0)
    rows = speed()
    setting = f"{LEVELS} levels, K = 32, {DEEP['features']} features, batch {DEEP_BATCH}, 3×32×32, float32"
    measured = {}
    for memory in ("store", "checkpoint", "invertible"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            measured[memory] = pool.submit(peak, memory, torch.get_num_threads()).result()
    store = measured["store"]
    rows += [
        Row(f"peak memory of tensors, store ({setting})", store.tensors, None, unit="MiB"),
        Row("  growth of the process", store.resident, None, unit="MiB"),
    ]
    for memory, goal in (("checkpoint", None), ("invertible", MEMORY)):
        found = measured[memory]
        rows += [
            Row(f"peak memory of tensors, {memory} over store", found.tensors / store.tensors, goal, at_least=False),
            Row("  growth of the process, over store's", found.resident / store.resident, None),
            Row("  seconds of a training step, over store's", found.seconds / store.seconds, None),
        ]
    rows.append(Row("gradient of invertible off store's, relative (float32, K = 32)", gradient_error(), None, unit=""))
    return report("glow", rows)


if __name__ == "__main__":
    sys.exit(main())
