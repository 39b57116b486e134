"""What a search looks through and what it has found: a case, values for keys of a run, trials, their ledger, the best.

Nothing here knows Ray: a ledger can be read, and a trial's configuration sampled, without a cluster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dgm_core.config import Recipe, RecipeError, merge
from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.data.shards import open_dataset
from dgm_core.evaluation.files import write_atomically
from pipelines import state
from pipelines.command import Usage
from pipelines.params import Params, Run, resolve
from pipelines.space import Distribution, Search
from pipelines.train import check

Mode = Literal["min", "max"]
Values = dict[str, Any]  # dotted key -> value

UNTUNED = Path("tuned", ".none")  # a search starts from what params.yaml says, not from what an earlier one found

# Of a search itself, or of the clock that all its trials share.
RESERVED = {
    "recipe.steps": "the budget of a trial: set tune.{run}.steps",
    "recipe.evaluate_every": "when trials are compared: set tune.{run}.grace",
    "recipe.monitor": "what trials are compared by: set tune.{run}.monitor",
}
# What takes effect in mid-training. Shapes do not, and what a checkpoint's optimiser remembers (betas, eps, decay)
# would come back with it.
IN_FLIGHT = {"lr", "clip_norm", "clip_value", "schedule", "final", "warmup"}

JUDGED = "val/frechet"  # what validation measures only with a judge


@dataclass(frozen=True)
class Case:
    """A run and the search for its settings, all that is implied worked out."""

    name: str
    run: Run
    search: Search
    metric: str
    mode: Mode
    keeps_best: bool  # whether training keeps the best by the metric, and not the last
    steps: int
    every: int  # rounds between validations, at which trials are compared
    default: Values  # what the searched keys are without a search
    key: str  # of all that the outcome depends on

    @classmethod
    def of(cls, params: Params, name: str) -> Case:
        """Of an entry of `tune:`, checked.

        Raises:
            Usage: there is no such entry, or it does not fit its run.
        """
        run = params.run(name)
        if name not in params.tune:
            raise Usage(f"params.yaml: tune has no entry {name!r}; known: {', '.join(params.tune) or 'none'}")
        search, data, judge = params.tune[name], Path("data", run.data), Path("judges", run.judge)
        spec = open_dataset(data).spec
        _, config, recipe = resolve(name, run, spec, UNTUNED)
        metric, mode, keeps_best = metric_of(name, search, recipe)
        check_space(name, run, search, spec)
        if search.scheduler == "pbt" and params.cluster.least > 1:
            raise Usage(
                f"tune.{name}.scheduler: pbt trains each trial in one process, and cluster.workers is "
                f"{params.cluster.workers}: set it to 1 or 0, or search with scheduler: asha"
            )
        steps = search.steps or recipe.steps
        every = min(search.grace or max(1, steps // 9), recipe.evaluate_every or steps, steps)
        whole = {"config": config.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json")}
        key = state.fingerprint(
            run=run.model_dump(),
            search=search.model_dump(exclude={"minutes"}),
            data=state.folder_checksum(data),
            judge=state.folder_checksum(judge) if metric == JUDGED else None,
            code=state.code_hash(run.family),
            **whole,
        )
        default = {key: lookup(whole, key) for key in search.space}
        return cls(name, run, search, metric, mode, keeps_best, steps, every, default, key)


def metric_of(name: str, search: Search, recipe: Recipe) -> tuple[str, Mode, bool]:
    """What trials are compared by, in which direction, and whether training keeps the best by it.

    Raises:
        Usage: neither the recipe nor the search names it, or they differ.
    """
    if recipe.monitor is None:
        if search.monitor is None:
            raise Usage(
                f"tune.{name} needs a metric: give tune.{name}.monitor, as in [val/elbo_nats, max], or "
                f"runs.{name}.recipe.monitor; plots/{name}/curves.csv has what validation measures of the run"
            )
        return *search.monitor, False
    if search.monitor not in (None, recipe.monitor):
        raise Usage(
            f"tune.{name}.monitor is {list(search.monitor or ())}, but the run keeps its best by recipe.monitor, "
            f"{list(recipe.monitor)}: leave one of them out"
        )
    return *recipe.monitor, True


def sample(space: Mapping[str, Distribution], seed: int, number: int) -> Values:
    """The configuration of trial `number`, which depends on nothing else than the space and the seed."""
    rng = np.random.default_rng([seed, number])
    return {key: _plain(_draw(distribution, rng)) for key, distribution in space.items()}


def _draw(distribution: Distribution, rng: np.random.Generator) -> Any:
    kind, given = distribution.given
    if kind == "choice":
        return given[int(rng.integers(len(given)))]
    if kind == "randint":
        return int(rng.integers(given[0], given[1]))
    if kind == "loguniform":
        return math.exp(rng.uniform(math.log(given[0]), math.log(given[1])))
    if kind == "quniform":
        low, high, step = given
        return min(max(round(rng.uniform(low, high) / step) * step, low), high)
    return rng.uniform(*given)


def _plain(value: Any) -> Any:
    """As it will stand in a YAML file: floats to six digits, mappings and sequences of plain values."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return list(value) if isinstance(value, tuple) else value


def ends(distribution: Distribution) -> list[Any]:
    """Values that, if accepted, speak for the rest: every choice, or both ends."""
    kind, given = distribution.given
    if kind == "choice":
        return list(given)
    return [given[0], given[1] - 1] if kind == "randint" else [given[0], given[1]]


def lookup(tree: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or None where there is none."""
    found: Any = tree
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def as_tree(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"recipe.batch_size": 8} as {"recipe": {"batch_size": 8}}."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def with_values(run: Run, values: Mapping[str, Any]) -> Run:
    """The run with these values over what it says."""
    tree = as_tree(values)
    return run.model_copy(update={part: merge(getattr(run, part), tree.get(part, {})) for part in ("config", "recipe")})


def check_space(name: str, run: Run, search: Search, spec: DataSpec) -> None:
    """Try every key at its ends on the run's model, so that what is wrong is said before anything starts.

    Raises:
        Usage: a key is not the model's, is set in params.yaml too, cannot be searched, or has a value that is refused.
    """
    for key, distribution in search.space.items():
        where = f"tune.{name}.space.{key}"
        if key in RESERVED:
            raise Usage(f"{where} is {RESERVED[key].format(run=name)}")
        if lookup(run.model_dump(), key) is not None:
            raise Usage(
                f"{where}: params.yaml sets runs.{name}.{key}, and that wins over tuned/{name}.yaml, so the best value "
                f"would never be used; remove the key from runs.{name} or from the space"
            )
        if search.scheduler == "pbt":
            _check_in_flight(key, where)
        for value in ends(distribution):
            try:
                model, config, recipe = resolve(name, with_values(run, {key: value}), spec, UNTUNED)
                check(model, config, recipe, spec)
            except (Usage, DataMismatch, RecipeError, ValueError) as error:
                raise Usage(f"{where}: {value!r} is not accepted: {error}") from None


def _check_in_flight(key: str, where: str) -> None:
    parts = key.split(".")
    if key == "recipe.batch_size" or (parts[:2] == ["recipe", "optimizers"] and parts[3:] and parts[3] in IN_FLIGHT):
        return
    known = ", ".join(sorted(f"recipe.optimizers.*.{last}" for last in IN_FLIGHT))
    raise Usage(
        f"{where}: population-based training changes trials as they run, and this takes effect only at their start; it "
        f"can change recipe.batch_size, {known}. Search this key with scheduler: asha"
    )


@dataclass
class Trial:
    """One configuration and what came of it."""

    number: int
    values: Values  # {} is the default configuration
    state: Literal["running", "finished", "stopped", "failed"] = "running"
    score: float | None = None
    step: int = 0
    seconds: float = 0.0
    reports: list[tuple[int, float]] = field(default_factory=list)  # (round, score)
    error: str = ""
    member: bool = False  # of a population: its values changed as it ran, so that its score is not theirs


class Ledger:
    """The trials of a search, kept in a file as they come and go: a search that was killed goes on from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: dict[int, Trial] = {}
        if path.exists():
            for row in json.loads(path.read_text()):
                self.trials[row["number"]] = Trial(**{**row, "reports": [(int(s), v) for s, v in row["reports"]]})

    def save(self) -> None:
        rows = [asdict(trial) for _, trial in sorted(self.trials.items())]
        write_atomically(self.path, json.dumps(rows, indent=1).encode())

    def begin(self, number: int, values: Values, *, member: bool = False) -> Trial:
        """A new trial, or an unfinished one again: its configuration stays, its reports come again."""
        trial = self.trials.setdefault(number, Trial(number, values, member=member))
        trial.reports = []
        self.save()
        return trial

    @property
    def done(self) -> list[Trial]:
        return [trial for _, trial in sorted(self.trials.items()) if trial.state != "running"]


def score(values: Sequence[float], mode: Mode, keeps_best: bool) -> float:
    """What a training with these validations, in order, is worth: its best where the best is what it keeps."""
    if not keeps_best:
        return values[-1]
    return min(values) if mode == "min" else max(values)


def better(a: float, b: float, mode: Mode) -> bool:
    return a < b if mode == "min" else a > b


def best_of(trials: Iterable[Trial], mode: Mode) -> Trial | None:
    """The best of the trials that were trained to the end with what they began with; of equals, the first."""
    best: Trial | None = None
    for trial in sorted(trials, key=lambda t: t.number):
        if trial.state != "finished" or trial.member or trial.score is None or not math.isfinite(trial.score):
            continue
        if best is None or best.score is None or better(trial.score, best.score, mode):
            best = trial
    return best
