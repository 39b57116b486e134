"""Two nodes of one cluster that share nothing but an object store: the second one sees none of the driver's disk."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipelines.repro import BIN
from pipelines.smoke import copy_of_repository, shrink
from pipelines.storage import Storage
from tests.nodes import nodes
from tests.servers import object_store
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def can_hide() -> bool:
    done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], check=False)
    return done.returncode == 0


@pytest.mark.skipif(not can_hide(), reason="hiding folders from a process needs the right to mount")
def test_the_graph_on_two_nodes_with_an_object_store_between_them(tmp_path: Path, monkeypatch: Any) -> None:
    """Two workers, one a node; the second node's `/project` is empty, so whatever it needs came through the store."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(ROOT)
    copy_of_repository(project)
    yaml = YAML()
    params = shrink(yaml.load(project / "params.yaml"))
    with ExitStack() as held:
        store = held.enter_context(object_store())
        for name, value in store.env.items():  # nodes and drivers find their credentials in the environment
            monkeypatch.setenv(name, value)
        cluster = held.enter_context(nodes(tmp_path / "ray.log", head_cpus=1))
        host = store.env["AWS_ENDPOINT_URL"].removeprefix("http://")
        uri = f"s3://{store.bucket}/dgm?endpoint_override={host}&scheme=http&region=us-east-1"
        cache = tmp_path / "cache"
        params["cluster"] = {"workers": 2, "cpus_per_worker": 1, "storage": uri, "cache": str(cache)}
        params["cluster"]["checkpoint_every"] = 10
        yaml.dump(params, project / "params.yaml")
        cluster.add(cpus=1, hidden=[project])
        environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
        wanted = ["evaluate_two_stage@vqvae_prior", "evaluate@flow"]
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.repro", *wanted], cwd=project, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert (project / "evaluations/vqvae_prior/evaluation.json").is_file()
        assert (project / "models/flow/weights.safetensors").is_file()
        left = [key for key in Storage(uri).keys("") if not key.startswith("folders/")]
        assert left == []  # no state, no stop marks, nothing of Ray's
        assert list((project / ".dgm/state").iterdir()) == []
        jobs = cache / "jobs"
        assert not jobs.exists() or list(jobs.iterdir()) == []
        free, total = cluster.free_cpus()
        assert free == total == 2
