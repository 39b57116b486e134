"""A soak: a training stage killed again and again, and what is left of it.

    python -m benchmarks.faults --kills 20 --seed 0

`train@vae` runs on a Ray cluster of a head and one node, with its state on a path that both see. At random moments one
of these is killed with SIGKILL: the stage's own process (which is then started again, as `dvc repro` would), a Ray
worker, Ray Train's controller, or the whole node (and another one joins). Every run must finish, with weights bitwise
equal to the undisturbed run's, one FINISHED run in MLflow with no step twice, and no process, placement group or file
left.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from benchmarks.harness import ROOT, Row, report
from dgm_core.training import history
from tests.nodes import Nodes, nodes

RUN = "vae"
KINDS = ("stage", "worker", "controller", "node")
TITLES = {"worker": "RayTrainWorker", "controller": "TrainController"}
LIMIT = 600.0  # seconds that anything may take
LOG_EVERY = 20


@dataclass
class Soak:
    """One project folder, one cluster, and what happened so far."""

    folder: Path
    cluster: Nodes
    steps: int
    seed: int
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    recoveries: list[float] = field(default_factory=list)
    runs: int = 0

    def start(self) -> subprocess.Popen[str]:
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT)}
        log = open(self.folder / "stage.log", "a")  # noqa: SIM115  (the process holds it)
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.train", RUN], cwd=self.folder, env=environment, stdout=log, stderr=log,
            text=True,
        )  # fmt: skip

    def undisturbed(self) -> tuple[dict[str, torch.Tensor], float]:
        """The weights to compare with, and how long they take."""
        started = time.monotonic()
        if self.start().wait(LIMIT) != 0:
            raise RuntimeError((self.folder / "stage.log").read_text()[-3000:])
        return self.weights(), time.monotonic() - started

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "models" / RUN / "weights.safetensors")

    def disturbed(self, kills: int, rng: random.Random, seconds: float) -> None:
        """One run with up to `kills` kills, at moments that are spread over an undisturbed run's time."""
        stage = self.start()
        self.runs += 1
        delivered = 0
        while delivered < kills:
            try:
                stage.wait(rng.uniform(0.1, 0.9) * seconds)
                break
            except subprocess.TimeoutExpired:
                pass
            kind = rng.choice(KINDS)
            before, killed_at = self.rounds(), time.monotonic()
            if kind == "stage":
                stage.kill()
                stage.wait()
                stage = self.start()
            elif kind == "node":
                self.cluster.started.pop().kill()
                self.cluster.add(cpus=1)
            else:
                victims = self.cluster.processes(TITLES[kind])
                if not victims:
                    continue  # the moment was before it was there, or after
                victims[0].kill()
            delivered += 1
            self.kills[kind] += 1
            self.follow(stage, before, killed_at)
        code = stage.wait(LIMIT)
        if code != 0:
            raise RuntimeError(f"the stage ended with {code}:\n{(self.folder / 'stage.log').read_text()[-3000:]}")

    def follow(self, stage: subprocess.Popen[str], before: int, killed_at: float) -> None:
        """Wait until training is further than it was when the kill came."""
        while stage.poll() is None and time.monotonic() - killed_at < LIMIT:
            if self.rounds() > before:
                self.recoveries.append(time.monotonic() - killed_at)
                return
            time.sleep(0.2)

    def rounds(self) -> int:
        files = list((self.folder / "shared/state").glob(f"train-{RUN}-*/seed0/history.jsonl"))
        rows = history.read(files[0]) if files else []
        return int(rows[-1]["step"]) if rows else 0

    def problems(self, expected: Mapping[str, torch.Tensor]) -> list[str]:
        """What is not as it should be after a run."""
        found = []
        weights = self.weights()
        if any(not torch.equal(weights[name], value) for name, value in expected.items()):
            found.append("the weights differ from the undisturbed run's")
        found += self.tracking_problems()
        deadline = time.monotonic() + 30  # Ray takes down what a dead driver left
        while time.monotonic() < deadline and self.cluster.processes(*TITLES.values()):
            time.sleep(0.5)
        found += [f"{p.cmdline()} is still there" for p in self.cluster.processes(*TITLES.values())]
        free, total = self.cluster.free_cpus()
        if free != total:
            found.append(f"{total - free:g} CPUs are still taken")
        for root in ("shared/state", "shared/ray", "shared/stop", ".dgm/state", "cache/jobs"):
            found += [f"{path} is left" for path in (self.folder / root).glob("*")]
        return found

    def tracking_problems(self, runs: int | None = None) -> list[str]:
        """`runs` stages were started, each from the beginning; the soak's own count where None."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "dgm"]
        entries = client.search_runs([experiment])
        found = [f"run {r.info.run_id} is {r.info.status}" for r in entries if r.info.status != "FINISHED"]
        started = self.runs + 1 if runs is None else runs  # and the undisturbed one
        if len(entries) != started:
            found.append(f"{started} stages left {len(entries)} runs")
        newest = max(entries, key=lambda r: r.info.start_time)
        steps = [m.step for m in client.get_metric_history(newest.info.run_id, "round")]
        missing = set(range(LOG_EVERY, self.steps + 1, LOG_EVERY)) - set(steps)  # a checkpoint logs its round, too
        if missing or steps != sorted(set(steps)):
            twice = len(steps) - len(set(steps))
            found.append(f"of {len(steps)} rounds {twice} are there twice, {len(missing)} are missing")
        return found


def project(folder: Path, steps: int, **cluster: Any) -> None:
    """params.yaml with a small run, and its data."""
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params["runs"][RUN].update({"preset": "tiny", "config": {}, "recipe": {"steps": steps, "evaluate_every": 500}})
    params["cluster"] = {
        "workers": 1, "cpus_per_worker": 1, "storage": str(folder / "shared"), "cache": str(folder / "cache"),
        "log_every": LOG_EVERY, "checkpoint_every": 100, "report_seconds": 1, "max_failures": 100, **cluster,
    }  # fmt: skip
    params["tracking"] = {"log_model": False, "system_metrics": False}
    yaml.dump(params, folder / "params.yaml")
    (folder / "here.yaml").write_text("workers: 0\n")
    here = {**os.environ, "PYTHONPATH": str(ROOT), "DGM_CLUSTER": "here.yaml"}
    subprocess.run([sys.executable, "-m", "pipelines.prepare", "digits_binary"], cwd=folder, env=here, check=True)


def soak(kills: int, seed: int, steps: int) -> tuple[Soak, list[str], float]:
    """Kill until `kills` are delivered; what was found wrong, and the undisturbed run's seconds."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="dgm-faults-") as name, nodes(Path(name) / "ray.log") as cluster:
        folder = Path(name)
        project(folder, steps)
        cluster.add(cpus=1)
        state = Soak(folder, cluster, steps, seed)
        expected, seconds = state.undisturbed()
        found = state.problems(expected)
        while (left := kills - sum(state.kills.values())) > 0:
            state.disturbed(min(left, rng.randint(1, 4)), rng, seconds)
            found += state.problems(expected)
            print(f"  {sum(state.kills.values())} kills, {state.runs} runs, {len(found)} problems", flush=True)
    return state, found, seconds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    given = parser.parse_args()
    state, found, seconds = soak(given.kills, given.seed, given.steps)
    for problem in found:
        print(f"  {problem}")
    recoveries = sorted(state.recoveries)
    rows = [
        Row(f"kills (seed {given.seed}), of them {state.kills}", sum(state.kills.values()), given.kills, unit=""),
        Row("runs that these hit, each finished", state.runs, None, unit=""),
        Row("problems found afterwards", len(found), 0, at_least=False, unit=""),
        Row("an undisturbed run", seconds, None, at_least=False, unit="s"),
        Row(
            "until training is further than before the kill (median)",
            recoveries[len(recoveries) // 2],
            None,
            False,
            "s",
        ),
        Row("the same, the longest", recoveries[-1], None, False, "s"),
    ]
    return report("faults", rows)


if __name__ == "__main__":
    raise SystemExit(main())
