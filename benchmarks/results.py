"""Quality rows: measure, store, show.

    python -m benchmarks.results                  lists the rows, and which of them are measured
    python -m benchmarks.results ROW [ROW …]|all  measures them into docs/results/ROW.json, then renders
    python -m benchmarks.results graph            takes the figures that `make repro` left in evaluations/
    python -m benchmarks.results render           docs/results.md from all that is stored

Exits 1 where a bound is missed or a row took longer than its budget.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.harness import ROOT, circumstances, write_json
from benchmarks.rows import QualityRow, all_rows
from dgm_core.models import CATALOG
from pipelines.report import read_evaluation

DOCS = ROOT / "docs"
NOT_TIMINGS = {
    "__init__",
    "fit",
    "harness",
    "page",
    "results",
    "start_up",
}  # files of benchmarks/ that are no benchmark


def measure(row: QualityRow, workdir: Path) -> dict[str, Any]:
    """Run the row; its figures with everything needed to read them and to measure them again.

    Raises:
        ValueError: the row returned other figures than it declares, or a value that is not finite.
    """
    start = time.perf_counter()
    measured = row.run(workdir)
    wall_s = time.perf_counter() - start
    if set(measured) != set(row.figures):
        raise ValueError(f"{row.name} declares the figures {sorted(row.figures)}, but measured {sorted(measured)}")
    figures = {name: _figure(row, name, measured[name]) for name in row.figures}
    return {
        "row": row.name,
        **definition(row),
        "figures": figures,
        "minutes": row.minutes,
        "wall_s": round(wall_s, 1),
        "met": all(f["met"] for f in figures.values()) and wall_s <= 60 * row.minutes,
        "command": f"make results ROW={row.name}",
        **circumstances(),
    }


def definition(row: QualityRow) -> dict[str, Any]:
    """What the figures mean; where a stored one differs from today's, its figures are not shown as this row's."""
    return {
        "model": row.model,
        "data": row.data,
        "estimator": row.estimator,
        "seeds": list(row.seeds),
        "metrics": {name: figure.metric for name, figure in row.figures.items()},
    }


def _figure(row: QualityRow, name: str, measured: float | Sequence[float]) -> dict[str, Any]:
    values = [float(v) for v in (measured if isinstance(measured, Sequence) else [measured])]
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{row.name}: {name} is {measured}; a figure is a finite number, or one a seed")
    figure, mean = row.figures[name], statistics.fmean(values)
    return {
        "value": mean,
        "values": values,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "unit": figure.unit,
        "bound": figure.bound.text if figure.bound else None,
        "met": figure.bound is None or figure.bound.met(mean),
        "published": figure.published,
        "source": figure.source,
    }


def graph(root: Path) -> dict[str, Any]:
    """The figures of every run that the pipeline has evaluated here.

    Raises:
        SystemExit: nothing is evaluated yet.
    """
    runs: dict[str, Any] = {}
    for path in sorted((root / "evaluations").glob("*/evaluation.json")):
        name = path.parent.name
        described = json.loads((root / "models" / name / "config.json").read_text(encoding="utf-8"))
        _, metrics = read_evaluation(root, name)
        runs[name] = {"model": described["model"], "metrics": {key: asdict(metric) for key, metric in metrics.items()}}
    if not runs:
        raise SystemExit(f"{root / 'evaluations'} holds no evaluation: run `make repro` first")
    return {"command": "make repro && python -m benchmarks.results graph", "runs": runs, **circumstances()}


def render(
    rows: Mapping[str, QualityRow],
    docs: Path = DOCS,
    benchmarks: Path = ROOT / "benchmarks",
    readme: Path | None = None,
) -> Path:
    """Write docs/results.md, and the README's table of models, from what is stored and nothing else."""
    stored = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((docs / "results").glob("*.json"))
    }
    speed = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((benchmarks / "results").glob("*.json"))
    }
    not_timed = sorted({path.stem for path in benchmarks.glob("*.py")} - NOT_TIMINGS - set(speed))
    quality = [
        (row, found if (found := stored.get(name)) and _still_means(row, found) else None) for name, row in rows.items()
    ]
    path = docs / "results.md"
    path.write_text(page.document(quality, stored.get("graph"), speed, not_timed), encoding="utf-8")
    if readme is not None:
        by_model = {row.model: found for row, found in quality if found is not None}
        _replace_models(readme, page.models_table(CATALOG, by_model, stored.get("graph")))
    return path


def _replace_models(readme: Path, table: str) -> None:
    """Put the table between the README's two markers."""
    text = readme.read_text(encoding="utf-8")
    before, start, rest = text.partition("<!-- models -->\n")
    _, end, after = rest.partition("\n<!-- /models -->")
    if not start or not end:
        raise SystemExit(f"{readme} has lost its markers <!-- models --> … <!-- /models -->")
    readme.write_text(f"{before}{start}{table}{end}{after}", encoding="utf-8")


def _still_means(row: QualityRow, stored: Mapping[str, Any]) -> bool:
    today = definition(row)
    return {key: stored.get(key) for key in today} == today


def _chosen(names: Sequence[str], rows: Mapping[str, QualityRow]) -> list[str]:
    chosen: list[str] = []
    for name in names:
        if name not in rows and name not in ("all", "graph", "render"):
            near = difflib.get_close_matches(name, [*rows, "all", "graph", "render"], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SystemExit(f"no row is called {name}{hint} Rows: {', '.join(rows)}")
        chosen += list(rows) if name == "all" else [name]
    return chosen


def _list(rows: Mapping[str, QualityRow]) -> None:
    width = max(map(len, rows), default=0)
    for name, row in rows.items():
        path = DOCS / "results" / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        state = "not run yet" if found is None or not _still_means(row, found) else "met" if found["met"] else "MISSED"
        print(f"  {name:<{width}}  {state:<11}  ≤ {row.minutes:g} min  {row.model} on {row.data}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--workdir", type=Path, help="keep the scratch files here, instead of a temporary folder")
    given = parser.parse_args(argv)
    rows = all_rows()
    if not given.rows:
        _list(rows)
        return 0
    met = True
    for name in _chosen(given.rows, rows):
        if name == "graph":
            write_json(DOCS / "results" / "graph.json", graph(ROOT))
        elif name != "render":
            met &= _run(rows[name], given.workdir)
    print(f"wrote {render(rows, readme=ROOT / 'README.md').relative_to(ROOT)} and README.md's table of models")
    return 0 if met else 1


def _run(row: QualityRow, workdir: Path | None) -> bool:
    print(f"{row.name}: {row.model} on {row.data}, {row.estimator}; at most {row.minutes:g} minutes", flush=True)
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        result = measure(row, workdir)
    else:
        with tempfile.TemporaryDirectory(prefix="dgm-") as scratch:
            result = measure(row, Path(scratch))
    write_json(DOCS / "results" / f"{row.name}.json", result)
    for name, figure in result["figures"].items():
        verdict = "" if figure["bound"] is None else f"  {figure['bound']}  {'met' if figure['met'] else 'MISSED'}"
        print(f"  {name}: {page.figure_text(figure)} {figure['unit']}{verdict}")
    print(f"  {result['wall_s']:.0f} s{'' if result['wall_s'] <= 60 * row.minutes else ', LONGER than its budget'}")
    return bool(result["met"])


if __name__ == "__main__":
    raise SystemExit(main())
