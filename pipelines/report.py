"""Stage `report`: everything that the graph produced, on one page that needs nothing else.

    python -m pipelines.report

Out: `report/index.html`: style, script, pictures and recordings are inside it, and it fetches nothing.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dgm_core.evaluation import record
from dgm_core.evaluation.files import write_atomically
from pipelines import graph
from pipelines.command import Usage, run_main
from pipelines.params import Params, load_params
from pipelines.text import number, words
from pipelines.tracking import memories

POINTS = 300  # of a curve that are drawn; a longer one is averaged down to as many
HEADLINES = ("bits_per_dim", "nll_", "elbo_nats", "frechet", "class_agreement", "reconstruction_mse")
KINDS = {".png": "image/png", ".gif": "image/gif", ".wav": "audio/wav"}
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before any file of it is read."""

    name: str
    model: str
    data: str
    family: str = ""
    parts: Sequence[str] = ()  # the runs that a two-stage model is put together from: it has no training of its own
    mlflow_id: str = ""
    mlflow_url: str = ""


@dataclass(frozen=True)
class ReportInputs:
    """`root` holds evaluations/, metrics/, plots/, models/ and, where there were searches, tuning/.

    `edges` are (needed stage, stage that needs it).
    """

    root: Path
    runs: Sequence[RunFacts]
    nodes: Sequence[str]
    edges: Sequence[tuple[str, str]]
    title: str = "Deep generative models"
    search_urls: Mapping[str, str] = field(default_factory=dict)  # run -> its search's MLflow run


@dataclass(frozen=True)
class Metric:
    """One measured number; `sd` over `seeds` seeds, `error` its own standard error."""

    name: str
    value: float | None
    sd: float | None = None
    seeds: int = 1
    error: float | None = None
    floor: float | None = None
    context: str = ""

    @property
    def text(self) -> str:
        return number(self.value, self.sd if self.sd is not None else self.error)

    @property
    def title(self) -> str:
        """What the number means, for a tooltip."""
        spread = f"mean ± sd of {self.seeds} seeds" if self.sd is not None else "± standard error" if self.error else ""
        floor = f"floor {number(self.floor)}" if self.floor is not None else ""
        return "; ".join(part for part in (self.name, self.context, spread, floor) if part)


@dataclass(frozen=True)
class Picture:
    uri: str
    caption: str


@dataclass(frozen=True)
class Clip:
    """A recording that the page can play."""

    column: str  # real, sampled …
    uri: str
    picture: str


@dataclass(frozen=True)
class RunPage:
    """A run's share of the page."""

    facts: RunFacts
    metrics: Mapping[str, Metric]
    pictures: Sequence[Picture]
    sounds: Mapping[str, Sequence[Clip]]  # what it is of -> real and sampled recordings of it
    warnings: Sequence[str]
    environment: Mapping[str, str]
    settings: Mapping[str, str]  # name -> JSON
    curves: Mapping[str, Curve] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        return f"run-{self.facts.name}"

    @property
    def seeds(self) -> int:
        return max((m.seeds for m in self.metrics.values()), default=1)

    @property
    def mlflow_is_local(self) -> bool:
        return self.facts.mlflow_url.startswith(("http://127.0.0.1", "http://localhost"))


@dataclass(frozen=True)
class SearchPage:
    """What a search for a run's settings found."""

    run: str
    metric: str
    picture: Picture
    default: float | None
    best: float | None  # None: nothing beat the default
    trial: int
    counts: str
    settings: Sequence[tuple[str, str, str]]  # key, by default, best
    mlflow_url: str = ""


def build_report(inputs: ReportInputs) -> str:
    """The page.

    Raises:
        FileNotFoundError: a run is not evaluated, or a picture or recording that its evaluation names is not there.
    """
    pages = [read_run(inputs.root, facts) for facts in inputs.runs]
    shared = Counter(name for page in pages for name in page.metrics)
    anchors = {page.facts.name: f"#{page.anchor}" for page in pages}
    links = {node: anchors[name] for node in inputs.nodes if (name := node.partition("@")[2]) in anchors}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    needs = {node: sorted(a for a, b in inputs.edges if b == node) for node in inputs.nodes}
    return environment.get_template("report.html.j2").render(
        title=inputs.title,
        pages=pages,
        metrics=sorted(shared, key=lambda name: (_rank(name), -shared[name], name)),
        drawing=graph.svg(inputs.nodes, inputs.edges, links),
        needs=needs,
        searches=read_searches(inputs.root, inputs.search_urls),
        curves=_as_script({page.facts.name: page.curves for page in pages if page.curves}),
        number=number,
        local_mlflow=any(page.mlflow_is_local for page in pages),
    )


def _rank(name: str) -> int:
    """What a reader looks for first comes first."""
    return next((i for i, start in enumerate(HEADLINES) if name.startswith(start)), len(HEADLINES))


def read_run(root: Path, facts: RunFacts) -> RunPage:
    """Read what the stages left of one run."""
    found, metrics = read_evaluation(root, facts.name)
    folder, model = root / "evaluations" / facts.name, root / "models" / facts.name
    settings = {"config": _read_json(model / "config.json"), "recipe": _read_json(model / "recipe.json")}
    curves = root / "plots" / facts.name / "curves.csv"
    return RunPage(
        facts,
        metrics=metrics,
        pictures=[Picture(_data_uri(folder / figure.file), figure.caption) for figure in found.figures],
        sounds=_sounds(folder, found.sounds),
        warnings=found.warnings,
        environment=found.environment,
        settings={k: json.dumps(v, indent=2, ensure_ascii=False) for k, v in settings.items() if v is not None},
        curves=read_curves(curves) if curves.is_file() else {},
    )


def _sounds(folder: Path, found: Sequence[record.Sound]) -> dict[str, list[Clip]]:
    rows: dict[str, list[Clip]] = {}
    for sound in found:
        clip = Clip(sound.column, _data_uri(folder / sound.file), _data_uri(folder / sound.picture))
        rows.setdefault(sound.row, []).append(clip)
    return rows


def read_evaluation(root: Path, run: str) -> tuple[record.Evaluation, dict[str, Metric]]:
    """What `evaluate` found of a run; of several seeds, the metrics are the means over them.

    Raises:
        FileNotFoundError: the run is not evaluated.
    """
    folder = root / "evaluations" / run
    if not (folder / record.FILE).is_file():
        raise FileNotFoundError(f"{folder / record.FILE} is missing: run `dvc repro evaluate@{run}` first")
    found = record.Evaluation.read(folder)
    over_seeds = _read_json(root / "metrics" / f"{run}.json") or {}
    return found, {name: _metric(name, given, over_seeds) for name, given in found.metrics.items()}


def read_curves(path: Path) -> dict[str, Curve]:
    """Column -> (step, value) of the cells that are finite numbers, averaged down to at most `POINTS` points."""
    curves: dict[str, Curve] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if name != "step" and cell and math.isfinite(value := float(cell)):
                    curves.setdefault(name, []).append((float(row["step"]), value))
    return {name: _thinned(curve) for name, curve in sorted(curves.items())}


def read_searches(root: Path, urls: Mapping[str, str]) -> list[SearchPage]:
    """Every search that was made, by run."""
    pages = []
    for path in sorted(root.glob("tuning/*/search.json")):
        found = _read_json(path)
        best, default = found["best"] or {}, found["default"]
        states = Counter(trial["state"] for trial in found["trials"])
        count = ", ".join(f"{n} {state}" for state, n in states.most_common())
        keys = found["importance"]["shares"]
        caption = f"{found['metric']} of {len(found['trials'])} trials ({count}) against each key's value"
        pages.append(
            SearchPage(
                found["run"],
                found["metric"],
                Picture(_data_uri(path.with_name("search.png")), caption),
                default["score"],
                best.get("score"),
                best.get("trial", 0),
                f"{len(found['trials'])} trials of {found['steps']} rounds: {count}",
                [(key, words(default["values"][key]), words(best["values"][key]) if best else "") for key in keys],
                urls.get(found["run"], ""),
            )
        )
    return pages


def _metric(name: str, given: record.Metric, over_seeds: Mapping[str, Any]) -> Metric:
    seeds = int(over_seeds.get("seeds", 1))
    several = seeds > 1 and name in over_seeds
    return Metric(
        name,
        value=over_seeds[name] if several else given.value,
        sd=over_seeds.get(f"{name}_sd") if several else None,
        seeds=seeds if several else 1,
        error=None if several else given.error,
        floor=given.floor,
        context=words(given.context),
    )


def _code(text: str) -> Markup:
    """`…` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _thinned(curve: Curve) -> Curve:
    if len(curve) <= POINTS:
        return curve
    means = []
    for i in range(POINTS):
        part = curve[len(curve) * i // POINTS : len(curve) * (i + 1) // POINTS]
        means.append((part[-1][0], sum(y for _, y in part) / len(part)))
    return means


def _as_script(curves: Mapping[str, Mapping[str, Curve]]) -> Markup:
    short = {
        run: {
            name: [[float(f"{v:.5g}") for v in axis] for axis in zip(*curve, strict=True)] for name, curve in of.items()
        }
        for run, of in curves.items()
    }
    return Markup(json.dumps(short, separators=(",", ":")).replace("<", "\\u003c"))


def _data_uri(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is named in the evaluation beside it, but is not there: evaluate the run again"
        )
    kind = KINDS[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def facts_of(params: Params, root: Path) -> list[RunFacts]:
    """Every run and two-stage model of params.yaml, with the MLflow run that the tracker remembers for it."""
    found = [
        RunFacts(name, run.model, run.data, run.family, **_mlflow(params, root, name))
        for name, run in params.runs.items()
    ]
    for name, two in params.two_stage.items():
        parts = (two.codes, *two.priors.values())
        found.append(RunFacts(name, "two_stage", two.data, parts=parts, **_mlflow(params, root, name)))
    return found


def _mlflow(params: Params, root: Path, name: str) -> dict[str, str]:
    notes = map(_read_json, memories(root / params.cluster.local, name))
    remembered = next(filter(None, notes), None)
    return {"mlflow_id": remembered["run_id"], "mlflow_url": remembered["url"]} if remembered else {}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.report", description="Write report/index.html.")
    parser.parse_args(argv)
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    nodes, edges = graph.dvc_graph(root)
    try:
        urls = {name: _mlflow(params, root, f"{name}-search").get("mlflow_url", "") for name in params.tune}
        page = build_report(ReportInputs(root, facts_of(params, root), nodes, edges, search_urls=urls))
    except FileNotFoundError as error:
        raise Usage(str(error)) from None
    out = root / "report" / "index.html"
    out.parent.mkdir(exist_ok=True)
    write_atomically(out, page.encode())
    print(f"{out.relative_to(root)}: {len(params.runs) + len(params.two_stage)} runs, {len(page) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    run_main(main)
