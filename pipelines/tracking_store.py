"""Where MLflow keeps runs: its URI, with credentials kept out of sight, and whether it answers."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pipelines.command import Usage
from pipelines.params import Tracking, home

DATABASES = ("postgresql", "mysql", "mssql")
ANSWER_SECONDS = (3.0, 5.0)  # to connect, and to answer; a stage's start must fail within 10 s
PATIENCE = 8.0  # for both, with the look-up of the host's name, which has no time limit of its own


def store_uri(settings: Tracking) -> str:
    """`MLFLOW_TRACKING_URI`, else params.yaml's, with a file's path made absolute.

    A server's user name and password move from the URI into MLflow's environment variables, so that the URI can be
    shown, stored and sent to other processes.

    Raises:
        Usage: the scheme is not one that MLflow's stores have.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or settings.uri
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{home() / uri.removeprefix('sqlite:///')}"
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        if parts.password is not None:
            os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
            os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
        uri = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
        if os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ["MLFLOW_TRACKING_URI"] = uri  # what this process starts inherits it
        return uri
    if parts.scheme.split("+")[0] not in DATABASES:
        raise Usage(
            f"tracking uri {masked(uri)!r} is not accepted: give sqlite:///FILE, a database's URI, or http(s)://SERVER"
        )
    return uri


def masked(uri: str) -> str:
    """The URI without its password."""
    return re.sub(r"(://[^:/@]*):[^/]*@", r"\1:***@", uri)


def connect(settings: Tracking) -> tuple[str, Any]:
    """The store's URI and a client for it, after it answered.

    Raises:
        Usage: it does not, within 10 s.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for name, level in (("mlflow", logging.ERROR), ("alembic", logging.ERROR), ("urllib3", logging.ERROR),
                        ("mlflow.store.db.utils", logging.CRITICAL)):  # fmt: skip
        logging.getLogger(name).setLevel(level)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # trying again is the sender's business
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = store_uri(settings)
    check(uri, settings.experiment)
    try:
        with first_use(uri):
            client = MlflowClient(tracking_uri=uri)
            client.get_experiment_by_name(settings.experiment)
    except MlflowException as error:
        raise unusable(uri, error) from None
    return uri, client


def unusable(uri: str, error: Any) -> Usage:
    """What MLflow's own error says, in a line."""
    return Usage(f"the tracking store {masked(uri)} cannot be used: {hide(error.message.splitlines()[0], uri)}")


def check(uri: str, experiment: str) -> None:
    """Ask the store for something.

    Raises:
        Usage: nothing answers within seconds, it refuses us, or it is no MLflow.
    """
    kind = uri.split(":")[0]
    probe: Callable[[], str | None] = (
        (lambda: _probe_server(uri, experiment)) if kind in ("http", "https")
        else (lambda: _probe_file(Path(uri.removeprefix("sqlite:///")))) if kind == "sqlite"
        else (lambda: _probe_database(uri))
    )  # fmt: skip
    outcome: list[str | None] = []

    def run() -> None:
        try:
            outcome.append(probe())
        except Exception as error:
            outcome.append(reason(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    trouble = outcome[0] if outcome else f"no answer within {PATIENCE:g} s"
    if trouble is not None:
        what = "server" if kind in ("http", "https") else "store"
        raise Usage(f"the tracking {what} {masked(uri)} cannot be used: {hide(trouble, uri)}")


def hide(text: str, uri: str) -> str:
    """The text without the URI's password, nor the one that MLflow's environment variables hold."""
    parts = urlsplit(uri)
    secrets = {parts.password, os.environ.get("MLFLOW_TRACKING_PASSWORD"), os.environ.get("MLFLOW_TRACKING_TOKEN")}
    for secret in filter(None, secrets):
        text = text.replace(secret, "***").replace(unquote(secret), "***")
    return text


def reason(error: BaseException) -> str:
    """One short line of what a client's long error says."""
    text = str(error)
    for sign, said in (
        ("timed out", "no answer in time"),
        ("timeout", "no answer in time"),
        ("onnection refused", "connection refused: nothing listens there"),
        ("ailed to resolve", "its host name is not known"),
        ("ame or service not known", "its host name is not known"),
        ("ERTIFICATE_VERIFY", "its TLS certificate is not trusted (MLFLOW_TRACKING_SERVER_CERT_PATH names your own)"),
        ("WRONG_VERSION_NUMBER", "it does not speak TLS: give http://"),
        ("password authentication failed", "it refuses the user name or the password"),
        ("No module named 'psycopg'", "the driver that is installed is psycopg2: give postgresql+psycopg2://…"),
        ("No module named", f"{text}: install its driver"),
    ):
        if sign in text:
            return said
    lines = [line for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _probe_server(uri: str, experiment: str) -> str | None:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer: Any = http_request(
        get_default_host_creds(uri), "/api/2.0/mlflow/experiments/get-by-name", "GET", max_retries=0,
        timeout=ANSWER_SECONDS, raise_on_status=False, params={"experiment_name": experiment},
    )  # fmt: skip
    text = answer.text
    if answer.status_code == 401 and os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return "it refuses the user name or the password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"
    if answer.status_code == 401:
        return "it wants a user name and a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if answer.status_code == 403 and "Invalid Host" in text:
        return "it refuses this host name: start it with --allowed-hosts naming the one that is used here"
    if answer.status_code == 403:
        return f"it does not let this user see the experiment {experiment!r} (403)"
    if (answer.status_code == 200 and '"experiment"' in text) or (
        answer.status_code == 404 and "RESOURCE_DOES_NOT_EXIST" in text
    ):
        return None
    first = text.strip().splitlines()[0][:200] if text.strip() else ""
    return f"it answers {answer.status_code} {first}".rstrip() + "; is it an MLflow server?"


def _probe_file(path: Path) -> str | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=ANSWER_SECONDS[1], isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")  # what a first write needs: a readable file, writable, no other writer
        connection.execute("ROLLBACK")
    return None


def _probe_database(uri: str) -> str | None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    with engine.connect():
        return None


@contextmanager
def first_use(uri: str) -> Iterator[None]:
    """One process at a time: MLflow makes a database's tables when it first meets it, and two at once spoil it."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    with open(path.with_name(f"{path.name}.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
