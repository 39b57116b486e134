"""Servers for tests and benchmarks, each started on a free loopback port and gone with its block.

`postgres()`, `object_store()` (moto: S3 in memory) and `mlflow_server(backend_uri, artifact_uri)` yield a handle with
`kill()` (SIGKILL) and `restart()`, which comes back on the same port; PostgreSQL and MLflow keep their data, moto's
memory is lost with it.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 180.0  # of a busy machine
PASSWORD = "seen-by-nobody"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A process of its own group, and how to tell that it answers."""

    command: Sequence[str]
    ready: Callable[[], bool]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as sink:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
                env={**os.environ, **self.env}, user=self.user, cwd=self.log.parent, preexec_fn=_die_with_parent,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.command[0]} did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to all of it, without a word."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.kill()
        self.start()

    def _end(self, sign: signal.Signals) -> None:
        if self.process is None:
            return
        for each in (sign, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, each)
                self.process.wait(10)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()
        self.process = None


def _die_with_parent() -> None:
    """A test process that is killed leaves no server behind."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def answers(url: str) -> Callable[[], bool]:
    """Whether an HTTP server gives any answer below 500."""

    def ready() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return True
        except urllib.error.HTTPError as error:
            return error.code < 500
        except OSError:
            return False

    return ready


@contextmanager
def _running(server: Server, sign: signal.Signals = signal.SIGKILL) -> Iterator[None]:
    server.start()
    try:
        yield
    finally:
        server._end(sign)


def postgres_programs() -> Path | None:
    """The folder of Debian's `postgresql`, or of whatever `initdb` is on PATH; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


@dataclass
class Postgres:
    uri: str
    server: Server

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        self.server.restart()


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A throw-away cluster with one database, `mlflow`. PostgreSQL refuses to run as root: then as `postgres`."""
    programs = postgres_programs()
    if programs is None:
        raise RuntimeError("PostgreSQL is not installed: apt-get install postgresql")
    user = _unprivileged() if os.geteuid() == 0 else None
    with _folder("dgm-pg-", user) as folder:
        data, secret, port = folder / "data", folder / "password", free_port()
        secret.write_text(PASSWORD)
        secret.chmod(0o644)  # in a folder that only its owner enters
        subprocess.run(
            [programs / "initdb", "-D", data, "-N", "-U", "mlflow", "-A", "scram-sha-256", "--pwfile", secret,
             "--no-locale", "-E", "UTF8"],
            check=True, capture_output=True, user=user, cwd=folder,
        )  # fmt: skip
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-q"]
        server = Server(
            command=[str(programs / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder),
                     "-c", "shared_buffers=16MB", "-c", "fsync=off"],
            ready=lambda: subprocess.run(ready, check=False).returncode == 0,
            log=folder / "log", user=user,
        )  # fmt: skip
        with _running(server, signal.SIGINT):  # a fast shutdown: shared memory goes too
            env = {**os.environ, "PGPASSWORD": PASSWORD}
            address = ["-h", "127.0.0.1", "-p", str(port), "-U", "mlflow"]
            subprocess.run([programs / "createdb", *address, "mlflow"], check=True, env=env, capture_output=True)
            yield Postgres(f"postgresql+psycopg2://mlflow:{PASSWORD}@127.0.0.1:{port}/mlflow", server)


def _unprivileged() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


@contextmanager
def _folder(prefix: str, user: str | None = None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))  # pytest's own folders let nobody else in
    try:
        if user is not None:
            shutil.chown(folder, user)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class ObjectStore:
    """S3 at `endpoint`, with one bucket; `env` is what a client needs."""

    endpoint: str
    bucket: str
    env: Mapping[str, str]
    server: Server

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name=self.env["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"], aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def pause(self) -> None:
        """It takes connections and answers nothing, and forgets nothing (SIGSTOP)."""
        assert self.server.process is not None
        os.killpg(self.server.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.server.process is not None
        os.killpg(self.server.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        """Comes back empty, with the bucket."""
        self.server.restart()
        self.client().create_bucket(Bucket=self.bucket)


@contextmanager
def object_store(bucket: str = "dgm") -> Iterator[ObjectStore]:
    """moto's S3 server."""
    port = free_port()
    env = {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": PASSWORD, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    with _folder("dgm-s3-") as folder:
        server = Server(
            command=[sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            ready=answers(f"http://127.0.0.1:{port}/moto-api/"), log=folder / "log",
        )  # fmt: skip
        with _running(server):
            store = ObjectStore(env["AWS_ENDPOINT_URL"], bucket, env, server)
            store.client().create_bucket(Bucket=bucket)
            yield store


@dataclass
class Mlflow:
    """A tracking server at `uri`."""

    uri: str
    server: Server

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        self.server.restart()


@contextmanager
def mlflow_server(
    backend_uri: str, artifact_uri: str, env: Mapping[str, str] = {}, *arguments: str
) -> Iterator[Mlflow]:
    """`mlflow server` with artefacts passing through it.

    Args:
        env: credentials of the artefact store.
        arguments: further ones, such as `--app-name basic-auth`.
    """
    port = free_port()
    with _folder("dgm-mlflow-") as folder:
        server = Server(
            command=[sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
                     "--workers", "1", "--backend-store-uri", backend_uri,
                     "--artifacts-destination", artifact_uri, *arguments],
            env={**env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_TRACKING_URI": ""},
            ready=answers(f"http://127.0.0.1:{port}/health"), log=folder / "log",
        )  # fmt: skip
        with _running(server):
            yield Mlflow(f"http://127.0.0.1:{port}", server)
