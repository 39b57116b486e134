"""A run's writes on their way to MLflow: an append-only journal on the driver's disk that survives whoever writes it.

Any process of the machine appends; the one that holds the lock sends, in order, and notes how far it came. Appending
never waits for a network. A killed process loses nothing that it appended: the next stage, or
`python -m pipelines.tracking flush`, sends the rest.

This module runs in Ray's controller: it imports nothing but the standard library.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

TERMINAL = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True)
class Entry:
    """One write: what kind, what it holds, when it was made (ms), and where the journal goes on after it.

    `kind` is "damaged" where the line is not what was written.
    """

    kind: str
    content: Mapping[str, Any]
    time: int
    end: int


class Spool:
    """The folder of one MLflow run: `journal`, `sent` (how much of it MLflow has), `blobs/` and who the run is."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.journal = self.folder / "journal"
        self.blobs = self.folder / "blobs"

    def create(self, **about: Any) -> None:
        """Make the folder ready for appending; what it holds already is kept."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.journal.touch()
        _replace(self.folder / "run.json", json.dumps(about))

    @property
    def about(self) -> dict[str, Any]:
        """What `create` was given; empty where nobody has got that far."""
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def append(self, kind: str, **content: Any) -> None:
        """Add one entry at the end, whole or not at all as far as readers can tell.

        Raises:
            OSError: the disk is full, or the folder is gone because its run was settled.
        """
        text = json.dumps({"kind": kind, "time": int(time.time() * 1000), **content})
        # The newline before ends what a killed process may have left half-written; one write call with O_APPEND goes
        # in front of or behind another process's, never between.
        line = f"\n{zlib.crc32(text.encode()):08x} {text}\n".encode()
        file = os.open(self.journal, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(file, line) != len(line):
                raise OSError(f"{self.journal}: only a part was written; the disk is full")
        finally:
            os.close(file)

    def blob(self, name: str = "", suffix: str = "") -> Path:
        """A path of its own for a file or folder that an entry will name; write it before the entry."""
        return self.blobs / f"{name}{uuid.uuid4()}{suffix}"

    def read(self, start: int) -> Iterator[Entry]:
        """The whole lines from byte `start` on."""
        with open(self.journal, "rb") as file:
            file.seek(start)
            yield from _entries(file, start)

    @property
    def sent(self) -> int:
        """Up to which byte of the journal MLflow has everything."""
        path = self.folder / "sent"
        return int(path.read_text()) if path.exists() else 0

    def acknowledge(self, entry: Entry) -> None:
        """MLflow has this entry and all before it: its files are not needed any more."""
        _replace(self.folder / "sent", str(entry.end))
        for name in files_of(entry):
            path = self.blobs / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def refuse(self, entry: Entry, why: str) -> None:
        """Set aside, with its files, what the server will never take."""
        with open(self.folder / "refused", "a") as file:
            file.write(json.dumps({"why": why, "kind": entry.kind, "time": entry.time, **entry.content}) + "\n")
        _replace(self.folder / "sent", str(entry.end))

    @property
    def refused(self) -> list[dict[str, Any]]:
        path = self.folder / "refused"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def waiting(self) -> int:
        """How many entries MLflow does not have yet."""
        return sum(1 for _ in self.read(self.sent))

    def ends(self) -> bool:
        """Whether the last word on the run's status is that it ended."""
        said = [e.content["status"] for e in self.read(0) if e.kind == "status"]
        return bool(said) and said[-1] in TERMINAL

    def last_time(self) -> int:
        """When the last entry was made, in ms; 0 for none."""
        return max((e.time for e in self.read(0)), default=0)

    def remove(self) -> None:
        """Everything is sent. Called under the lock, which goes with the folder."""
        shutil.rmtree(self.folder)


def files_of(entry: Entry) -> list[str]:
    """Names in `blobs/` that the entry speaks of."""
    return [*entry.content.get("images", {}).values(), *([entry.content["blob"]] if "blob" in entry.content else [])]


def _entries(file: BinaryIO, start: int) -> Iterator[Entry]:
    at = start
    for line in file:
        if not line.endswith(b"\n"):
            return  # being written, or left by a kill: the next append ends it
        at += len(line)
        if line == b"\n":
            continue
        said, _, text = line[:-1].partition(b" ")
        try:
            if int(said, 16) != zlib.crc32(text):
                raise ValueError("checksum")
            content = json.loads(text)
        except ValueError:
            yield Entry("damaged", {}, 0, at)
            continue
        yield Entry(content.pop("kind"), content, content.pop("time"), at)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    aside.write_text(text)
    os.replace(aside, path)


def lock(folder: Path, seconds: float = 0) -> BinaryIO | None:
    """Make the folder and be the only one to send from it while the returned file is open; None if another is.

    The kernel frees a dead holder's lock. A folder that its last holder removed in the meantime is made anew.
    """
    deadline = time.monotonic() + seconds
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / "lock", "ab")  # noqa: SIM115  (the caller holds it open)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino == os.stat(folder / "lock").st_ino:
                return file
            file.close()
        except FileNotFoundError:
            file.close()
        except BlockingIOError:
            file.close()
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.1)


def folders(root: Path) -> list[Path]:
    """The runs that have something on its way, or a process at work."""
    return sorted(p.parent for p in root.glob("*/run.json"))
