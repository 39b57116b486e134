"""A search on Ray Tune, from its plan to its last trial."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler

from pipelines.connect import connected
from pipelines.params import Cluster, Params
from pipelines.place import Place
from pipelines.placement import free_placement_groups
from pipelines.proposals import DEFAULT, Asha, Keeper, Proposals, population_based
from pipelines.search import JUDGED, Case, Ledger, Trial, Values, sample
from pipelines.storage import Storage
from pipelines.tracking import Tracker
from pipelines.trials import Actor, Plan, label, resources, slots

TIDYING_SECONDS = 15


def run_search(case: Case, params: Params, ledger: Ledger, tracker: Tracker, folder: Path) -> None:
    """Run the trials that the ledger does not have yet; when it returns, nothing of them is left on the cluster."""
    joined = params.cluster if params.cluster.most else params.cluster.model_copy(update={"workers": 1})
    # Tune is made to be watched; here the ledger and MLflow keep what it would print and write.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with connected(joined, dashboard=True):
        search = _Search(case, params, joined, ledger, _child(case, params, tracker.run_id, folder), folder)
        try:
            if case.search.scheduler == "pbt":
                search.population()
            else:
                search.trials({DEFAULT: {}, **dict.fromkeys(range(1, case.search.trials))})
        finally:
            if leaked := free_placement_groups(TIDYING_SECONDS):
                sys.stderr.write(f"{leaked} placement groups of stopped trials had to be removed\n")


class _Search:
    """What the parts of a search share."""

    def __init__(
        self,
        case: Case,
        params: Params,
        joined: Cluster,
        ledger: Ledger,
        child: Callable[[Trial], AbstractContextManager[Tracker]],
        folder: Path,
    ) -> None:
        self.case, self.cluster, self.joined = case, params.cluster, joined
        self.ledger, self.child, self.folder = ledger, child, folder
        self.place = Place.of(joined)
        self.data = self.place.send(Path("data", case.run.data))
        self.judge = self.place.send(Path("judges", case.run.judge)) if case.metric == JUDGED else None

    def trials(self, wanted: Mapping[int, Values | None]) -> None:
        """Train each from its beginning, or as far as the scheduler lets it."""
        proposals = Proposals(self.case, self.ledger, wanted)
        if not proposals.left:
            return
        plan, side_by_side = self._plan(len(proposals.left))
        scheduler = Asha(self.case, self.ledger) if self.case.search.scheduler == "asha" else FIFOScheduler()
        self._fit(
            plan,
            proposals.tell,
            len(wanted),
            search_alg=proposals,
            num_samples=len(proposals.left),
            max_concurrent_trials=side_by_side,
            scheduler=scheduler,
        )

    def population(self) -> None:
        """A population finds settings; that they are better than the default is shown by training with each anew."""
        search, mode = self.case.search, self.case.mode
        members = range(1, search.trials + 1)
        left = [n for n in members if self.ledger.trials.get(n) is None or self.ledger.trials[n].state == "running"]
        if left:
            random.seed(search.seed)  # what Ray's population-based training draws from
            np.random.seed(search.seed)
            known = {n: self.ledger.trials[n].values if n in self.ledger.trials else None for n in left}
            starts = [{"number": n, "values": known[n] or sample(search.space, search.seed, n)} for n in left]
            for start in starts:
                self.ledger.begin(start["number"], start["values"], member=True)
            plan, _ = self._plan(len(left), population=True)
            self._fit(
                plan,
                _tell_nobody,
                len(members) + 2,
                param_space={"trial": tune.grid_search(starts)},
                scheduler=population_based(self.case),
            )
        ended = [t for t in self.ledger.done if t.member and t.state == "finished" and t.score is not None]
        champion = sorted(ended, key=lambda t: (t.score if mode == "min" else -t.score, t.number))  # pyright: ignore[reportOptionalOperand]
        self.trials({DEFAULT: {}} | ({search.trials + 1: champion[0].values} if champion else {}))

    def _plan(self, trials: int, *, population: bool = False) -> tuple[Plan, int]:
        """For so many trials, and how many of them run side by side."""
        side_by_side, cpus = slots(self.cluster, trials, ray.cluster_resources())
        workers = 0 if population else self.cluster.least
        cluster = self.cluster.model_copy(update={"workers": workers, "cpus_per_worker": cpus})
        shared = self.place.storage is not None
        state = f"state/{self.folder.name}/trials" if shared else str(self.folder / "trials")
        return Plan(self.case, cluster, self.place, self.data, self.judge, state, population=population), side_by_side

    def _fit(
        self, plan: Plan, tell: Callable[[Trial], None], total: int, *, param_space: Any = None, **options: Any
    ) -> None:
        keeper = Keeper(self.ledger, tell, self.child, metric=self.case.metric, total=total)
        cluster, minutes = self.joined, self.case.search.minutes
        storage = Storage(cluster.storage if cluster.shared else str(cluster.local), cluster.storage_patience_s)
        filesystem, root = storage.filesystem
        name = self.folder.name
        storage.delete(f"tune/{name}")  # of a search that was killed: the ledger is what is gone on from
        try:
            tune.Tuner(
                tune.with_resources(tune.with_parameters(Actor, plan=plan), resources(plan)),
                param_space=param_space or {},
                tune_config=tune.TuneConfig(
                    time_budget_s=60 * minutes if minutes else None,
                    trial_name_creator=lambda trial: label(trial.config["trial"]["number"]),
                    trial_dirname_creator=lambda trial: label(trial.config["trial"]["number"]),
                    **options,
                ),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=f"{root}/tune",
                    storage_filesystem=filesystem,
                    callbacks=[keeper],
                    failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
                    verbose=0,
                ),
            ).fit()
        finally:
            keeper.close()
            storage.delete(f"tune/{name}")


def _tell_nobody(_: Trial) -> None:
    """A population asks nobody what to try."""


def _child(case: Case, params: Params, parent: str, folder: Path) -> Callable[[Trial], AbstractContextManager[Tracker]]:
    """Opens a trial's MLflow run, below the search's."""
    settings = params.tracking.model_copy(update={"system_metrics": False})  # the search's run has them

    @contextmanager
    def opened(trial: Trial) -> Iterator[Tracker]:
        tracker = Tracker(settings, f"{case.name}-trial-{label(trial.number)}", folder)
        memo = folder / "mlflow" / f"{label(trial.number)}.json"
        tags = {"stage": "tune", "model": case.run.model, "data": case.run.data, "dgm.trial": str(trial.number)}
        with tracker.running(None, parent=parent, memo=memo, **tags):
            tracker.log_config({**(trial.values or case.default)})
            yield tracker

    return opened
