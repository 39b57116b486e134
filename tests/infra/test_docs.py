"""docs/cluster.md speaks of files, settings and commands that are there."""

from __future__ import annotations

import re

import pytest

from tests.infra.files import INFRA, env_file
from tests.support import ROOT

TEXT = (ROOT / "docs/cluster.md").read_text()


def test_files_it_names_are_there() -> None:
    named = set(re.findall(r"\binfra/[\w./-]*\w", TEXT.replace("{cpu,gpu}", "cpu")))
    assert {"infra/compose.yaml", "infra/driver.sh", "infra/kuberay/jobs/gpu"} <= named
    assert not [path for path in named if not (ROOT / path).exists() and path != "infra/.env"]


@pytest.mark.parametrize("path", sorted(INFRA.glob("*")), ids=lambda path: path.name)
def test_it_names_every_file(path) -> None:
    assert path.name in TEXT or path.name in (".gitignore", "make_buckets.py", ".env")


def test_modules_it_runs_are_there() -> None:
    for module in re.findall(r"python -m ([\w.]+)", TEXT):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_its_ports_are_the_examples() -> None:
    example = env_file((INFRA / ".env.example").read_text())
    for name in ("MLFLOW_PORT", "RAY_DASHBOARD_PORT", "GRAFANA_PORT"):
        assert f"localhost:{example[name]}" in TEXT
