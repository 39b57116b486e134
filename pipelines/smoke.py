"""`make smoke`: the graph on tiny models in a temporary copy of the repository; says whether it holds together.

Prepares the digits, trains a tiny code model, its two priors and a flow, encodes, evaluates, joins the two stages,
writes the report, and then checks that `dvc status` finds nothing left to do. To be quick, stages run in their own
processes, without Ray; `make test-all` runs them as Ray Train jobs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipelines.command import run_main
from pipelines.repro import BIN

RUNS = ("vqvae", "prior_top", "prior_bottom", "flow")


def shrink(params: dict[str, Any]) -> dict[str, Any]:
    """The same graph, small: tiny presets, few rounds, small evaluations."""
    params["datasets"] = {"digits": params["datasets"]["digits"]}
    params["runs"] = {
        name: {**params["runs"][name], "preset": "tiny", "config": {}, "recipe": {"steps": 20}} for name in RUNS
    }
    params["tune"] = {}
    params["judge"] = {"steps": 20}
    params["evaluate"] = {"samples": 64, "examples": 64, "importance_samples": 0, "tiles": 4}
    params["tracking"] = {"log_model": False, "system_metrics": False}
    params["cluster"] = {"workers": 0}
    return params


def copy_of_repository(target: Path) -> None:
    """What git knows of, as it stands in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if Path(name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, target / name)
    (target / "dvc.lock").unlink(missing_ok=True)
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)


def main(argv: Sequence[str]) -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dgm-smoke-") as name:
        folder = Path(name)
        copy_of_repository(folder)
        yaml = YAML()
        params = shrink(yaml.load(folder / "params.yaml"))
        yaml.dump(params, folder / "params.yaml")
        environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": f"{BIN}:{os.environ['PATH']}"}
        done = subprocess.run([str(BIN / "dvc"), "repro"], cwd=folder, env=environment, check=False)
        if done.returncode:
            sys.stderr.write("smoke: dvc repro failed\n")
            return done.returncode
        status = subprocess.run(
            [str(BIN / "dvc"), "status", "--quiet"], cwd=folder, env=environment, check=False
        ).returncode
        report = folder / "report" / "index.html"
        if status or not report.is_file():
            sys.stderr.write("smoke: the graph is not up to date after it ran\n")
            return 1
    sys.stdout.write(f"smoke: the graph holds together ({time.monotonic() - started:.0f} s)\n")
    return 0


if __name__ == "__main__":
    run_main(main)
