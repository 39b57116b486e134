"""The trainer against closed forms and against itself: order of plays, averaging, resuming, gating, refusing NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_core.config import Optimizer, ParameterGroup, Recipe, RecipeError, Strict
from dgm_core.contract import Batch, Clock, DataSpec, GenerativeModel, Loss, Turn
from dgm_core.training import checkpoint, history
from dgm_core.training.history import NonFiniteLoss
from dgm_core.training.optimisers import lr_factor
from dgm_core.training.trainer import Schedule, Trainer
from tests.support import Tensors, TwoRanks

SPEC = DataSpec("vector", (3,), None)


class Game(GenerativeModel):
    """Two players, each pulled towards the data's mean; writes down what happens."""

    class Config(Strict):
        turns: tuple[tuple[str, int, int, float, float], ...] = (("a", 1, 1, 0.0, 1.0), ("b", 1, 1, 0.0, 1.0))
        noise: float = 0.0
        closed_from: int = 10**9
        bad_from: int = 10**9

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        sgd = Optimizer(algorithm="sgd", lr=0.1)
        return cls.Config(), Recipe(steps=10, batch_size=4, precision="fp64", optimizers={"a": sgd, "b": sgd})

    tiny = defaults

    def __init__(self, config: Config | None = None, data: DataSpec = SPEC) -> None:
        super().__init__(config or self.Config(), data)
        self.a = nn.Parameter(torch.zeros(3))
        self.b = nn.Parameter(torch.zeros(3))
        self.log: list[str] = []
        self.seen: list[int] = []

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"a": [self.a], "b": [self.b]}

    def turns(self) -> Sequence[Turn]:
        return [Turn(n, (n,), every=e, repeat=r, window=(s, t)) for n, e, r, s, t in self.config.turns]

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        self.log.append(f"enter {turn} {sum(len(b.x) for b in batches)}")

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        self.log.append(f"{turn}{clock.step}")
        self.seen += batch.index.tolist() if batch.index is not None else []
        p = getattr(self, turn)
        x = batch.x + self.config.noise * torch.randn_like(batch.x)
        value = 0.5 * (p - x).square().sum(1).mean()
        if clock.step >= self.config.bad_from:
            value = value * math.inf
        gate = {turn: torch.tensor(0.0)} if clock.step >= self.config.closed_from else {}
        return Loss(value, {"norm": p.detach().norm()}, gate)

    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        return self.a.expand(n, 3)


def data(n: int = 12) -> Tensors:
    g = torch.Generator().manual_seed(0)
    return Tensors(Batch(torch.randn(n, 3, generator=g, dtype=torch.float64), index=torch.arange(n)))


def recipe(**changes: Any) -> Recipe:
    return Game.defaults(SPEC)[1].merged(changes)


def test_a_play_is_one_step_of_gradient_descent_on_a_fresh_batch() -> None:
    model, source = Game(), data()
    Trainer(model, recipe(steps=1), source).fit()
    first, second = source.at(0, 4), source.at(4, 4)
    # From 0 with lr 0.1 on ½‖p − x‖²: p = 0.1 · mean(x). The second turn has the batch after the first's.
    assert torch.allclose(model.a, 0.1 * first.x.mean(0), atol=1e-15)
    assert torch.allclose(model.b, 0.1 * second.x.mean(0), atol=1e-15)


def test_every_epoch_shows_every_example_once() -> None:
    model = Game()
    Trainer(model, recipe(steps=3), data(12)).fit()  # 3 rounds × 2 turns × 4 = 2 epochs of 12
    assert sorted(model.seen) == sorted(2 * list(range(12)))


def test_turns_are_played_by_every_repeat_and_window() -> None:
    model = Game(Game.Config(turns=(("a", 1, 2, 0.0, 0.5), ("b", 3, 1, 0.2, 1.0))))
    Trainer(model, recipe(steps=10), data()).fit()
    a = ["enter a 12"] + [f"a{i}" for i in range(5) for _ in range(2)]
    b = ["enter b 12", "b3", "b6", "b9"]
    assert [e for e in model.log if "a" in e.split()[0] or e.startswith("enter a")] == a
    assert [e for e in model.log if e.startswith(("b", "enter b"))] == b


def test_microbatches_of_uneven_size_give_the_batch_gradient() -> None:
    whole, split = Game(), Game()
    Trainer(whole, recipe(steps=2, batch_size=5), data()).fit()
    Trainer(split, recipe(steps=2, batch_size=5, microbatch=2), data()).fit()
    assert torch.allclose(whole.a, split.a, atol=1e-15)


def test_a_closed_gate_moves_neither_parameters_nor_the_optimiser() -> None:
    adam = {"algorithm": "adam", "lr": 0.1}
    free = Game()
    Trainer(free, recipe(steps=4, optimizers={"a": adam, "b": adam}), data()).fit()
    gated = Game(Game.Config(closed_from=4))
    trainer = Trainer(gated, recipe(steps=8, optimizers={"a": adam, "b": adam}), data())
    trainer.fit()
    assert torch.equal(free.a, gated.a)
    state = next(iter(trainer.players["a"].optimizer.state.values()))
    assert float(state["step"]) == 4


def test_average_is_the_exponential_moving_average_by_recursion() -> None:
    sgd = {"algorithm": "sgd", "lr": 0.1, "ema": 0.9}
    model = Game()
    trainer = Trainer(model, recipe(steps=1, optimizers={"a": sgd}), data())
    expected = torch.zeros(3, dtype=torch.float64)
    trainer.model.train()
    trainer._open_window()
    for step in range(30):
        trainer._play(trainer.turns[0], Clock(step, 30))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.a.detach()
    with trainer.averaged() as averaged:
        assert torch.allclose(averaged.a, expected, atol=1e-14)  # type: ignore[attr-defined]
    assert not torch.allclose(model.a, expected)


def test_interrupted_at_any_round_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    settings = recipe(
        steps=9, evaluate_every=2, monitor=("val/a", "min"),
        optimizers={n: {"algorithm": "adam", "lr": 0.1, "schedule": "cosine", "warmup": 3, "ema": 0.9} for n in "ab"},
    )  # fmt: skip
    config = Game.Config(noise=0.5)
    whole = Trainer(Game(config), settings, data(), folder=tmp_path / "whole", evaluate=noisy_evaluation)
    whole.fit()
    for at in range(1, 9):
        folder = tmp_path / str(at)
        polls = iter(range(100))
        stopped = Trainer(
            Game(config),
            settings,
            data(),
            folder=folder,
            evaluate=noisy_evaluation,
            stop=lambda p=polls, a=at: next(p) >= a - 1,
        ).fit()
        assert stopped.stopped == "interrupted"
        torch.manual_seed(123)
        resumed = Trainer(Game(config), settings, data(), folder=folder, evaluate=noisy_evaluation)
        outcome = resumed.fit()
        assert outcome.step == 9
        assert torch.equal(resumed.model.a, whole.model.a)  # type: ignore[attr-defined]
        assert torch.equal(resumed.players["a"].average[0], whole.players["a"].average[0])  # type: ignore[index]
        assert resumed.best == whole.best
        best = [checkpoint.load(f / "best.pt") for f in (folder, tmp_path / "whole")]
        assert torch.equal(best[0]["model"]["a"], best[1]["model"]["a"])


def noisy_evaluation(model: GenerativeModel) -> Mapping[str, float]:
    return {"val/a": float(model.a.sum() + 0.1 * torch.randn(()))}  # type: ignore[attr-defined]


def test_evaluating_does_not_move_the_random_stream() -> None:
    config = Game.Config(noise=0.5)
    often, never = Game(config), Game(config)
    Trainer(often, recipe(evaluate_every=1), data(), evaluate=noisy_evaluation).fit()
    Trainer(never, recipe(), data()).fit()
    assert torch.equal(often.a, never.a)


def test_history_has_no_step_twice_after_resuming(tmp_path: Path) -> None:
    schedule = Schedule(log_every=1, checkpoint_every=4)
    polls = iter(range(1000))

    def die(step: int, numbers: Mapping[str, float]) -> None:
        if step == 6 and next(polls) == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(Game(), recipe(), data(), folder=tmp_path, schedule=schedule, on_log=die).fit()
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"step": 7, "trai')  # a line that the kill cut short
    Trainer(Game(), recipe(), data(), folder=tmp_path, schedule=schedule, on_log=die).fit()
    assert [row["step"] for row in history.read(tmp_path / "history.jsonl")] == list(range(1, 11))


def test_a_non_finite_loss_stops_and_names_round_turn_and_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(
        Game(Game.Config(bad_from=7)),
        recipe(),
        data(),
        folder=tmp_path,
        schedule=Schedule(log_every=1, checkpoint_every=5),
    )
    with pytest.raises(
        NonFiniteLoss, match=rf"turn 'a' .* in round 7; the last good checkpoint is {tmp_path}/last\.pt"
    ):
        trainer.fit()
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 5


def test_more_steps_on_a_finished_run_go_on_from_its_end(tmp_path: Path) -> None:
    Trainer(Game(), recipe(steps=5), data(), folder=tmp_path).fit()
    model = Game()
    Trainer(model, recipe(steps=8), data(), folder=tmp_path).fit()
    assert [e for e in model.log if e.startswith("a")] == ["a5", "a6", "a7"]
    assert not any(e.startswith("enter") for e in model.log)


def test_patience_stops_early_and_stays_stopped(tmp_path: Path) -> None:
    settings = recipe(steps=100, evaluate_every=1, monitor=("val/x", "max"), patience=3)
    values = iter([1.0, 3.0, 2.0, 2.0, 2.0, 9.0])
    trainer = Trainer(Game(), settings, data(), folder=tmp_path, evaluate=lambda m: {"val/x": next(values)})
    outcome = trainer.fit()
    assert (outcome.stopped, outcome.step, outcome.best) == ("early", 5, (2, 3.0))
    again = Trainer(Game(), settings, data(), folder=tmp_path, evaluate=lambda m: {"val/x": 0.0}).fit()
    assert (again.stopped, again.step) == ("early", 5)


@pytest.mark.parametrize(
    ("settings", "step", "factor"),
    [
        ({"schedule": "constant"}, 50, 1.0),
        ({"schedule": "linear", "final": 0.5}, 50, 0.75),
        ({"schedule": "cosine"}, 50, 0.5),
        ({"schedule": "exponential", "final": 0.01}, 50, 0.1),
        ({"schedule": "constant", "warmup": 10}, 4, 0.5),
        ({"schedule": "linear", "warmup": 4}, 1, 0.5 * 0.99),
    ],
)
def test_learning_rates_by_formula(settings: dict[str, Any], step: int, factor: float) -> None:
    assert lr_factor(Optimizer(lr=1.0, **settings), Clock(step, 100)) == pytest.approx(factor)


def test_parameter_groups_by_name() -> None:
    groups = {"b": ParameterGroup(lr_scale=0.0)}
    both = {"ab": Optimizer(algorithm="sgd", lr=0.1, groups=groups)}

    class Together(Game):
        def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
            return {"ab": [self.a, self.b]}

        def turns(self) -> Sequence[Turn]:
            return [Turn("a", ("ab",)), Turn("b", ("ab",))]

    model = Together()
    Trainer(model, recipe().model_copy(update={"optimizers": both}), data()).fit()
    assert model.a.abs().sum() > 0
    assert torch.equal(model.b, torch.zeros(3, dtype=torch.float64))


def test_refusals_name_what_is_there() -> None:
    with pytest.raises(RecipeError, match=r"players are \['a', 'b'\]"):
        Trainer(Game(), recipe().model_copy(update={"optimizers": {"c": Optimizer(lr=1)}}), data())
    watching = Trainer(Game(), recipe(evaluate_every=1, monitor=("val/nope", "min")), data(), evaluate=noisy_evaluation)
    with pytest.raises(RecipeError, match="val/nope"):
        watching.fit()


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(checkpoint.CheckpointError, match="delete it to start afresh"):
        Trainer(Game(), recipe(), data(), folder=tmp_path).fit()


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"step": Evil()}, tmp_path / "last.pt")
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_atomically({"step": 1}, tmp_path / "last.pt")

    def full(value: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(checkpoint.CheckpointError, match="disk is full"):
            checkpoint.save_atomically({"step": 2}, tmp_path / "last.pt", waits=(0.01,))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_a_disk_that_was_full_for_a_while_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's zip writer raises an error of its own, with the disk's as its context: it is seen all the same."""
    save, calls = torch.save, []

    def full_twice(value: Any, file: Any) -> None:
        calls.append(value)
        if len(calls) > 2:
            save(value, file)
            return
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full_twice)
    checkpoint.save_atomically({"step": 1}, tmp_path / "last.pt", waits=(0.01, 0.01))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
    assert len(calls) == 3


def resumed_on(folder: str, steps: int) -> list[float]:
    model = Game(Game.Config(noise=0.1))
    trainer = Trainer(model, recipe(steps=steps, batch_size=5), data(), folder=Path(folder))
    trainer.fit()
    return [*model.a.tolist(), trainer.position]


def test_a_checkpoint_goes_on_on_another_number_of_ranks(two_ranks: TwoRanks, tmp_path: Path) -> None:
    resumed_on(str(tmp_path), 4)
    first, second = two_ranks.run(resumed_on, str(tmp_path), 8)
    assert first == second
    assert first[-1] == 8 * 2 * 5  # the same round and the same position in the data
    assert resumed_on(str(tmp_path), 9)[-1] == 9 * 2 * 5


def ranks_disagree() -> str:
    from dgm_core import distributed

    class BadOnRankOne(Game):
        def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
            loss = super().loss(batch, turn, clock)
            bad = distributed.rank() == 1 and clock.step == 2
            return Loss(loss.value * math.nan if bad else loss.value)

    try:
        Trainer(BadOnRankOne(), recipe(), data()).fit()
    except NonFiniteLoss as error:
        return str(error)
    return "nothing was raised"


def test_every_rank_stops_where_one_has_a_bad_loss(two_ranks: TwoRanks) -> None:
    for message in two_ranks.run(ranks_disagree):
        assert "in round 2" in message


def averaged_unevenly() -> list[float]:
    model = Game()
    Trainer(model, recipe(steps=3, batch_size=5), data()).fit()  # 2 examples here, 3 there
    return model.a.tolist()


def test_uneven_shares_are_weighted_by_their_size(two_ranks: TwoRanks) -> None:
    alone = averaged_unevenly()
    for result in two_ranks.run(averaged_unevenly):
        assert result == pytest.approx(alone, abs=1e-15)


def test_a_batch_smaller_than_the_number_of_ranks_is_refused(two_ranks: TwoRanks) -> None:
    for message in two_ranks.run(too_small):
        assert "fewer workers or a larger batch" in message


def too_small() -> str:
    try:
        Trainer(Game(), recipe(batch_size=1), data())
    except RecipeError as error:
        return str(error)
    return "nothing was raised"
