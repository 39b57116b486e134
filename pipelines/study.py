"""Optuna's part in a search: what to try next, and which keys mattered."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from scipy.stats import spearmanr

from pipelines.search import Mode, Trial, Values
from pipelines.space import Distribution

FEW = 4  # finished trials; a forest of fewer says nothing

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

_STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


class Study:
    """An Optuna study over a space of dotted keys. Choices go by their position: any YAML value can be one."""

    def __init__(self, space: Mapping[str, Distribution], mode: Mode, seed: int, startup: int = 10) -> None:
        self.space = space
        self.distributions = {key: _distribution(given) for key, given in space.items()}
        # Trials side by side: those that run are taken for bad ones, so that proposals keep apart.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
        direction = "minimize" if mode == "min" else "maximize"
        self.study = optuna.create_study(direction=direction, sampler=sampler)

    def ask(self, values: Values | None = None) -> tuple[optuna.Trial, Values]:
        """The next configuration, or this one again."""
        if values is not None:
            self.study.enqueue_trial(self._to_optuna(values))
        trial = self.study.ask(self.distributions)
        return trial, self._from_optuna(trial.params)

    def tell(self, asked: optuna.Trial, trial: Trial) -> None:
        for step, value in trial.reports:
            asked.report(value, step)
        state = _STATES[trial.state]
        value = trial.score if state == TrialState.COMPLETE else None
        self.study.tell(asked, value, state=state, skip_if_finished=True)

    def add(self, trial: Trial, values: Values) -> None:
        """A trial that was run before, or apart; left out where its values are not in the space."""
        state = _STATES[trial.state]
        try:
            given = optuna.trial.create_trial(
                state=state,
                value=trial.score if state == TrialState.COMPLETE else None,
                params=self._to_optuna(values),
                distributions=self.distributions,
                intermediate_values=dict(trial.reports),
            )
        except (ValueError, KeyError):
            return
        self.study.add_trial(given)

    def _to_optuna(self, values: Values) -> dict[str, Any]:
        params = {}
        for key, value in values.items():
            kind, given = self.space[key].given
            params[key] = [_same(option) for option in given].index(_same(value)) if kind == "choice" else value
        return params

    def _from_optuna(self, params: Mapping[str, Any]) -> Values:
        values: Values = {}
        for key, value in params.items():
            kind, given = self.space[key].given
            chosen = given[value] if kind == "choice" else value
            values[key] = float(f"{chosen:.6g}") if isinstance(chosen, float) else chosen
        return values


def _same(value: Any) -> Any:
    """Lists and tuples with the same content are the same choice."""
    return tuple(map(_same, value)) if isinstance(value, list | tuple) else value


def _distribution(given: Distribution) -> BaseDistribution:
    kind, arguments = given.given
    if kind == "choice":
        return CategoricalDistribution(range(len(arguments)))
    if kind == "randint":
        return IntDistribution(arguments[0], arguments[1] - 1)
    step = arguments[2] if kind == "quniform" else None
    return FloatDistribution(arguments[0], arguments[1], log=kind == "loguniform", step=step)


def importance(
    space: Mapping[str, Distribution], mode: Mode, trials: Sequence[Trial], default: Values
) -> tuple[dict[str, float], str]:
    """How much of the difference between trials each key explains, most first, and how that was found out.

    With few finished trials it is |Spearman's ρ| of the key's value and the last score, over all that have one.
    """
    study = Study(space, mode, seed=0)
    for trial in trials:
        study.add(trial, trial.values or default)
    complete = [t for t in study.study.trials if t.state == TrialState.COMPLETE]
    if len(complete) >= FEW and len({t.value for t in complete}) > 1:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return dict(
            optuna.importance.get_param_importances(study.study, evaluator=evaluator)
        ), "fANOVA, finished trials"
    scored = [(study._to_optuna(t.values), t.score) for t in trials if t.values and t.score is not None]
    found = {}
    for key in space:
        column, scores = [values[key] for values, _ in scored], [value for _, value in scored]
        varied = len(set(column)) > 1 and len(set(scores)) > 1
        found[key] = abs(float(np.asarray(spearmanr(column, scores))[0])) if varied else 0.0
    return dict(sorted(found.items(), key=lambda item: -item[1])), "rank correlation"
