"""What every node of a cluster reads and writes: a shared path or an object store, by key under one root.

A write is there whole or not at all. What fails for a while (a store that restarts, a network that drops, a full disk)
is tried again with back-off for `patience` seconds, then it is a `StorageError`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import tenacity
from pyarrow import fs, memory_map

log = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK = 8 * 2**20
OPTIONS = ("endpoint_override", "scheme", "region")  # of s3://bucket/prefix?…; credentials come from the environment

# What trying again does not mend: the request itself is wrong, or not allowed.
_LASTING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EINVAL}
_REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "NO_SUCH_BUCKET", "UNRECOGNIZED_CLIENT")


class StorageError(RuntimeError):
    """The storage did not do what was asked, however often it was tried."""


def check_uri(uri: str) -> str:
    """The URI or path as given, without `file://`.

    Raises:
        ValueError: the scheme or an option is not known, or credentials are in it.
    """
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return parts.path
    if parts.scheme != "s3":
        raise ValueError(f"storage {uri.split('?')[0]!r} is not accepted: give a path that every node sees, or s3://…")
    if parts.username or parts.password:
        raise ValueError(
            "storage: credentials do not belong in the URI; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not parts.netloc:
        raise ValueError("storage: s3:// needs a bucket, as in s3://bucket/prefix")
    unknown = sorted(set(parse_qs(parts.query)) - set(OPTIONS))
    if unknown:
        raise ValueError(f"storage: option {unknown[0]!r} of s3:// is not known; known: {', '.join(OPTIONS)}")
    return uri


class Storage:
    """Files by key; keys are relative paths with `/`. Pickles: only the URI travels, credentials never do."""

    def __init__(self, uri: str, patience: float = 300.0) -> None:
        self.uri, self.patience = check_uri(uri), patience

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.uri, self.patience)

    @cached_property
    def _root(self) -> tuple[fs.FileSystem, str]:
        if not self.uri.startswith("s3://"):
            return fs.LocalFileSystem(), str(Path(self.uri).absolute())
        parts = urlsplit(self.uri)
        options: dict[str, Any] = {name: values[0] for name, values in parse_qs(parts.query).items()}
        # Few attempts inside one call: trying again is ours, where it is seen and bounded by one clock.
        retry = fs.AwsStandardS3RetryStrategy(max_attempts=2)
        store = fs.S3FileSystem(connect_timeout=3, request_timeout=30, retry_strategy=retry, **options)
        return store, f"{parts.netloc}{parts.path}".rstrip("/")

    @property
    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """pyarrow's file system, and the path of the root in it."""
        return self._root

    def _at(self, key: str) -> str:
        if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
            raise ValueError(f"{key!r} is no key")
        return f"{self._root[1]}/{key}".rstrip("/")

    def _try(self, what: str, action: Callable[[], T], patience: float | None = None) -> T:
        limit = self.patience if patience is None else patience

        def say(state: tenacity.RetryCallState) -> None:
            log.warning("storage: %s failed (%s); trying again", what, state.outcome and state.outcome.exception())

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=10),
            stop=tenacity.stop_after_delay(limit),
            before_sleep=say,
            reraise=True,
        )
        try:
            return attempts(action)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"storage {self.uri.split('?')[0]}: {what} failed: {_first_line(error)}") from error

    def check(self, patience: float = 5.0) -> None:
        """Write, read back and delete a small file.

        Raises:
            StorageError: that does not work; says why.
        """
        key = f".check-{uuid.uuid4().hex}"
        self._try("a first write", lambda: self._write(key, key.encode()), patience)
        if self.read(key) != key.encode():
            raise StorageError(f"storage {self.uri}: what was written is not what is read")
        self.delete(key)

    def _write(self, key: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, "data")
            local.write_bytes(data)
            self._put(local, key)

    def write(self, key: str, data: bytes) -> None:
        self._try(f"writing {key}", lambda: self._write(key, data))

    def read(self, key: str) -> bytes | None:
        """The bytes, or None where there is no such file."""

        def action() -> bytes:
            with self._root[0].open_input_stream(self._at(key)) as stream:
                return stream.read()

        try:
            return self._try(f"reading {key}", action)
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        info = self._try(f"looking for {key}", lambda: self._root[0].get_file_info(self._at(key)))
        return info.type == fs.FileType.File

    def put(self, local: Path, key: str) -> None:
        """Upload a file."""
        self._try(f"writing {key}", lambda: self._put(local, key))

    def _put(self, local: Path, key: str) -> None:
        store, _ = self._root
        target = self._at(key)
        if isinstance(store, fs.LocalFileSystem):  # aside and renamed; an object store's upload is one step already
            folder = Path(target).parent
            folder.mkdir(parents=True, exist_ok=True)
            aside = folder / f".{Path(target).name}.{uuid.uuid4().hex}"
            try:
                with open(local, "rb") as source, open(aside, "wb") as sink:
                    shutil.copyfileobj(source, sink, CHUNK)
                    sink.flush()
                    os.fsync(sink.fileno())
                os.replace(aside, target)
            finally:
                aside.unlink(missing_ok=True)
            return
        if local.stat().st_size == 0:
            store.open_output_stream(target).close()
            return
        # One write of a mapped file: an error of reading between two writes would leave a stream whose end, sooner or
        # later, completes the upload as it is.
        with memory_map(str(local)) as source, store.open_output_stream(target) as sink:
            sink.write(source.read_buffer())

    def get(self, key: str, local: Path) -> None:
        """Download a file; `local` appears when it is whole.

        Raises:
            FileNotFoundError: there is no such file.
        """

        def action() -> None:
            local.parent.mkdir(parents=True, exist_ok=True)
            aside = local.with_name(f".{local.name}.{uuid.uuid4().hex}")
            try:
                with self._root[0].open_input_stream(self._at(key)) as source, open(aside, "wb") as sink:
                    while chunk := source.read(CHUNK):
                        sink.write(chunk)
                os.replace(aside, local)
            finally:
                aside.unlink(missing_ok=True)

        self._try(f"reading {key}", action)

    def keys(self, prefix: str) -> dict[str, int]:
        """Bytes of every file under a prefix, by key."""
        store, root = self._root
        select = fs.FileSelector(self._at(prefix), allow_not_found=True, recursive=True)
        found = self._try(f"listing {prefix}", lambda: store.get_file_info(select))
        files = [f for f in found if f.type == fs.FileType.File and not f.base_name.startswith(".")]
        return {f.path[len(root) + 1 :]: int(f.size) for f in files}

    def delete(self, prefix: str) -> None:
        """Remove a file, or everything under a prefix; nothing there is no error."""

        def action() -> None:
            store, _ = self._root
            info = store.get_file_info(self._at(prefix))
            if info.type == fs.FileType.Directory:
                store.delete_dir(info.path)
            elif info.type == fs.FileType.File:
                store.delete_file(info.path)

        self._try(f"deleting {prefix}", action)

    def publish(self, folder: Path) -> str:
        """Upload a folder under the checksum of what it holds, unless it is there; returns its key.

        The manifest comes last: with it the folder is whole.
        """
        manifest = manifest_of(folder)
        text = json.dumps(manifest, sort_keys=True).encode()
        key = f"folders/{hashlib.sha256(text).hexdigest()}"
        if self.read(f"{key}/manifest.json") is None:
            for name in manifest:
                self.put(folder / name, f"{key}/files/{name}")
        self.write(f"{key}/manifest.json", text)  # also where it was there: what is in use stays young
        return key

    def sweep(self, days: float) -> None:
        """Remove published folders and jobs' state that nobody has written for `days`."""
        oldest = time.time() - days * 86400
        for kind in ("folders", "state"):
            select = fs.FileSelector(self._at(kind), allow_not_found=True, recursive=True)
            newest: dict[str, float] = {}
            for file in self._try(f"listing {kind}", lambda select=select: self._root[0].get_file_info(select)):
                if file.type == fs.FileType.File:
                    name = file.path[len(self._root[1]) + 1 :].split("/")[1]
                    newest[name] = max(newest.get(name, 0.0), file.mtime.timestamp())
            for name in (n for n, written in newest.items() if written < oldest):
                self.delete(f"{kind}/{name}")

    def manifest(self, key: str) -> dict[str, dict[str, Any]]:
        """What a published folder holds: {file: {bytes, sha256}}.

        Raises:
            StorageError: there is no such folder, or its manifest is not what its name says.
        """
        text = self.read(f"{key}/manifest.json")
        if text is None or f"folders/{hashlib.sha256(text).hexdigest()}" != key:
            raise StorageError(f"storage {self.uri}: {key} is {'missing' if text is None else 'damaged'}")
        return json.loads(text)


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """{file: {bytes, sha256}} of every file under a folder."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _may_pass(error: BaseException) -> bool:
    """Whether the same call may do later what it did not do now."""
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
        return False
    return error.errno not in _LASTING and not any(word in str(error) for word in _REFUSED)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
