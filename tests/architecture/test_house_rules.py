"""Rules of the house that a tool can check."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from dgm_core.models import CATALOG
from tests.support import ROOT

LIBRARY = sorted((ROOT / "dgm_core").rglob("*.py"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_library_neither_prints_nor_seeds_generators_of_its_own(path) -> None:
    tree = ast.parse(path.read_text())
    names = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert "print" not in names
    if "models" in path.parts:
        attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not attributes & {"Generator", "manual_seed"}, "randomness comes from torch's default generator"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, dgm_core; print(sorted({'torch', 'ray', 'mlflow', 'dvc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_models_need_only_the_light_libraries() -> None:
    """Importing every model must not import what a bare GPU machine lacks."""
    heavy = "{'ray', 'mlflow', 'dvc', 'sklearn', 'matplotlib', 'PIL', 'soundfile', 'torchmetrics', 'jaxtyping', 'yaml'}"
    modules = "dgm_core.models, dgm_core.training.trainer, dgm_core.data.batches"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_model_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [name for name in CATALOG if f"`{name}`" not in readme]


def test_files_stay_readable() -> None:
    long = {p: n for p in LIBRARY if (n := len(p.read_text().splitlines())) > 350}
    assert not long, f"is one of these two things? {long}"


def test_import_floors_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
