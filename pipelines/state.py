"""State of a stage in progress: outside DVC's outs (deleted before a stage runs), keyed by what it depends on.

The key covers the stage, its parameters, the data's checksums and the code that decides the result: the same stage
again finds its state and goes on, a changed one starts afresh.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dgm_core
from pipelines.cluster import wait_for_lock
from pipelines.params import Cluster

_CORE = Path(dgm_core.__file__).parent
_SHARED = ["contract.py", "config.py", "distributed.py", "shapes.py"]
_SHARED += ["bijections", "data", "distributions", "nn", "objectives", "training"]


def code_hash(family: str) -> str:
    """Of every line of the library that a run of this family depends on."""
    digest = hashlib.sha256()
    for part in [*_SHARED, f"models/{family}"]:
        path = _CORE / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(_CORE).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def fingerprint(**parts: Any) -> str:
    """Twelve hex digits of what a result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def folder_checksum(folder: Path) -> str:
    """Of the files in a stage's output folder that say what the others hold."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.json")):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def in_progress(cluster: Cluster, stage: str, key: str) -> Iterator[Path]:
    """The state folder of this stage with this key, locked; deleted once the block has put the outs in place."""
    root = (Path(cluster.storage) / "state").resolve()
    root.mkdir(parents=True, exist_ok=True)
    sweep(root, cluster.keep_state_days)
    folder = root / f"{stage}-{key}"
    folder.mkdir(exist_ok=True)
    lock = wait_for_lock(folder / "lock", seconds=60)
    try:
        yield folder
        shutil.rmtree(folder)
    finally:
        lock.close()


def sweep(root: Path, days: float) -> None:
    """Remove what nobody holds and nobody has touched for `days`."""
    oldest = time.time() - days * 86400
    for folder in root.iterdir():
        touched = max((f.stat().st_mtime for f in folder.rglob("*")), default=folder.stat().st_mtime)
        if touched > oldest:
            continue
        with open(folder / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder)


def read_json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
