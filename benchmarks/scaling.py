"""Scaling on paper and in simulation, and one check of it: `python -m benchmarks.scaling`.

Counts what a round of every model sends and computes, times it on one core, checks the cost model against two gloo
workers, stores all of it and writes docs/scaling.md. `python -m benchmarks.scaling render` writes the page alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, ROOT, Row, report, write_json
from benchmarks.scale import check, measure, page
from benchmarks.scale.account import account
from benchmarks.scale.settings import SETTINGS

PAGE = ROOT / "docs" / "scaling.md"
LEAST, MOST = 0.7, 1.4  # measured over predicted


def models(matmul: float) -> dict[str, Any]:
    """Every model of the catalogue that has a setting: counted, and timed on one core."""
    found: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        recipe = setting.defaults()[1]
        a = account(setting.build, recipe, setting.spec, setting.device)
        found[name] = {
            "data": setting.data,
            "examples": setting.examples,
            "example_bytes": setting.example_bytes,
            "account": a.to_json(),
            "step": measure.step(setting, a, matmul),
            "read_seconds": measure.read_seconds(setting.spec),
            "validation": measure.validation(setting),
        }
        print(f"  {name}: {found[name]['step']}", flush=True)
    return found


def sustained(found: Mapping[str, Any]) -> float:
    """FLOP/s of the core in models with enough to do; for those that were too slow to run."""
    rates = [
        entry["step"]["flops_per_second"]
        for entry in found.values()
        if "flops_per_second" in entry["step"] and entry["account"]["flops_per_example"] >= 1e9
    ]
    return statistics.median(rates)


def rows(checked: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The check's ratios, each between its two goals, and what two workers gained."""
    found = []
    for c in checked:
        what = f"{c['model']}: a round on two workers, measured over predicted"
        found += [Row(what, c["ratio"], LEAST), Row(what, c["ratio"], MOST, at_least=False)]
        found.append(Row(f"{c['model']}: one worker's time over two workers'", c["one"] / c["two"], None))
    return found


def render(stored: Mapping[str, Any], path: Path = PAGE) -> Path:
    path.write_text(page.document(stored), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "render"], default="all")
    given = parser.parse_args(argv)
    path, code = RESULTS / "scaling.json", 0
    if given.what == "all":
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(prefix="dgm-scaling-") as folder:
            checked = check.compare(Path(folder))
        matmul = measure.matmul_rate()
        found = models(matmul)
        code = report("scaling", rows(checked))
        stored = {
            **json.loads(path.read_text(encoding="utf-8")),
            "core": {"matmul": matmul, "sustained": sustained(found)},
            "models": found,
            "check": checked,
        }
        write_json(path, stored)
    written = render(json.loads(path.read_text(encoding="utf-8")))
    print(f"wrote {written.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
