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
from typing import IO, Any

import dgm_core
from pipelines.command import Usage
from pipelines.params import Cluster
from pipelines.storage import Storage

_CORE = Path(dgm_core.__file__).parent
_SHARED = ["contract.py", "capabilities.py", "config.py", "distributed.py", "precision.py", "shapes.py"]
_SHARED += ["bijections", "data", "distributions", "nn", "objectives", "training"]


def code_hash(family: str | None, *parts: str) -> str:
    """Of every line of the library that a result depends on: the shared floors, a family of models, other folders."""
    digest = hashlib.sha256()
    for name in [*_SHARED, *([f"models/{family}"] if family else []), *parts]:
        path = _CORE / name
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


def file_checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def in_progress(cluster: Cluster, stage: str, key: str) -> Iterator[Path]:
    """This machine's folder for this stage with this key, locked; deleted once the block has put the outs in place.

    With shared storage the job's own state is there, under `state/<stage>-<key>/`, and goes the same way.
    """
    root = cluster.local / "state"
    try:
        root.mkdir(parents=True, exist_ok=True)
        sweep(root, cluster.keep_state_days)
        folder = root / f"{stage}-{key}"
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise Usage(f"{root} cannot be written ({error.strerror}); give cluster.storage another place") from None
    with wait_for_lock(folder / "lock", seconds=60):
        yield folder
        if cluster.shared and cluster.most > 0:
            storage = Storage(cluster.storage, cluster.storage_patience_s)
            storage.delete(f"state/{folder.name}")
            storage.sweep(cluster.keep_state_days)
        shutil.rmtree(folder)


def wait_for_lock(path: Path, seconds: float) -> IO[str]:
    """Hold an exclusive lock on a file until the returned file is closed; the kernel frees a dead holder's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115  (the caller holds it open)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise Usage(
                    f"another process is at work in {path.parent}; wait for it, or stop it (the lock frees itself)"
                ) from None
            time.sleep(0.2)


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
