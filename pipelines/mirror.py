"""A job's folder on its node's disk, and its copy in `cluster.storage`: checkpoints follow in the background."""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

from dgm_core import distributed
from dgm_core.runs import replaced_folder
from pipelines import snapshots
from pipelines.storage import Storage, StorageError

STATE = (
    "history.jsonl",
    snapshots.FILE,
    "best.pt",
    "last.pt",
)  # in the order of upload: what a checkpoint speaks of comes before it


class Mirror:
    """Keeps `folder` of this node and `prefix` in the storage alike; `pull` on every rank, the rest on rank 0.

    The newest of what waits is sent, so a slow store delays nothing. What could not be sent for the storage's patience
    is raised at the next `push` or `settle`; the node's own copy stays, and is used when the job starts there again.
    """

    def __init__(self, storage: Storage, prefix: str, folder: Path) -> None:
        self.storage, self.prefix, self.folder = storage, prefix, folder
        self.token = uuid.uuid4().hex
        self.serial = 0
        self._waiting: dict[str, Path] = {}
        self._failed: BaseException | None = None
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def pull(self) -> None:
        """Bring the state here, so that training goes on from it. A collective.

        Rank 0 first sends what its node has and the storage has not: an attempt that ended without its store.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if distributed.rank() == 0:
            self.storage.write(f"{self.prefix}/owner", self.token.encode())
            mine, theirs = self._local_serial(), self._remote_serial()
            self.serial = max(mine, theirs)
            if mine > theirs:
                for name in STATE:
                    if (self.folder / name).exists():
                        self.storage.put(self.folder / name, f"{self.prefix}/{name}")
                self.storage.write(f"{self.prefix}/serial", str(mine).encode())
        distributed.barrier()
        for name in STATE:
            try:
                self.storage.get(f"{self.prefix}/{name}", self.folder / name)
            except FileNotFoundError:
                (self.folder / name).unlink(missing_ok=True)
        distributed.barrier()

    def _local_serial(self) -> int:
        path = self.folder / "serial"
        return int(path.read_text()) if path.exists() and (self.folder / "last.pt").exists() else 0

    def _remote_serial(self) -> int:
        return int(self.storage.read(f"{self.prefix}/serial") or 0)

    def push(self, path: Path) -> None:
        """Send `best.pt` or `last.pt` as it is now, soon. With `last.pt` go history, pictures and a serial number."""
        self._raise()
        names = [path.name]
        if path.name == "last.pt":
            self.serial += 1
            _write(self.folder / "serial", str(self.serial))
            names = ["history.jsonl", snapshots.FILE, "last.pt", "serial"]
        with self._changed:
            for name in names:
                if (self.folder / name).exists():
                    self._waiting.pop(name, None)  # to the end of the line, in the newest version
                    self._waiting[name] = self._snapshot(name)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def _snapshot(self, name: str) -> Path:
        """This version of a file, which training will replace; a link where it is replaced whole, else a copy."""
        aside = self.folder / "sending" / name
        aside.parent.mkdir(exist_ok=True)
        fresh = aside.with_name(f"{name}.{uuid.uuid4().hex}")
        if name == "history.jsonl":
            shutil.copyfile(self.folder / name, fresh)
        else:
            os.link(self.folder / name, fresh)
        os.replace(fresh, aside)
        return aside

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                name = next(iter(self._waiting))
                path = self._waiting.pop(name)
                mine = path.with_name(f"{name}.now")
                os.replace(path, mine)
                self._busy = True
            try:
                self._check_owner()
                self.storage.put(mine, f"{self.prefix}/{name}")
            except BaseException as error:
                self._failed = error
            finally:
                mine.unlink(missing_ok=True)
                with self._changed:
                    self._busy = False
                    if self._failed is not None:
                        self._waiting.clear()
                        self._closed = True
                    self._changed.notify_all()

    def _check_owner(self) -> None:
        owner = self.storage.read(f"{self.prefix}/owner")
        if owner != self.token.encode():
            raise StorageError(f"another attempt has taken over {self.prefix}; this one stops")

    def _raise(self) -> None:
        if self._failed is not None:
            raise StorageError(
                f"{self._failed}. Training stopped; the newest checkpoint is on this node in {self.folder}, the last "
                "one that was sent is in the storage: mend the storage and start the stage again, it goes on from there"
            ) from self._failed

    def settle(self) -> None:
        """Wait until everything is sent."""
        with self._changed:
            while (self._waiting or self._busy) and self._failed is None:
                self._changed.wait()
        self._raise()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def deliver(self, result: Path) -> None:
        """Send the finished run; the list of its files comes last and says that it is whole."""
        self.settle()
        names = [f.relative_to(result).as_posix() for f in sorted(result.rglob("*")) if f.is_file()]
        for name in names:
            self.storage.put(result / name, f"{self.prefix}/result/{name}")
        self.storage.write(f"{self.prefix}/result.json", json.dumps(names).encode())
        self.close()


def delivered(storage: Storage, prefix: str) -> Sequence[str] | None:
    """The files of a finished run, or None while it is not whole."""
    text = storage.read(f"{prefix}/result.json")
    return None if text is None else json.loads(text)


def bring(storage: Storage, prefix: str, folder: Path) -> bool:
    """On the driver: the finished run and its history into `folder`; False while there is none."""
    names = delivered(storage, prefix)
    if names is None:
        return False
    storage.get(f"{prefix}/history.jsonl", folder / "history.jsonl")
    with replaced_folder(folder / "result") as out:
        for name in names:
            storage.get(f"{prefix}/result/{name}", out / name)
    return True


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    os.replace(aside, path)
