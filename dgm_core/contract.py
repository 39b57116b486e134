"""The contract: what a model is. The first file to read.

A *model* is a module that can be learnt and sampled from. Learning is a game of one or more **players**: each owns
parameters and moves them when one of its **turns** comes. On a turn the model states one scalar whose gradient, with
respect to those players' parameters, is the update that its paper prescribes. Who calls `backward` and `step`, on how
many machines and in which precision, is not the model's business.

Words: a *play* is one turn taken once (loss, backward, step). A *round* plays every turn that is due. A *window* is a
share of training in which a turn is live. *Capabilities* are nominal classes that evaluation and tests dispatch on.
"""

from __future__ import annotations

import inspect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from dgm_core.config import Recipe, Strict

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

Kind = Literal["image", "audio", "codes", "vector"]
OBSERVED = "observed"  # the context that says which values of an example are there, where some may be missing
_AXES = {"image": (3,), "audio": (1,), "codes": (1, 2), "vector": (1,)}


class DataMismatch(ValueError):
    """The data is not what the model, or the reader, can use; the message says what is and how to mend it."""


@dataclass(frozen=True)
class DataSpec:
    """What a model knows of the data before it sees any."""

    kind: Kind
    shape: tuple[int, ...]  # (C, H, W) of an image, (T,) of audio, (H, W) or (T,) of codes, (D,) of a vector
    levels: int | None  # coordinates are integers in {0, …, levels − 1}; None: real numbers
    classes: int = 0
    class_shares: tuple[float, ...] = ()  # the training split's label marginals; uniform if empty
    context: Mapping[str, DataSpec] = field(default_factory=dict)  # further inputs that come with each example
    density: Mapping[str, Any] = field(default_factory=dict)  # what it was drawn from, if known: `densities.named(**…)`

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "class_shares", tuple(float(p) for p in self.class_shares))
        if self.kind not in _AXES:
            raise DataMismatch(f"kind {self.kind!r} is not known; accepted: {', '.join(_AXES)}")
        if len(self.shape) not in _AXES[self.kind] or min(self.shape) < 1:
            axes = " or ".join(str(n) for n in _AXES[self.kind])
            raise DataMismatch(f"shape {self.shape} does not fit kind {self.kind!r}, which has {axes} positive axes")
        if self.levels is not None and self.levels < 2:
            raise DataMismatch(f"levels {self.levels} is not accepted: at least 2, or None for real-valued data")
        if self.kind == "codes" and self.levels is None:
            raise DataMismatch("codes are integers: give levels (the codebook's size)")
        if self.classes < 0 or (self.class_shares and len(self.class_shares) != self.classes):
            raise DataMismatch(f"{len(self.class_shares)} class shares were given for {self.classes} classes")

    @property
    def dims(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """How an example is stored: uint8 up to 256 levels, int64 above, float32 if real-valued."""
        if self.levels is None:
            return torch.float32
        return torch.uint8 if self.levels <= 256 else torch.int64

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of `from_dict`."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {"shape": list(self.shape), "class_shares": list(self.class_shares), "density": dict(self.density)}
        return {**plain, **lists, "context": {name: spec.to_dict() for name, spec in self.context.items()}}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        context = {k: cls.from_dict(v) for k, v in given.get("context", {}).items()}
        return cls(**{**given, "context": context})


class Batch(NamedTuple):
    """Some examples, as stored."""

    x: Shaped[Tensor, " B *shape"]
    y: Int[Tensor, " B"] | None = None
    context: Mapping[str, Tensor] = {}
    index: Int[Tensor, " B"] | None = None  # which examples: per-example state, noise that can be drawn again

    def map(self, f: Any) -> Batch:
        """Apply `f` to every tensor."""
        return Batch(
            f(self.x),
            None if self.y is None else f(self.y),
            {k: f(v) for k, v in self.context.items()},
            None if self.index is None else f(self.index),
        )

    def to(self, device: torch.device | str) -> Batch:
        return self.map(lambda t: t.to(device, non_blocking=True))

    def rows(self, rows: slice | Tensor) -> Batch:
        return self.map(lambda t: t[rows])


class Loss(NamedTuple):
    """One play's scalar, with what it says besides."""

    value: Float[Tensor, ""]  # nats per example where the objective is a likelihood
    metrics: Mapping[str, Tensor] = {}  # (), detached, on the device
    gate: Mapping[str, Tensor] = {}  # player -> 0/1: skip its step this time, decided on the device


@dataclass(frozen=True)
class Clock:
    """Where training stands: `step` rounds of `total` are done."""

    step: int
    total: int

    @property
    def progress(self) -> float:
        """In [0, 1)."""
        return self.step / self.total


@dataclass(frozen=True)
class Turn:
    """A move in the game."""

    name: str  # what `loss` is asked for
    # Whose optimisers step after it: several for simultaneous updates from one forward pass, none for a statistics turn
    # settled in `after` (EM, closed forms).
    players: tuple[str, ...]
    every: int = 1  # rounds between plays (lazy regularisation)
    repeat: int = 1  # plays per round (n_critic), each on a fresh batch
    window: tuple[float, float] = (0.0, 1.0)  # greedy layers, growing resolutions

    def live(self, clock: Clock) -> bool:
        """Whether this turn is due in the round that starts at `clock`."""
        start, end = self.window
        return start <= clock.progress < end and clock.step % self.every == 0


class GenerativeModel(nn.Module, ABC):
    """A module that can be learnt and sampled from. Models speak data units: `x` arrives and samples leave as stored.

    Randomness comes from torch's default generator, drawn with the batch as the leading axis; tensors are made on the
    model's device; buffers advance in training mode only, once a play: `loss` may add to statistics (it runs once a
    microbatch), `after` settles them. A turn's gradient pattern never depends on the data.
    """

    Config: ClassVar[type[Strict]]
    chains: ClassVar[frozenset[str]] = frozenset()  # buffers that belong to a rank: gathered on save, split on load
    takes_missing: ClassVar[bool] = False  # whether it goes by the context OBSERVED

    def __init__(self, config: Strict, data: DataSpec) -> None:
        """Build the network; raise `DataMismatch` for data it cannot model, in the user's words."""
        super().__init__()
        self.config = config
        self.data = data
        if OBSERVED in data.context and not self.takes_missing:
            raise DataMismatch(
                f"values of this data may be missing, and {type(self).__name__} would take those for zeros. Use ppca, "
                "or fill the gaps and prepare the data with missing: refuse"
            )

    @classmethod
    @abstractmethod
    def defaults(cls, data: DataSpec) -> tuple[Strict, Recipe]:
        """The paper's configuration and recipe, for this kind of data."""

    @classmethod
    @abstractmethod
    def tiny(cls, data: DataSpec) -> tuple[Strict, Recipe]:
        """Seconds on one core, and still learns: for tests and smoke runs."""

    @abstractmethod
    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        """The scalar whose gradient is this turn's update (the mean over the batch's examples)."""

    @abstractmethod
    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        """Draw (n, *shape) in data units; with y=None a conditional model draws labels from the training marginals.

        A model's own options (temperature, …) are keyword-only parameters; anything else is refused.
        """

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Who owns which parameters; a parameter has one owner."""
        return {"model": list(self.parameters())}

    def turns(self) -> Sequence[Turn]:
        """One turn a player, unless the paper says otherwise."""
        return [Turn(name, (name,)) for name in self.players()]

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        """Called once, on every rank, when a turn's window opens, and never again on resume.

        `batches` is one pass over this rank's share of the training split: k-means, closed forms, a virtual batch.
        """

    def after(self, turn: str, clock: Clock) -> None:
        """Called once after each play: projections, clipping, momentum schedules, M-steps."""

    def calibrate(self, batches: Iterator[Batch], **options: Any) -> None:
        """Called on the copy that will sample: standing statistics."""

    @property
    def device(self) -> torch.device:
        """Where the model's tensors live."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def draw_labels(self, n: int) -> Int[Tensor, " n"]:
        """Labels from the training split's marginals, on the model's device."""
        if not self.data.classes:
            raise DataMismatch("the data has no classes, so there are no labels to draw")
        shares = self.data.class_shares or (1.0,) * self.data.classes
        weights = torch.tensor(shares, device=self.device, dtype=torch.float32)
        return torch.multinomial(weights, n, replacement=True)

    def labels_for(self, n: int, y: Tensor | None) -> Int[Tensor, " n"]:
        """A conditional model's n labels: those given, checked, else drawn from the training marginals."""
        if y is None:
            return self.draw_labels(n)
        if y.shape != (n,):
            raise DataMismatch(f"y has shape {tuple(y.shape)}; one label a sample is needed: ({n},)")
        if y.device.type != "meta" and bool(((y < 0) | (y >= self.data.classes)).any()):
            raise DataMismatch(f"labels lie in 0 … {self.data.classes - 1}; given {y.min().item()} … {y.max().item()}")
        return y.to(self.device)

    @classmethod
    def sample_options(cls) -> dict[str, Any]:
        """Names and defaults of the options that this model's `sample` takes."""
        parameters = inspect.signature(cls.sample).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
