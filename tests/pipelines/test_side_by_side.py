"""`make repro JOBS=N`: what may run at once does, order holds, a failure stops what waits for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.repro import BIN
from pipelines.side_by_side import side_by_side, stages

GRAPH = """
stages:
  first:
    cmd: echo first >> order.txt && echo 1 > first.out
    outs: [first.out]
  left:
    cmd: python meet.py left right && echo left >> order.txt && echo 1 > left.out
    deps: [first.out]
    outs: [left.out]
  right:
    cmd: python meet.py right left && echo right >> order.txt && echo 1 > right.out
    deps: [first.out]
    outs: [right.out]
  last:
    cmd: LAST && echo last >> order.txt && echo 1 > last.out
    deps: [left.out, right.out]
    outs: [last.out]
  after:
    cmd: echo after >> order.txt && echo 1 > after.out
    deps: [last.out]
    outs: [after.out]
"""

# Says that one stage is up, and waits until the other is.
MEET = """
import pathlib, sys, time
mine, theirs = (pathlib.Path(name + ".up") for name in sys.argv[1:])
mine.touch()
for _ in range(300):
    if theirs.exists():
        sys.exit()
    time.sleep(0.1)
sys.exit("the other one never came")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([str(BIN / "dvc"), "init", "-q"], check=True)
    (tmp_path / "meet.py").write_text(MEET)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/dvc.yaml").write_text("stages: {other: {cmd: 'false', outs: [x]}}\n")
    return tmp_path


def run(project: Path, last: str) -> int:
    (project / "dvc.yaml").write_text(GRAPH.replace("LAST", last))
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    return side_by_side(shutil.which("dvc", path=environment["PATH"]) or "", 2, [], environment)


@pytest.mark.slow
def test_independent_stages_meet_and_dependent_ones_wait(project: Path) -> None:
    """Left and right each wait for the other to be up: one after the other, they would never end well."""
    assert run(project, "true") == 0
    order = (project / "order.txt").read_text().split()
    assert order[0] == "first"
    assert sorted(order[1:3]) == ["left", "right"]
    assert order[3:] == ["last", "after"]
    assert subprocess.run([str(BIN / "dvc"), "status", "-q", "dvc.yaml"], check=False).returncode == 0
    assert not (project / "sub/x").exists()  # searches and the like are not of the graph


@pytest.mark.slow
def test_a_failure_stops_what_waits_for_it(project: Path) -> None:
    assert run(project, "exit 3") != 0
    assert sorted((project / "order.txt").read_text().split()) == ["first", "left", "right"]
    assert not (project / "after.out").exists()


def test_targets_bring_what_they_need(project: Path) -> None:
    (project / "dvc.yaml").write_text(GRAPH.replace("LAST", "true"))
    assert stages(["left"]) == {"first": set(), "left": {"first"}}
    assert set(stages([])) == {"first", "left", "right", "last", "after"}
