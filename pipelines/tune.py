"""Stage `tune@<run>` of tuning/dvc.yaml: search for better settings of a run, as `tune:` in params.yaml says.

    python -m pipelines.tune RUN            # or `make tune RUN=…`, which makes the data first
    python -m pipelines.tune RUN --adopt    # write tuned/RUN.yaml again from the search that was made

Outs: `tuning/<run>/` (search.json, search.png). Beside them the stage writes `tuned/<run>.yaml`, which is no out of
it: DVC would walk the search whenever the run is reproduced, and delete the file while it searches.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from dgm_core import runs
from dgm_core.evaluation.files import write_atomically
from pipelines import state
from pipelines.command import JobFailed, Usage, run_main
from pipelines.params import load_params
from pipelines.search import Case, Ledger, Trial, as_tree, best_of, better
from pipelines.text import number as shown
from pipelines.tracking import Tracker


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.tune", description="Search for better settings of a run."
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--adopt", action="store_true", help="write tuned/RUN.yaml from the search that was made")
    given = parser.parse_args(argv)
    if given.adopt:
        adopt(given.run)
        return 0
    params = load_params()
    case = Case.of(params, given.run)
    with state.in_progress(params.cluster, f"tune-{given.run}", case.key) as folder:
        ledger = Ledger(folder / "ledger.json")
        tracker = Tracker(params.tracking, f"{given.run}-search", params.cluster.local)
        tags = {"stage": "tune", "model": case.run.model, "data": case.run.data}
        with tracker.running(None, memo=folder / "mlflow.json", **tags):
            tracker.log_config({"run": case.run.model_dump(), "search": case.search.model_dump(exclude_none=True)})
            from pipelines.searching import run_search  # Ray's Tune and Optuna take seconds to import

            run_search(case, params, ledger, tracker, folder)
            found = outcome(case, ledger.done)
            with runs.replaced_folder(Path("tuning", given.run)) as out:
                write_atomically(out / "search.json", (json.dumps(found, indent=1) + "\n").encode())
                (out / "search.png").write_bytes(picture(case, ledger.done, found))
            tracker.log_results(_numbers(found), Path("tuning", given.run), path="search")
        adopt(given.run)
    _say(found)
    return 0


def outcome(case: Case, trials: Sequence[Trial]) -> dict[str, Any]:
    """What a search found, in plain values; the same search finds the same.

    Raises:
        JobFailed: no trial was trained to the end.
    """
    from pipelines.study import importance

    best = best_of(trials, case.mode)
    if best is None or best.score is None:
        errors = [trial.error for trial in trials if trial.error]
        raise JobFailed(f"no trial was trained to the end{f'; the first one: {errors[0]}' if errors else ''}")
    default = next((t.score for t in trials if not t.values and t.state == "finished"), None)
    won = bool(best.values) and (default is None or better(best.score, default, case.mode))
    shares, how = importance(case.search.space, case.mode, trials, case.default)
    return {
        "run": case.name,
        "model": case.run.model,
        "data": case.run.data,
        "key": case.key,
        "metric": case.metric,
        "mode": case.mode,
        "search": case.search.search,
        "scheduler": case.search.scheduler,
        "seed": case.search.seed,
        "steps": case.steps,
        "default": {"values": case.default, "score": default},
        "best": {"trial": best.number, "values": best.values, "score": best.score} if won else None,
        "importance": {"by": how, "shares": shares},
        "trials": [
            {
                "trial": t.number,
                "state": t.state,
                "step": t.step,
                "score": t.score,
                "values": t.values,
                "error": t.error,
            }
            for t in trials
        ],
    }


def picture(case: Case, trials: Sequence[Trial], found: dict[str, Any]) -> bytes:
    from pipelines import search_picture

    best = found["best"]["trial"] if found["best"] else None
    shares = found["importance"]["shares"], found["importance"]["by"]
    return search_picture.draw(case.search.space, trials, case.default, best, shares, case.metric)


def adopt(name: str) -> None:
    """Write `tuned/<run>.yaml` from `tuning/<run>/search.json`: the best trial's settings and where they came from."""
    path = Path("tuning", name, "search.json")
    if not path.is_file():
        raise Usage(f"{path} is not there: search first, with `make tune RUN={name}`")
    found = json.loads(path.read_text())
    best = found["best"]
    text = {
        **as_tree(best["values"] if best else {}),
        "from": {
            **{key: found[key] for key in ("search", "scheduler", "seed", "steps", "metric", "mode", "key")},
            "trials": len(found["trials"]),
            "trial": best["trial"] if best else 0,
            "value": best["score"] if best else found["default"]["score"],
            "default": found["default"]["score"],
        },
    }
    yaml, out = YAML(), StringIO()
    yaml.default_flow_style = False
    out.write(f"# Found by `make tune RUN={name}`. Settings: paper < this < params.yaml.\n")
    yaml.dump(text, out)
    Path("tuned").mkdir(exist_ok=True)
    write_atomically(Path("tuned", f"{name}.yaml"), out.getvalue().encode())


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """For the search's MLflow run."""
    numbers = {"default": found["default"]["score"], "best": found["best"]["score"] if found["best"] else None}
    return {f"{which}/{found['metric']}": value for which, value in numbers.items() if value is not None}


def _say(found: dict[str, Any]) -> None:
    name, metric, best = found["run"], found["metric"], found["best"]
    default = f"{metric} {shown(found['default']['score'])} by default"
    if best is None:
        sys.stdout.write(f"{name}: nothing beat the default ({default}); tuned/{name}.yaml says so\n")
        return
    settings = ", ".join(f"{key} {value}" for key, value in best["values"].items())
    sys.stdout.write(
        f"{name}: {metric} {shown(best['score'])} by trial {best['trial']}, {default}\n"
        f"  {settings}\n"
        f"  tuned/{name}.yaml has them from now on; the run trains with them at the next dvc repro\n"
    )


if __name__ == "__main__":
    from pipelines.tune import main as stage  # by its own name, so that workers can import what they are sent

    run_main(stage)
