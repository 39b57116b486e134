"""State in progress: kept through failure, gone after success, locked, swept."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipelines import state
from pipelines.command import Usage
from pipelines.params import Cluster
from pipelines.state import wait_for_lock


def test_kept_through_failure_and_gone_after_success(tmp_path: Path) -> None:
    cluster = Cluster(storage=str(tmp_path))
    with pytest.raises(KeyboardInterrupt), state.in_progress(cluster, "train-vae", "abc") as folder:
        (folder / "last.pt").write_text("x")
        raise KeyboardInterrupt
    with state.in_progress(cluster, "train-vae", "abc") as again:
        assert (again / "last.pt").read_text() == "x"
    assert not folder.exists()


def test_another_fingerprint_starts_afresh(tmp_path: Path) -> None:
    cluster = Cluster(storage=str(tmp_path))
    with pytest.raises(KeyboardInterrupt), state.in_progress(cluster, "train-vae", "abc") as folder:
        (folder / "last.pt").write_text("x")
        raise KeyboardInterrupt
    with state.in_progress(cluster, "train-vae", "def") as other:
        assert not (other / "last.pt").exists()


def test_two_processes_do_not_share_state(tmp_path: Path) -> None:
    held = wait_for_lock(tmp_path / "lock", 1)
    with pytest.raises(Usage, match="another process is at work"):
        wait_for_lock(tmp_path / "lock", 0.3)
    held.close()
    wait_for_lock(tmp_path / "lock", 1).close()


def test_only_what_is_old_and_unlocked_is_swept(tmp_path: Path) -> None:
    for name in ("old", "held", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        if name != "new":
            past = time.time() - 20 * 86400
            os.utime(tmp_path / name / "lock", (past, past))
    held = open(tmp_path / "held" / "lock", "a")  # noqa: SIM115
    import fcntl

    fcntl.flock(held, fcntl.LOCK_EX)
    state.sweep(tmp_path, days=14)
    held.close()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["held", "new"]


def test_a_fingerprint_depends_on_every_part() -> None:
    base = state.fingerprint(a=1, b={"c": 2})
    assert base == state.fingerprint(b={"c": 2}, a=1)
    assert base != state.fingerprint(a=1, b={"c": 3})


def test_a_familys_code_decides_only_its_own_hash() -> None:
    hashes = {family: state.code_hash(family) for family in ("flow", "latent", "adversarial")}
    assert len(set(hashes.values())) == 3
