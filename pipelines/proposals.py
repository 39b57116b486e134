"""The driver's side of a search: what is tried next, what is stopped, and what is written of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from pipelines.search import Case, Ledger, Trial, Values, sample
from pipelines.space import Distribution
from pipelines.study import Study
from pipelines.text import number as shown
from pipelines.tracking import Tracker

DEFAULT = 0  # the number of the trial that changes nothing


class Proposals(Searcher):
    """Hands out the trials that are wanted and not done: number -> values, or None where they are still to be found.

    Those are sampled, each by its own number, or asked of Optuna.
    """

    def __init__(self, case: Case, ledger: Ledger, wanted: Mapping[int, Values | None]) -> None:
        super().__init__(metric="score", mode=case.mode)
        self.case, self.ledger, self.wanted = case, ledger, wanted
        self.given: set[int] = {trial.number for trial in ledger.done}
        self.halted = False
        self.asked: dict[int, optuna.Trial] = {}
        self.study: Study | None = None
        if case.search.search == "optuna":
            # A search that goes on asks a sampler of its own: the same seed would ask for the same again.
            seed, startup = case.search.seed + len(self.given), max(2, case.search.trials // 3)
            self.study = Study(case.search.space, case.mode, seed, startup)
            for trial in ledger.done:
                self.study.add(trial, trial.values or case.default)

    @property
    def left(self) -> list[int]:
        return [number for number in self.wanted if number not in self.given]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if not self.left or self.halted:
            return Searcher.FINISHED
        number = self.left[0]
        self.given.add(number)
        values = self._values(number)
        self.ledger.begin(number, values)
        return {"trial": {"number": number, "values": values}}

    def _values(self, number: int) -> Values:
        wanted, known = self.wanted[number], self.ledger.trials.get(number)  # known: it was killed; the same again
        if wanted is not None:
            return wanted
        if self.study is not None:
            self.asked[number], values = self.study.ask(known.values if known else None)
            return values
        return known.values if known else sample(self.case.search.space, self.case.search.seed, number)

    def tell(self, trial: Trial) -> None:
        """A trial has ended."""
        if trial.number == DEFAULT and trial.error.startswith("RecipeError"):
            self.halted = True  # as every other would
        if self.study is not None:
            if trial.number in self.asked:
                self.study.tell(self.asked.pop(trial.number), trial)
            else:
                self.study.add(trial, trial.values or self.case.default)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """The ledger's keeper says what became of a trial."""

    def save(self, checkpoint_path: str) -> None:
        """The ledger is what is gone on from; Tune wants a file."""
        open(checkpoint_path, "w").close()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is in the file."""


class Asha(ASHAScheduler):
    """ASHA that leaves the default configuration alone: the others are measured against it."""

    def __init__(self, case: Case, ledger: Ledger) -> None:
        super().__init__(
            time_attr="step",
            metric="score",
            mode=case.mode,
            grace_period=case.every,
            max_t=max(case.every, case.steps - case.every),  # no rung at the end, where there is nothing left to save
            reduction_factor=case.search.reduction,
            stop_last_trials=False,
        )
        for trial in ledger.done:  # who goes on is measured against those of before, too
            stub: Any = SimpleNamespace(trial_id=f"before-{trial.number}")
            self.on_trial_add(None, stub)  # pyright: ignore[reportArgumentType]
            for step, value in trial.reports:
                super().on_trial_result(None, stub, {"step": step, "score": value})  # pyright: ignore[reportArgumentType]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config["trial"]["number"] == DEFAULT else decision


def population_based(case: Case) -> PopulationBasedTraining:
    """At each validation the worst quarter takes state and values of one of the best, the values a little changed."""

    def mutation(distribution: Distribution) -> Any:
        kind, given = distribution.given
        return list(given) if kind == "choice" else getattr(tune, kind)(*given)

    def within(config: dict[str, Any]) -> dict[str, Any]:
        values = {key: case.search.space[key].near(value) for key, value in config["trial"]["values"].items()}
        return {**config, "trial": {**config["trial"], "values": values}}

    return PopulationBasedTraining(
        time_attr="step",
        metric="score",
        mode=case.mode,
        perturbation_interval=case.every,
        hyperparam_mutations={"trial": {"values": {k: mutation(d) for k, d in case.search.space.items()}}},
        custom_explore_fn=within,
        log_config=False,
        synch=True,  # all meet before the worst are told: the outcome does not depend on who is quicker
    )


class Keeper(tune.Callback):
    """Writes the ledger and an MLflow run for each trial, and says how it went.

    A trial's run ends as FINISHED where it was trained to the end, as KILLED where it was stopped (by ASHA or by the
    clock), and as FAILED where it could not go on.
    """

    def __init__(
        self,
        ledger: Ledger,
        tell: Callable[[Trial], None],
        tracker: Callable[[Trial], AbstractContextManager[Tracker]],
        *,
        metric: str,
        total: int,
    ) -> None:
        self.ledger, self.tell, self.tracker, self.metric, self.total = ledger, tell, tracker, metric, total
        self.open: dict[int, tuple[ExitStack, Tracker]] = {}
        self.writers: dict[int, Callable[[Mapping[str, Any]], None]] = {}
        self.started: dict[int, float] = {}

    def _of(self, trial: Any) -> Trial:
        return self.ledger.trials[int(str(trial))]  # by its name: population-based training changes its config

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        kept = self._of(trial)
        if kept.number in self.open:  # it was paused, or its actor died
            return
        self.started[kept.number] = time.monotonic() - kept.seconds
        stack = ExitStack()
        tracker = stack.enter_context(self.tracker(kept))
        self.open[kept.number] = stack, tracker
        self.writers[kept.number] = tracker.writer()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        kept = self._of(trial)
        self.writers[kept.number]({"rows": result.pop("rows", []), "images": result.pop("images", {})})
        kept.step, kept.seconds = int(result["step"]), time.monotonic() - self.started[kept.number]
        if "error" in result:
            kept.state, kept.error = "failed", str(result["error"])
            return
        kept.score = float(result["score"])
        if result.get("ended"):
            kept.state = "finished"
        elif not kept.reports or kept.step > kept.reports[-1][0]:
            kept.reports.append((kept.step, kept.score))
        kept.values = dict(trial.config["trial"]["values"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        kept = self._of(trial)
        if kept.state == "running":
            kept.state = "stopped"
        self._close(kept)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        kept = self._of(trial)
        lines = str(trial.get_error() or "").strip().splitlines()
        kept.state, kept.error = "failed", lines[-1] if lines else "the trial's process died"
        self._close(kept)

    def _close(self, kept: Trial) -> None:
        self.tell(kept)
        stack, tracker = self.open.pop(kept.number)
        tracker.status = {"finished": "FINISHED", "stopped": "KILLED"}.get(kept.state, "FAILED")
        stack.close()
        self.ledger.save()  # last: a trial that is done there is done everywhere
        sys.stdout.write(f"{self._line(kept)}\n")
        sys.stdout.flush()

    def _line(self, kept: Trial) -> str:
        what = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in kept.values.items()) or "default"
        how = kept.error if kept.state == "failed" else f"{self.metric} {shown(kept.score)}"
        done = f"{len(self.ledger.done)} of {self.total} done"
        return f"trial {kept.number} ({done}): {kept.state} in round {kept.step}, {how}; {what}"

    def close(self) -> None:
        """End the MLflow runs of trials that did not come to an end: they go on when the search does."""
        for stack, tracker in self.open.values():
            tracker.status = "FAILED"
            stack.close()
        self.open.clear()
