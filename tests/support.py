"""What several test folders need: tiny data, a data source in memory, common random numbers, a pool of two ranks."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dgm_core.contract import Batch, DataMismatch, DataSpec, GenerativeModel
from dgm_core.data import densities
from dgm_core.distributed import share

ROOT = Path(__file__).parents[1]

# One of each way that data can look; a model is tested on all that it accepts.
SPECS: dict[str, DataSpec] = {
    "real_vector": DataSpec("vector", (2,), None),
    "energy": DataSpec("vector", (2,), None, density={"name": "u2"}),
    "binary_vector": DataSpec("vector", (6,), 2),
    "binary_image": DataSpec("image", (1, 8, 8), 2, classes=2),
    "grey_image": DataSpec("image", (1, 8, 8), 256, classes=2),
    "codes": DataSpec("codes", (4, 4), 5, classes=2),
    "codes_with_context": DataSpec(
        "codes", (4, 4), 5, classes=2, context={"top": DataSpec("codes", (2, 2), 3, classes=2)}
    ),
    "audio": DataSpec("audio", (32,), 16, classes=2),
    "code_sequence": DataSpec("codes", (12,), 5),
}


def accepted(model: type[GenerativeModel]) -> list[str]:
    """Names in SPECS of the data that the model takes."""
    names = []
    for name, spec in SPECS.items():
        if spec.density and "real_vector" in names and model.tiny(spec) == model.tiny(SPECS["real_vector"]):
            continue  # only reverse KL has a use for the density; without it this is a real vector like another
        with contextlib.suppress(DataMismatch), torch.device("meta"):
            model(model.tiny(spec)[0], spec)
            names.append(name)
    return names


def examples(spec: DataSpec, n: int, seed: int = 0) -> Batch:
    """Structured data: two kinds of example that differ in most coordinates, with a little noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=g)
    context = {name: _level(inner, y, g) for name, inner in spec.context.items()}
    if spec.density:
        x = torch.from_numpy(densities.named(**spec.density).sample(n, np.random.default_rng(seed)))
    elif spec.levels is None:
        centres = torch.tensor([[2.0] * spec.dims, [-2.0] * spec.dims])
        x = centres[y] + 0.3 * torch.randn(n, spec.dims, generator=g)
        x = x.reshape(n, *spec.shape)
    else:
        x = _level(spec, y, g)
    return Batch(x.to(spec.dtype), y if spec.classes else None, context, torch.arange(n))


def _level(spec: DataSpec, y: Tensor, g: torch.Generator) -> Tensor:
    assert spec.levels is not None
    coordinate = torch.arange(spec.dims)
    stripe = (coordinate[None] + 2 * y[:, None]) % 4 < 2  # stripes whose phase is the kind of example
    # Many levels have their greys for noise instead: a density cannot jump from dark to bright and back.
    flipped = torch.rand(len(y), spec.dims, generator=g) < (0.05 if grey_width(spec) == 1 else 0.0)
    x = (stripe ^ flipped).long() * (spec.levels - 1)
    if (width := grey_width(spec)) > 1:  # greys around two levels: a density has no use for two points on a line
        x = x // 2 + (spec.levels - width) // 4 + torch.randint(0, width, x.shape, generator=g)
    return x.reshape(len(y), *spec.shape).to(spec.dtype)


def grey_width(spec: DataSpec) -> int:
    """How many levels around dark and bright `examples` spreads over."""
    return max(1, (spec.levels or 0) // 6)


@dataclass
class Tensors:
    """`TrainingData` over a batch in memory."""

    whole: Batch
    seed: int = 0

    def at(self, position: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        n = self.whole.x.shape[0]
        mine = share(size, rank, world)
        rows = []
        for i in range(position + mine.start, position + mine.stop):
            g = torch.Generator().manual_seed(self.seed + i // n)
            rows.append(torch.randperm(n, generator=g)[i % n])
        return self.whole.rows(torch.stack(rows))

    def one_pass(self, size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        n = self.whole.x.shape[0]
        for start in range(0, n, size):
            mine = share(min(size, n - start), rank, world)
            if mine.stop > mine.start:
                yield self.whole.rows(slice(start + mine.start, start + mine.stop))


def in_double(batch: Batch) -> Batch:
    return batch.map(lambda t: t.double() if t.is_floating_point() else t)


def every_example(spec: DataSpec) -> Tensor:
    """All levels ** dims examples of a small discrete space."""
    assert spec.levels is not None
    rows = list(itertools.product(range(spec.levels), repeat=spec.dims))
    return torch.tensor(rows).reshape(-1, *spec.shape).to(spec.dtype)


class CommonNoise(TorchDispatchMode):
    """Random draws of `local` leading rows become rows `start …` of a draw for the whole batch of `total`.

    So ranks, or microbatches, whose generators stand alike see the noise that one process would. Every random
    operation is rewritten on top of uniform or normal draws, in the single process too.
    """

    def __init__(self, start: int, local: int, total: int) -> None:
        super().__init__()
        self.start, self.local, self.total = start, local, total

    def _draw(self, kind: Callable[..., Tensor], shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        shape = tuple(shape)
        if not shape or shape[0] != self.local:
            return kind(shape, dtype=dtype, device=device)
        whole = kind((self.total, *shape[1:]), dtype=dtype, device=device)
        return whole[self.start : self.start + self.local].clone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if name in ("rand", "randn"):
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            kind = torch.rand if name == "rand" else torch.randn
            return self._draw(kind, args[0], dtype, kwargs.get("device", "cpu"))
        if name == "randint":
            *bounds, shape = args
            low, high = bounds if len(bounds) == 2 else (0, bounds[0])
            u = self._draw(torch.rand, shape, torch.float64, kwargs.get("device", "cpu"))
            return (low + u * (high - low)).floor().to(kwargs.get("dtype") or torch.int64)
        if name in ("rand_like", "randn_like"):
            x, kind = args[0], torch.rand if name == "rand_like" else torch.randn
            return self._draw(kind, x.shape, kwargs.get("dtype") or x.dtype, x.device)
        if name == "bernoulli" and len(args) == 1:
            return (self._draw(torch.rand, args[0].shape, torch.float64, args[0].device) < args[0]).to(args[0].dtype)
        if name in ("bernoulli_", "uniform_", "normal_", "exponential_"):
            return self._in_place(name, *args, **kwargs)
        if name == "multinomial":
            weights, count = args[0], args[1]
            shape = (*weights.shape[:-1], count)
            u = self._draw(torch.rand, shape, torch.float64, weights.device)
            cdf = (weights.double() / weights.double().sum(-1, keepdim=True)).cumsum(-1)
            return torch.searchsorted(cdf, u).clamp_max(weights.shape[-1] - 1)
        if name == "native_dropout":
            x, p = args[0], args[1]
            mask = self._draw(torch.rand, x.shape, torch.float64, x.device) >= p
            return x * mask / (1 - p), mask
        return func(*args, **kwargs)

    def _in_place(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if name == "normal_":
            mean, std = (*args, *(0.0, 1.0)[len(args) :])
            return x.copy_(self._draw(torch.randn, x.shape, x.dtype, x.device) * std + mean)
        u = self._draw(torch.rand, x.shape, torch.float64, x.device)
        if name == "uniform_":
            low, high = (*args, *(0.0, 1.0)[len(args) :])
            return x.copy_(low + u * (high - low))
        if name == "exponential_":
            return x.copy_(-torch.log1p(-u) / (args[0] if args else 1.0))
        p = args[0] if args else 0.5
        return x.copy_((u < p).to(x.dtype))


class TwoRanks:
    """Two processes with a gloo group that live as long as the test session; `run` gives both ranks' results."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.store = tempfile.mkdtemp(prefix="dgm-ranks-")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, f"file://{self.store}/store", theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results = [pipe.recv() for pipe in self.pipes]
        for ok, value in results:
            if not ok:
                raise AssertionError(f"a rank failed:\n{value}")
        return [value for _, value in results]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
        shutil.rmtree(self.store, ignore_errors=True)


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort the interpreter's teardown


def equal_states(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names of tensors that differ in any bit."""
    return [name for name in a if not torch.equal(a[name], b[name])]
