"""A search on Ray Tune, from its plan to its last trial."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler

from pipelines.connect import connected
from pipelines.params import Cluster, Params
from pipelines.place import Place
from pipelines.proposals import Asha, Keeper, Proposals
from pipelines.search import JUDGED, Case, Ledger, Trial
from pipelines.storage import Storage
from pipelines.tracking import Tracker
from pipelines.trials import Plan, free_placement_groups, label, resources, run_trial, slots

TIDYING_SECONDS = 15


def run_search(case: Case, params: Params, ledger: Ledger, tracker: Tracker, folder: Path) -> None:
    """Run the trials that the ledger does not have yet; when it returns, nothing of them is left on the cluster."""
    joined = params.cluster if params.cluster.most else params.cluster.model_copy(update={"workers": 1})
    # Tune is for searches on a screen; here the ledger and MLflow keep what it would write.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    with connected(joined, dashboard=True):
        place = Place.of(joined)
        proposals = Proposals(case, ledger)
        side_by_side, cpus = slots(params.cluster, proposals.left, ray.cluster_resources())
        cluster = params.cluster.model_copy(update={"workers": params.cluster.least, "cpus_per_worker": cpus})
        plan = Plan(
            case,
            cluster,
            place,
            data=place.send(Path("data", case.run.data)),
            judge=place.send(Path("judges", case.run.judge)) if case.metric == JUDGED else None,
            state=str(folder / "trials") if place.storage is None else f"state/{folder.name}/trials",
        )
        keeper = Keeper(ledger, proposals.tell, _child(case, params, tracker.run_id, folder), metric=case.metric,
                        total=case.search.trials)  # fmt: skip
        try:
            if proposals.left:
                scheduler = Asha(case, ledger) if case.search.scheduler == "asha" else FIFOScheduler()
                options = {"search_alg": proposals, "max_concurrent_trials": side_by_side, "scheduler": scheduler}
                _fit(plan, keeper, joined, folder, num_samples=proposals.left, **options)
        finally:
            keeper.close()
            if leaked := free_placement_groups(TIDYING_SECONDS):
                sys.stderr.write(f"{leaked} placement groups of stopped trials had to be removed\n")


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


def _fit(plan: Plan, keeper: Keeper, joined: Cluster, folder: Path, param_space: Any = None, **options: Any) -> None:
    storage = Storage(joined.storage if joined.shared else str(joined.local), joined.storage_patience_s)
    filesystem, root = storage.filesystem
    key = f"tune/{folder.name}-{uuid.uuid4().hex[:8]}"
    minutes = plan.case.search.minutes
    try:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, plan=plan), resources(plan)),
            param_space=param_space or {},
            tune_config=tune.TuneConfig(
                time_budget_s=60 * minutes if minutes else None,
                trial_name_creator=lambda trial: label(trial.config["number"]),
                trial_dirname_creator=lambda trial: label(trial.config["number"]),
                **options,
            ),
            run_config=tune.RunConfig(
                name=key.rpartition("/")[2],
                storage_path=f"{root}/tune",
                storage_filesystem=filesystem,
                callbacks=[keeper],
                failure_config=tune.FailureConfig(max_failures=joined.max_failures),
                verbose=0,
            ),
        ).fit()
    finally:
        storage.delete(key)
