"""The whole default graph on two nodes that share nothing but an object store.

    python -m benchmarks.two_nodes

Every run of `params.yaml` trains with two workers, one a node, and is evaluated on both; the second node cannot see the
project's folder, so whatever it needs came through the store. Afterwards nothing may be left of states, marks, jobs or
CPUs, and `dvc status dvc.yaml` must find nothing to do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ruamel.yaml import YAML

from benchmarks.harness import ROOT, Row, report
from pipelines.repro import BIN
from pipelines.smoke import copy_of_repository
from pipelines.storage import Storage
from tests.nodes import Nodes, nodes
from tests.servers import object_store

yaml = YAML()


@dataclass
class Pair:
    """A project on the head of a cluster of two nodes of one CPU each."""

    project: Path
    cluster: Nodes
    uri: str
    cache: Path

    def repro(self, targets: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-m", "pipelines.repro", *targets])

    def left(self) -> list[str]:
        """What the graph's jobs should have taken with them."""
        found = [key for key in Storage(self.uri).keys("") if not key.startswith("folders/")]
        found += [str(p) for root in (self.project / ".dgm/state", self.cache / "jobs") for p in root.glob("*")]
        free, total = self.cluster.free_cpus()
        return found + [f"{total - free:g} of {total:g} CPUs are taken"] * (free != total)

    def up_to_date(self) -> bool:
        searches_aside = [str(BIN / "dvc"), "status", "--quiet", "dvc.yaml"]
        return self._run(searches_aside).returncode == 0

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
        return subprocess.run(
            command, cwd=self.project, env=environment, capture_output=True, text=True, check=False
        )  # fmt: skip


@contextmanager
def pair(folder: Path, params: Mapping[str, Any], **cluster: Any) -> Iterator[Pair]:
    """The repository with these `params`, its second node blind to the project's folder."""
    project, cache = folder / "project", folder / "cache"
    project.mkdir()
    copy_of_repository(project)
    with ExitStack() as held:
        store = held.enter_context(object_store())
        held.enter_context(patch.dict(os.environ, store.env))  # nodes and drivers find their credentials there
        two = held.enter_context(nodes(folder / "ray.log", head_cpus=1))
        host = store.env["AWS_ENDPOINT_URL"].removeprefix("http://")
        uri = f"s3://{store.bucket}/dgm?endpoint_override={host}&scheme=http&region=us-east-1"
        settings = {"workers": 2, "cpus_per_worker": 1, "storage": uri, "cache": str(cache), **cluster}
        yaml.dump({**params, "cluster": settings}, project / "params.yaml")
        two.add(cpus=1, hidden=[project])
        yield Pair(project, two, uri, cache)


def main() -> int:
    params = yaml.load(ROOT / "params.yaml")
    with tempfile.TemporaryDirectory(prefix="dgm-two-nodes-") as name:
        os.chdir(ROOT)
        with pair(Path(name), params) as two:
            started = time.monotonic()
            done = two.repro()
            minutes = (time.monotonic() - started) / 60
            if done.returncode:
                raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
            evaluated = [
                name for name in params["runs"] if (two.project / f"evaluations/{name}/evaluation.json").exists()
            ]
            left = two.left()
            rows = [
                Row(
                    "runs of the default graph that were trained and evaluated",
                    len(evaluated),
                    len(params["runs"]),
                    unit="",
                ),
                Row(
                    "stages that `dvc status dvc.yaml` would run again",
                    float(not two.up_to_date()),
                    0,
                    at_least=False,
                    unit="",
                ),
                Row("states, marks, jobs and CPUs left behind", len(left), 0, at_least=False, unit=""),
                Row("the graph", minutes, None, at_least=False, unit="min"),
            ]
    for thing in left:
        sys.stdout.write(f"  {thing}\n")
    return report("two_nodes", rows)


if __name__ == "__main__":
    raise SystemExit(main())
