"""The one trainer: plays every due turn of every round, knows the contract and no model.

A play: freeze all but its players' parameters → `model.loss` → backward → sum those gradients over the ranks → clip →
step (gated on the device) → `model.after`. The model is never wrapped.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dgm_core import distributed
from dgm_core.config import Recipe, RecipeError
from dgm_core.contract import Batch, Clock, GenerativeModel, Loss, Turn
from dgm_core.training import checkpoint, history
from dgm_core.training.optimisers import build_players

log = logging.getLogger(__name__)


class TrainingData(Protocol):
    """What the trainer asks of the data: any batch again by its position, and one pass in order."""

    def at(self, position: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        """This rank's share of the `size` examples from `position` on in the endless stream of shuffled epochs."""
        ...

    def one_pass(self, size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The training split in order, this rank's share of every batch."""
        ...


@dataclass(frozen=True)
class Schedule:
    """When things are written; changes nothing of what is learnt."""

    log_every: int = 50  # rounds; metrics are read from the device only then
    checkpoint_every: int | None = None  # rounds
    checkpoint_seconds: float | None = 300.0


@dataclass
class Outcome:
    """How a call of `fit` ended."""

    step: int
    stopped: str  # "finished", "early" (patience) or "interrupted" (asked to stop; resumable)
    metrics: dict[str, float] = field(default_factory=dict)  # the last validation's
    best: tuple[int, float] | None = None  # (round, monitor)


def pick_precision(recipe: Recipe, device: torch.device) -> str:
    """`auto` is bf16 on GPUs that have it and fp32 elsewhere."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


class Trainer:
    """Trains one model on this rank.

    Args:
        folder: where `last.pt`, `best.pt` and `history.jsonl` live; the same on every rank, written by rank 0. None
            keeps nothing. A folder that holds `last.pt` is resumed.
        evaluate: called on rank 0 with the averaged model in eval mode; its numbers join the history. It does not move
            the random stream of training.
        on_log: called on every rank with (round, numbers), which are the same on all of them.
        on_save: called on rank 0 with the path of every checkpoint as soon as it is written.
        hurry: polled where ranks meet; when it says so on any rank, training checkpoints and goes on.
        stop: polled; when it says so on any rank, training checkpoints and returns "interrupted".
    """

    def __init__(
        self,
        model: GenerativeModel,
        recipe: Recipe,
        data: TrainingData,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        schedule: Schedule = Schedule(),
        evaluate: Callable[[GenerativeModel], Mapping[str, float]] | None = None,
        on_log: Callable[[int, Mapping[str, float]], None] | None = None,
        on_save: Callable[[Path], None] = lambda _: None,
        hurry: Callable[[], bool] = lambda: False,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.device = torch.device(device)
        self.precision = pick_precision(recipe, self.device)
        self.model = model.to(self.device, torch.float64 if self.precision == "fp64" else None)
        if model.data.kind == "image":
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.recipe, self.data, self.seed, self.folder, self.schedule = recipe, data, seed, folder, schedule
        self.evaluate, self.on_log, self.on_save, self.hurry, self.stop = evaluate, on_log, on_save, hurry, stop
        smallest = min(recipe.batch_size_at(p) for p in (0.0, *_starts(recipe)))
        if smallest < distributed.world_size():
            raise RecipeError(
                f"batch_size {smallest} is smaller than the number of workers, {distributed.world_size()}: "
                "each needs at least one example; use fewer workers or a larger batch"
            )
        for name, tensor in sorted(self.model.state_dict().items()):
            if name not in model.chains:
                tensor.copy_(distributed.broadcast(tensor))
        self.players = build_players(self.model, recipe)
        self.turns = list(self.model.turns())
        self._loss: Callable[[Batch, str, Clock], Loss] = torch.compile(model.loss) if recipe.compile else model.loss
        self._focus: tuple[str, ...] | None = None
        self.step = self.position = 0
        self.entered: list[str] = []
        self.best: tuple[int, float] | None = None
        self.stale = 0
        self.metrics: dict[str, float] = {}
        checkpoint.seed_rank(seed)

    def fit(self) -> Outcome:
        """Resume from the folder if it holds a checkpoint, then play until the recipe's last round.

        Raises:
            NonFiniteLoss: a loss became NaN or infinite.
        """
        total = self.recipe.steps
        self._resume()
        self.model.train()
        self._open_window()
        if self.step == 0:
            self._save()  # so that a failure before the first interval still says where it can go on from
        self._saved_at = self._started = time.monotonic()
        stopped = "early" if self._is_stale() else "finished"
        while self.step < total and stopped == "finished":
            self._round(Clock(self.step, total))
            self.step += 1
            stopped = self._pause()
        return Outcome(self.step, stopped, dict(self.metrics), self.best)

    def _round(self, clock: Clock) -> None:
        for turn in self.turns:
            if turn.live(clock):
                if turn.name not in self.entered:
                    self._enter(turn)
                for _ in range(turn.repeat):
                    self._play(turn, clock)

    def _pause(self) -> str:
        """Between rounds: log, evaluate and checkpoint where due; says how training stops, if it does."""
        last = self.step == self.recipe.steps
        evaluate = last or _due(self.recipe.evaluate_every, self.step)
        save = last or _due(self.schedule.checkpoint_every, self.step)
        # Ranks agree on stopping where they meet anyway; a single process can stop after any round.
        alone = distributed.world_size() == 1 and self.stop()
        if not (evaluate or save or alone or _due(self.schedule.log_every, self.step)):
            return "finished"
        self._report(evaluate)
        seconds = self.schedule.checkpoint_seconds
        overdue = seconds is not None and time.monotonic() - self._saved_at > seconds
        asked = distributed.any_true(self.stop(), self.device)
        early = self._is_stale()
        if save or asked or early or distributed.any_true(self.hurry() or overdue, self.device):
            self._save()
            self._saved_at = time.monotonic()
        if last:
            return "finished"
        return "interrupted" if asked else "early" if early else "finished"

    def _is_stale(self) -> bool:
        return self.recipe.patience is not None and self.stale >= self.recipe.patience

    def _enter(self, turn: Turn) -> None:
        size = self.recipe.batch_size_at(self.step / self.recipe.steps)
        batches = self.data.one_pass(size, rank=distributed.rank(), world=distributed.world_size())
        with torch.no_grad():
            self.model.enter(turn.name, (batch.to(self.device) for batch in batches))
        self.entered.append(turn.name)

    def _play(self, turn: Turn, clock: Clock) -> None:
        size = self.recipe.batch_size_at(clock.progress)
        rank, world = distributed.rank(), distributed.world_size()
        batch = self.data.at(self.position, size, rank=rank, world=world)
        self.position += size
        batch = self._place(batch)
        self._set_focus(turn.players)
        players = [self.players[name] for name in turn.players]
        for player in players:
            player.optimizer.zero_grad(set_to_none=True)

        rows = batch.x.shape[0]
        # As many microbatches on every rank, none of them empty: an uneven share may make one longer by an example.
        chunks = -(-(size // world) // self.recipe.microbatch) if self.recipe.microbatch else 1
        gates: dict[str, Tensor] = {}
        for i in range(chunks):
            part = batch if chunks == 1 else batch.rows(distributed.share(rows, i, chunks))
            weight = part.x.shape[0] / size  # of the global batch: ranks and microbatches may be uneven
            with self._precision(), torch.set_grad_enabled(bool(players)):
                loss = self._loss(part, turn.name, clock)
            if players:
                (loss.value * weight).backward()
            self._window.note(turn.name, loss, weight, clock.step)
            for name, gate in loss.gate.items():
                gates[name] = torch.minimum(gates[name], gate) if name in gates else gate
        with torch.no_grad():
            if players:
                distributed.sum_gradients(p for player in players for p in player.parameters)
                for player in players:
                    player.step(clock, gates.get(player.name))
            self.model.after(turn.name, clock)

    def _place(self, batch: Batch) -> Batch:
        if self.device.type == "cuda":
            batch = batch.map(lambda t: t.pin_memory())
        return batch.to(self.device)

    def _set_focus(self, names: tuple[str, ...]) -> None:
        """Only the turn's players require gradients: no graph is built for the others' parameters."""
        if names == self._focus:
            return
        self.model.requires_grad_(False)
        for name in names:
            for p in self.players[name].parameters:
                p.requires_grad_(True)
        self._focus = names

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _open_window(self) -> None:
        self._window = history.Window(self.turns, self.device, self.step, self.position)

    @property
    def _last(self) -> Path | None:
        return None if self.folder is None else self.folder / "last.pt"

    def _report(self, evaluate: bool) -> None:
        """Read the window, check it, evaluate if due, and write one line of history."""
        self._window.check_finite(self._last)
        numbers = self._window.read(self.step, self.position)
        numbers |= {"train/seconds": time.monotonic() - self._started, "train/workers": distributed.world_size()}
        for name, player in self.players.items():
            numbers[f"train/{name}/lr"] = player.optimizer.param_groups[0]["lr"]
        if evaluate and self.evaluate is not None:
            self._evaluate(numbers)
        self.metrics.update(numbers)
        if self.folder is not None and distributed.rank() == 0:
            history.append(self.folder / "history.jsonl", self.step, numbers)
        if self.on_log is not None:
            self.on_log(self.step, numbers)
        self._open_window()

    def _evaluate(self, numbers: dict[str, float]) -> None:
        assert self.evaluate is not None
        found: dict[str, float] = {}
        if distributed.rank() == 0:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices), self.averaged() as model, torch.no_grad():
                found = {k: float(v) for k, v in self.evaluate(model).items()}
        found = distributed.gather_objects(found)[0]
        numbers.update(found)
        if self.recipe.monitor is None:
            return
        name, mode = self.recipe.monitor
        if name not in found:
            raise RecipeError(
                f"recipe.monitor names {name!r}, which validation does not measure; it has {sorted(found)}"
            )
        value = found[name]
        if self.best is None or (value < self.best[1] if mode == "min" else value > self.best[1]):
            self.best, self.stale = (self.step, value), 0
            self._save_best()
        else:
            self.stale += 1

    @contextlib.contextmanager
    def averaged(self) -> Iterator[GenerativeModel]:
        """The model in eval mode with averaged parameters swapped in where the recipe keeps an average."""
        pairs = [(p, a) for pl in self.players.values() if pl.average is not None
                 for p, a in zip(pl.parameters, pl.average, strict=True)]  # fmt: skip
        training = self.model.training

        def swap() -> None:
            for p, a in pairs:
                p.data, a.data = a.data, p.data

        swap()
        self.model.eval()
        try:
            yield self.model
        finally:
            swap()
            self.model.train(training)

    def _save_best(self) -> None:
        if self.folder is None:
            return
        with self.averaged():
            state = checkpoint.model_state(self.model)
            if distributed.rank() == 0:
                checkpoint.save_atomically({"model": state, "best": self.best}, self.folder / "best.pt")
                self.on_save(self.folder / "best.pt")

    def _save(self) -> None:
        """Write `last.pt`. A collective: every rank's chains and random streams are in it."""
        if self.folder is None:
            return
        self._window.check_finite(self._last)  # a checkpoint is a good one
        state = {
            "step": self.step,
            "total": self.recipe.steps,
            "position": self.position,
            "entered": self.entered,
            "best": self.best,
            "stale": self.stale,
            "metrics": self.metrics,
            "model": checkpoint.model_state(self.model),
            "players": {name: player.state_dict() for name, player in self.players.items()},
            "random": checkpoint.random_state(self.device),
        }
        if distributed.rank() == 0:
            checkpoint.save_atomically(state, self.folder / "last.pt")
            self.on_save(self.folder / "last.pt")
        distributed.barrier()

    def _resume(self) -> None:
        if self.folder is None or not (self.folder / "last.pt").exists():
            return
        state = checkpoint.load(self.folder / "last.pt", self.device)
        checkpoint.load_model_state(self.model, state["model"])
        for name, player in self.players.items():
            player.load_state_dict(state["players"][name])
        self.step, self.position = state["step"], state["position"]
        self.entered, self.stale, self.metrics = list(state["entered"]), state["stale"], dict(state["metrics"])
        self.best = tuple(state["best"]) if state["best"] is not None else None
        checkpoint.restore_random_state(state["random"], self.device, self.seed, self.step)
        if distributed.rank() == 0:
            history.truncate(self.folder / "history.jsonl", self.step)
        log.info("resumed from round %d of %d", self.step, self.recipe.steps)


def _starts(recipe: Recipe) -> list[float]:
    return [] if isinstance(recipe.batch_size, int) else [start for start, _ in recipe.batch_size]


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
