"""What one round of a model does, counted by playing it: operations, and every collective with its size.

The trainer's own plays run on the `meta` device, which has shapes and no memory, in a process group that pretends to
have two ranks. Once with one example a rank and once with two: what grows is per example, the rest is fixed. Once more
without a group, because some layers have other kernels on one rank.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.scale.settings import Examples
from dgm_core import distributed
from dgm_core.config import Recipe
from dgm_core.contract import Clock, DataSpec, GenerativeModel, Turn
from dgm_core.training.trainer import Trainer

WORLD = 2  # ranks that are pretended: the fewest that communicate
CPU_RANDOM_STATE, GPU_RANDOM_STATE = 5056, 16  # bytes of torch's two generators, which a checkpoint has of every rank
GRADIENTS = "gradients"
BACKWARD = "the gradient of batch statistics"


@dataclass(frozen=True)
class Message:
    """Collectives of one size that one place in the code starts, in one round; a broadcast counts as an all-reduce."""

    place: str  # GRADIENTS, or the module and function that asks
    fixed: float  # bytes
    per_example: float  # further bytes for each example of the global batch
    count: float

    def bytes(self, batch: float) -> float:
        return self.fixed + self.per_example * batch


@dataclass(frozen=True)
class Account:
    """One round of a model under a recipe."""

    parameters: int
    batch: int
    precision: str
    plays: dict[str, float]  # turn -> plays a round
    messages: tuple[Message, ...]
    once: tuple[Message, ...]  # when a turn without players opens: its statistics
    flops_per_example: float  # of the global batch, all plays of a round
    flops_fixed: float  # a round's, however many examples: Gibbs chains
    kernels: float  # a round's, on each of several ranks, the optimiser's step counting one
    kernels_alone: float  # on one rank
    model_bytes: int  # parameters, buffers and chains: `best.pt`
    optimiser_bytes: int
    average_bytes: int
    most_workers: int  # examples, or chains if fewer: each worker needs one
    limited_by: str

    @property
    def checkpoint_bytes(self) -> int:
        """Of `last.pt`, without the random states, which grow with the workers."""
        return self.model_bytes + self.optimiser_bytes + self.average_bytes

    def gradient_bytes(self) -> float:
        return sum(m.count * m.fixed for m in self.messages if m.place == GRADIENTS)

    def flops(self, examples: float) -> float:
        return self.flops_per_example * examples + self.flops_fixed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Account:
        lists = {key: tuple(Message(**m) for m in given[key]) for key in ("messages", "once")}
        return cls(**{**given, **lists})


@contextlib.contextmanager
def pretend(world: int = WORLD) -> Iterator[None]:
    """A process group whose other ranks do not exist: every collective returns at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Recorder(TorchDispatchMode):
    """Counts kernels and operations, and notes every all-reduce and broadcast with the place that asks for it."""

    def __init__(self, *, pretended: bool = True) -> None:
        super().__init__()
        self.pretended = pretended
        self.flops = self.kernels = 0
        self.calls: list[tuple[str, int]] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.paused:
            return out
        is_message, is_view, formula = _kind(func)
        if is_message:
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.calls += [(_place(), t.nbytes) for t in tensors]
            if self.pretended and "allreduce" in str(
                func
            ):  # the others hold what this rank holds, so that counts of rows are right
                for t in tensors:
                    t.mul_(distributed.world_size())
        self.kernels += not (is_message or is_view)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


@functools.cache
def _kind(func: Any) -> tuple[bool, bool, Callable[..., int] | None]:
    """Whether it is a collective, whether it only looks at what is there, and how many operations it is."""
    returned = [r.alias_info for r in func._schema.returns]
    is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return func.namespace == "c10d", is_view, flop_registry.get(func.overloadpacket)


def _place() -> str:
    """Where in dgm_core the running collective was asked for; the part of it that is not distributed.py."""
    frame: FrameType | None = sys._getframe(2)
    within: str | None = None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name == "distributed.py" and path.parent.name == "dgm_core":
            within = frame.f_code.co_name
        elif within is not None and "dgm_core" in path.parts:
            if within == "sum_gradients":
                return GRADIENTS
            own = "/".join(path.parts[path.parts.index("dgm_core") + 1 :])
            asks = frame.f_code.co_qualname if not frame.f_code.co_name.startswith("<") else own
            return BACKWARD if within == "backward" else f"{asks} ({own})"
        frame = frame.f_back
    return "elsewhere"


class _Metered(Trainer):
    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # autocast refuses the meta device; gradients are float32 either way


def account(
    build: Callable[[], GenerativeModel], recipe: Recipe, data: DataSpec, device: str = "meta", precision: str = "bf16"
) -> Account:
    """Play every turn of one round and count.

    Args:
        build: makes the model, on the default device.
        device: `cpu` for models whose plays read sizes from the device.
    """
    with pretend():
        small, large = (_one_round(build, recipe, data, device, examples) for examples in (1, 2))
    alone = _one_round(build, recipe, data, device, 2)
    trainer, plays = large.trainer, large.plays
    per_turn = [_messages(a, b, plays[n]) for n, a, b in zip(plays, small.calls, large.calls, strict=True)]
    slope = large.flops - small.flops  # of one example more on this rank
    fixed = small.flops - slope
    model = trainer.model
    batch = min(recipe.batch_size_at(p) for p in (0.0, *_starts(recipe)))
    chains = [model.state_dict()[name].shape[0] * WORLD for name in model.chains]
    states = [player.state_dict() for player in trainer.players.values()]
    return Account(
        parameters=sum(p.numel() for p in model.parameters()),
        batch=batch,
        precision=precision if recipe.precision == "auto" else recipe.precision,
        plays=plays,
        messages=tuple(_merged(m for turn in per_turn for m in turn)),
        once=tuple(_merged(m for m in _messages(small.once, large.once, 1.0))),
        flops_per_example=slope,
        flops_fixed=WORLD * fixed,  # chains: a rank holds its share of them
        kernels=large.kernels,
        kernels_alone=alone.kernels,
        model_bytes=sum(t.nbytes * (WORLD if n in model.chains else 1) for n, t in model.state_dict().items()),
        optimiser_bytes=sum(tensor_bytes(s["optimizer"]) for s in states),
        average_bytes=sum(tensor_bytes(s["average"]) for s in states),
        most_workers=min([batch, *chains]),
        limited_by="Gibbs chains" if chains and min(chains) < batch else "examples of the batch",
    )


@dataclass
class _Round:
    trainer: Trainer
    plays: dict[str, float]
    calls: list[list[tuple[str, int]]]
    once: list[tuple[str, int]]
    flops: float
    kernels: float


def _one_round(
    build: Callable[[], GenerativeModel], recipe: Recipe, data: DataSpec, device: str, examples: int
) -> _Round:
    # Clipping is a few kernels on a GPU and a loop here.
    unclipped = {name: {"clip_norm": None, "clip_value": None} for name in recipe.optimizers}
    size = distributed.world_size() * examples
    recipe = recipe.merged({"batch_size": size, "optimizers": unclipped, "microbatch": None})
    with torch.device(device):
        model = build()
    trainer = _Metered(model, recipe, Examples(data, 8 * size, device), device=device)
    trainer.model.train()
    trainer._open_window()
    found = _Round(trainer, {}, [], [], 0.0, 0.0)
    for turn in trainer.turns:
        if not turn.players:
            found.once += _opening(build, turn, data, size)
        recorder = Recorder()
        _pause_while_stepping(trainer, recorder)
        with recorder:
            trainer._play(turn, Clock(0, recipe.steps))
        share = turn.repeat / turn.every * (turn.window[1] - turn.window[0])
        found.plays[turn.name] = share
        found.calls.append(recorder.calls)
        found.flops += share * recorder.flops
        found.kernels += share * (recorder.kernels + len(turn.players))
    return found


def _opening(build: Callable[[], GenerativeModel], turn: Turn, data: DataSpec, examples: int) -> list[tuple[str, int]]:
    """What a turn that is settled when it opens sends then."""
    model, recorder = build(), Recorder()
    with torch.no_grad(), recorder:
        model.enter(turn.name, Examples(data, 8 * examples, "cpu").one_pass(examples))
    return recorder.calls


def _pause_while_stepping(trainer: Trainer, recorder: Recorder) -> None:
    """A step is one fused kernel on a GPU and a loop over parameters here."""
    for player in trainer.players.values():
        player.optimizer.register_step_pre_hook(lambda *_: setattr(recorder, "paused", True))
        player.optimizer.register_step_post_hook(lambda *_: setattr(recorder, "paused", False))


def _messages(small: Sequence[tuple[str, int]], large: Sequence[tuple[str, int]], plays: float) -> Iterator[Message]:
    if [place for place, _ in small] != [place for place, _ in large]:
        raise RuntimeError(
            "a turn made other collectives with another batch size; which they are must not depend on the data"
        )
    for (place, a), (_, b) in zip(small, large, strict=True):
        per_example = (b - a) / WORLD
        yield Message(place, a - WORLD * per_example, per_example, plays)


def _merged(messages: Iterator[Message]) -> Iterator[Message]:
    counts: Counter[tuple[str, float, float]] = Counter()
    for m in messages:
        counts[m.place, m.fixed, m.per_example] += m.count  # pyright: ignore[reportArgumentType]
    return (Message(*key, count) for key, count in counts.items())


def tensor_bytes(value: Any) -> int:
    """Of all tensors in nested lists and mappings."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def _starts(recipe: Recipe) -> list[float]:
    return [] if isinstance(recipe.batch_size, int) else [start for start, _ in recipe.batch_size]
