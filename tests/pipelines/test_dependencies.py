"""A run depends on every line that its weights come from: what the stage names, and what its state is filed under."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines import state
from tests.support import ROOT

CORE = ROOT / "dgm_core"
FAMILIES = sorted(p.parent.name for p in (CORE / "models").glob("*/__init__.py"))


def imported(file: Path) -> Iterator[str]:
    """The parts of the library that a file imports: `nn`, `shapes.py`, `models/flow`."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "dgm_core":
            names += [f"dgm_core.{alias.name}" for alias in node.names]
        for name in names:
            parts = (name or "").split(".")
            if parts[0] == "dgm_core" and len(parts) > 1:
                part = "/".join(parts[1 : 3 if parts[1] == "models" else 2])
                yield part if (CORE / part).is_dir() else f"{part}.py"


def needs(family: str) -> set[str]:
    found, waiting = set[str](), {f"models/{family}"}
    while waiting:
        part = waiting.pop()
        found.add(part)
        files = sorted((CORE / part).rglob("*.py")) if (CORE / part).is_dir() else [CORE / part]
        waiting |= {name for file in files for name in imported(file)} - found
    return found


# Prepared data and a judge's scores are stages of their own; runs.py and models.py only find files and names.
ASIDE = {"data", "evaluation", "runs.py", "models", "models.py"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_stage_names_all_that_its_family_imports(family: str) -> None:
    for file, stage in (("dvc.yaml", "train"), ("tuning/dvc.yaml", "tune")):
        deps = YAML().load(ROOT / file)["stages"][stage]["do"]["deps"]
        named = {d.removeprefix("dgm_core/").replace("${item.family}", family) for d in deps if "dgm_core/" in d}
        assert needs(family) - ASIDE <= named, file
        assert named - {"evaluation"} <= {*state._SHARED, f"models/{family}"}, file
