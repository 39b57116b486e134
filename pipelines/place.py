"""Where a job's inputs, results and state are, seen from whichever node its workers run on.

On one machine they are where they are. On a cluster they go through `cluster.storage`: folders are published there by
checksum and cached on each node's disk; nobody reads another node's disk.
"""

from __future__ import annotations

import fcntl
import getpass
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dgm_core.runs import replaced_folder
from pipelines.command import Usage
from pipelines.mirror import Mirror
from pipelines.params import Cluster
from pipelines.storage import Storage, StorageError, file_sha256

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass
class Output:
    """A folder that a worker fills; `ref` says afterwards where it is."""

    folder: Path
    ref: str = ""


@dataclass(frozen=True)
class Place:
    """Sends folders to a job's workers and brings theirs back; pickles."""

    storage: Storage | None  # None: the workers see this machine's disk
    cache: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    cache_bytes: int = 50 * GIB

    @classmethod
    def of(cls, cluster: Cluster) -> Place:
        """On the driver, before anything is sent.

        Raises:
            Usage: the storage cannot be written and read.
        """
        if not cluster.shared or cluster.most == 0:
            return cls(None)
        default = Path(tempfile.gettempdir(), f"dgm-cache-{getpass.getuser()}")
        try:
            Storage(cluster.storage).check(patience=3)
        except StorageError as error:
            raise Usage(f"cluster.storage: {error}") from None
        return cls(
            Storage(cluster.storage, cluster.storage_patience_s),
            Path(cluster.cache) if cluster.cache else default,
            int(cluster.cache_gib * GIB),
        )

    def send(self, folder: Path) -> str:
        """On the driver: make a folder reachable; the reference is what travels."""
        return str(folder.resolve()) if self.storage is None else self.storage.publish(folder)

    @contextmanager
    def opened(self, ref: str) -> Iterator[Path]:
        """On a worker: the folder on a disk of this node; not evicted while it is open."""
        if self.storage is None:
            yield Path(ref)
            return
        with NodeCache(self.cache / "folders", self.cache_bytes).opened(self.storage, ref) as folder:
            yield folder

    @contextmanager
    def output(self, target: str) -> Iterator[Output]:
        """On a worker: a folder to fill, which is put in its place, or published, when the block ends well."""
        if self.storage is None:
            with replaced_folder(Path(target)) as folder:
                yield Output(folder)
            return
        with tempfile.TemporaryDirectory(prefix="dgm-out-") as name:
            made = Output(Path(name))
            yield made
            made.ref = self.storage.publish(made.folder)

    def mirror(self, folder: str) -> Mirror | None:
        """On a worker: this node's copy of a job's folder; None where the folder itself is at hand."""
        if self.storage is None:
            return None
        return Mirror(self.storage, folder, self.cache / "jobs" / folder.replace("/", "-"))

    def bring(self, ref: str, target: Path) -> None:
        """On the driver: put what `output` made where it belongs."""
        if self.storage is None or not ref:
            return
        with replaced_folder(target) as folder:
            _download(self.storage, ref, folder)


class NodeCache:
    """This node's copies of published folders, verified when fetched; the least recently used go first."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit

    @contextmanager
    def opened(self, storage: Storage, key: str) -> Iterator[Path]:
        """The folder, fetched if it is not here. Several processes of a node wait for one download."""
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.root / key.replace("/", "-")
        lock = open(folder.with_suffix(".lock"), "a")  # noqa: SIM115  (held while the folder is in use)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not folder.is_dir():
                fcntl.flock(lock, fcntl.LOCK_EX)  # gives up the shared lock first: look again
                if not folder.is_dir():
                    self._fetch(storage, key, folder)
                fcntl.flock(lock, fcntl.LOCK_SH)
                if not folder.is_dir():
                    raise StorageError(f"{folder} was removed while it was fetched; is the cache shared with others?")
            os.utime(folder.with_suffix(".lock"))
            yield folder
        finally:
            lock.close()

    def _fetch(self, storage: Storage, key: str, folder: Path) -> None:
        needed = sum(about["bytes"] for about in storage.manifest(key).values())
        self._make_room(needed, keep=folder)
        aside = Path(tempfile.mkdtemp(dir=self.root, prefix=".fetch-"))
        try:
            _download(storage, key, aside)
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _make_room(self, needed: int, keep: Path) -> None:
        entries = [d for d in self.root.iterdir() if d.is_dir() and d.suffix == "" and d != keep]
        for left in (d for d in entries if d.name.startswith(".fetch-")):
            if time.time() - left.stat().st_mtime > 86400:  # a download that was killed
                shutil.rmtree(left, ignore_errors=True)
        sizes = {d: _size(d) for d in entries if not d.name.startswith(".")}
        total = sum(sizes.values())
        for folder in sorted(sizes, key=lambda d: d.with_suffix(".lock").stat().st_mtime):
            if total + needed <= self.limit:
                return
            with open(folder.with_suffix(".lock"), "a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # in use
                shutil.rmtree(folder)
                total -= sizes[folder]
        if total + needed > self.limit:
            log.warning("the cache %s holds %.1f GiB in use; going over its limit", self.root, (total + needed) / GIB)


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _download(storage: Storage, key: str, folder: Path) -> None:
    """Every file of a published folder, each checked against its checksum."""
    for name, about in storage.manifest(key).items():
        for attempt in range(3):
            storage.get(f"{key}/files/{name}", folder / name)
            if file_sha256(folder / name) == about["sha256"]:
                break
            if attempt == 2:
                raise StorageError(f"storage {storage.uri.split('?')[0]}: {key}/files/{name} is damaged; delete {key}")
