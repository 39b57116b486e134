"""Two nodes of one cluster that share nothing but an object store: the second one sees none of the driver's disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.two_nodes import pair, yaml
from pipelines.smoke import shrink
from tests.nodes import nodes
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def can_hide() -> bool:
    done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], check=False)
    return done.returncode == 0


@pytest.mark.skipif(not can_hide(), reason="hiding folders from a process needs the right to mount")
def test_the_graph_on_two_nodes_with_an_object_store_between_them(tmp_path: Path, monkeypatch: Any) -> None:
    """Two workers, one a node; the second node's `/project` is empty, so whatever it needs came through the store."""
    monkeypatch.chdir(ROOT)
    with pair(tmp_path, shrink(yaml.load(ROOT / "params.yaml")), checkpoint_every=10) as two:
        done = two.repro(["evaluate_two_stage@vqvae_prior", "evaluate@flow"])
        assert done.returncode == 0, done.stdout + done.stderr
        assert (two.project / "evaluations/vqvae_prior/evaluation.json").is_file()
        assert (two.project / "models/flow/weights.safetensors").is_file()
        assert two.left() == []


CODE = [ROOT / "dgm_core", ROOT / "pipelines"]
DRIVER = """
import json, sys
from pipelines.cluster import run_job
from pipelines.connect import connected
from pipelines.params import Cluster
from pipelines.parts import map_parts
from pipelines.writer import Writer

def where(config, worker):
    import dgm_core, pipelines
    return [dgm_core.__file__, pipelines.__file__]

settings = Cluster(storage=sys.argv[1], ship_code=True)
with connected(settings):
    found = run_job(where, {}, settings, name="where", on_report=Writer(sys.argv[1] + "/spool"))
    found += next(iter(map_parts(lambda part: where(part, part), [None], settings, what="where")))
print(json.dumps(found))
"""


@pytest.mark.skipif(not can_hide(), reason="hiding folders from a process needs the right to mount")
def test_code_that_is_in_no_image_travels_with_the_job(tmp_path: Path) -> None:
    """The node's own copy of the code is empty; a job and a mapped part both find what was sent."""
    with nodes(tmp_path / "ray.log") as cluster:
        cluster.add(cpus=1, hidden=CODE)
        environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}
        driver = [sys.executable, "-c", DRIVER, str(tmp_path)]
        done = subprocess.run(driver, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4
    assert not [file for file in found if Path(file).is_relative_to(ROOT)]
