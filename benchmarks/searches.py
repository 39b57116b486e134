"""The shipped searches, whole: how long they take, whether they beat the default, what they leave behind.

    python -m benchmarks.searches [RUN …]      (vae and gan without one)

Each runs by `pipelines.tune` on a Ray cluster that outlives it, in a scratch folder, with its data and judge prepared
before the clock starts. The first one is killed (SIGKILL) once half of its trials are done, and started again; the time
of both counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row, report
from pipelines.params import load_params
from pipelines.repro import ray_head

MINUTES = 10
TIDY_SECONDS = 60  # that Ray may take to give back what a killed driver held


def measure(names: list[str]) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="dgm-searches-") as name, ray_head() as address:
        folder = Path(name)
        (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
        environment.pop("MLFLOW_TRACKING_URI", None)
        search = _Search(folder, environment)
        for data in sorted({load_params(ROOT / "params.yaml").run(run).data for run in names}):
            for stage in ("prepare", "judge"):
                subprocess.run([*search.stage(stage), data], cwd=folder, env=environment, check=True)
        for i, run in enumerate(names):
            rows += search.whole(run, address, killed=i == 0)
    return rows


class _Search:
    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment

    @staticmethod
    def stage(name: str) -> list[str]:
        return [sys.executable, "-m", f"pipelines.{name}"]

    def whole(self, run: str, address: str, *, killed: bool) -> list[Row]:
        started, half = time.monotonic(), load_params(ROOT / "params.yaml").tune[run].trials // 2
        process, before = self._start(run), {}
        if killed:
            while len(before) < half and process.poll() is None:
                time.sleep(0.5)
                before = self._done()
            process.kill()
            process.wait()
            process = self._start(run)
        if process.wait() != 0:
            raise RuntimeError((self.folder / "search.log").read_text()[-3000:])
        seconds = time.monotonic() - started
        found = json.loads((self.folder / "tuning" / run / "search.json").read_text())
        trials = {t["trial"]: t for t in found["trials"]}
        again = sum(
            trials[n]["score"] != row["score"] or trials[n]["values"] != row["values"] for n, row in before.items()
        )
        sign = 1 if found["mode"] == "max" else -1
        best, default = found["best"], found["default"]["score"]
        gain = sign * (best["score"] - default) if best else 0.0
        how = f", killed after {len(before)} trials and started again" if killed else ""
        metric = found["metric"].removeprefix("val/")
        return [
            Row(f"{run}: {len(trials)} trials{how}", seconds / 60, MINUTES, at_least=False, unit="min"),
            Row(f"{run}: {metric} of the best trial less the default's, in the better direction", gain, 1e-9, unit=""),
            Row(f"{run}: {metric} by default", default, None, unit=""),
            Row(f"{run}: finished trials that were run again", again, 0, at_least=False, unit=""),
            Row(f"{run}: CPUs not free and placement groups left", self._held(address), 0, at_least=False, unit=""),
            Row(f"{run}: trials whose MLflow run is not below the search's, or has not ended",
                self._strays(run, len(trials)), 0, at_least=False, unit=""),
        ]  # fmt: skip

    def _start(self, run: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "search.log", "a") as log:
            return subprocess.Popen(
                [*self.stage("tune"), run], cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )

    def _done(self) -> dict[int, dict[str, Any]]:
        """The trials that a search in progress has ended."""
        files = list((self.folder / ".dgm/state").glob("tune-*/ledger.json"))
        rows = json.loads(files[0].read_text()) if files else []
        return {row["number"]: row for row in rows if row["state"] != "running"}

    def _held(self, address: str) -> int:
        """After what Ray may take: CPUs in use, and placement groups."""
        code = (
            "import ray; ray.init(address='%s', logging_level=40, log_to_driver=False);"
            "groups = [g for g in ray.util.placement_group_table().values() if g['state'] != 'REMOVED'];"
            "print(int(len(groups) + ray.cluster_resources()['CPU'] - ray.available_resources().get('CPU', 0)))"
        )
        deadline = time.monotonic() + TIDY_SECONDS
        while True:
            done = subprocess.run(
                [sys.executable, "-c", code % address], env=self.environment, capture_output=True, text=True, check=True
            )
            if (held := int(done.stdout.split()[-1])) == 0 or time.monotonic() > deadline:
                return held

    def _strays(self, run: str, trials: int) -> int:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        every = client.search_runs([e.experiment_id for e in client.search_experiments()])
        (parent,) = [r for r in every if r.info.run_name == f"{run}-search"]
        below = [r for r in every if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        running = sum(r.info.status not in ("FINISHED", "KILLED") for r in [parent, *below])
        return abs(trials - len(below)) + running


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.searches")
    parser.add_argument("runs", nargs="*", metavar="RUN")
    return report("searches", measure(parser.parse_args().runs or ["vae", "gan"]))


if __name__ == "__main__":
    raise SystemExit(main())
