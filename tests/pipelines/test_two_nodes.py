"""Two nodes of one cluster that share nothing but an object store: the second one sees none of the driver's disk."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.two_nodes import pair, yaml
from pipelines.smoke import shrink
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
