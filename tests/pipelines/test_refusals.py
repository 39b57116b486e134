"""Bad configuration, twenty kinds and more: a message that names the mend, exit code 2, and nothing left running.

How long each takes as a command is measured by `benchmarks/refusals.py`, from the same list.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from pipelines import train
from pipelines.command import Usage
from tests.support import ROOT

DEAD = "127.0.0.1:1"


@dataclass(frozen=True)
class Refusal:
    """What is given, and what must be said. `{web}`, `{client}`, `{head}`, `{old}` are addresses of `services`."""

    name: str
    message: str
    cluster: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


REFUSALS = [
    Refusal("negative workers", "cluster.workers: -1 workers are not accepted", {"workers": -1}),
    Refusal("least above most", "cluster.workers: [3, 1] is not accepted: give [least, most]", {"workers": [3, 1]}),
    Refusal("no CPUs a worker", "cluster.cpus_per_worker: Input should be greater than", {"cpus_per_worker": 0}),
    Refusal("a misspelt key", "did you mean 'workers'", {"wrokers": 2}),
    Refusal("a GPU on a machine without", "1 workers need 1 GPUs; there are 0", {"gpus_per_worker": 1}),
    Refusal("more CPUs than there are", "need 4000 CPUs", {"cpus_per_worker": 4000}),
    Refusal("more workers than CPUs", "5000 workers need 5000 CPUs", {"workers": 5000}),
    Refusal("an unknown storage scheme", "storage 'gs://bucket' is not accepted", {"storage": "gs://bucket"}),
    Refusal("no bucket", "s3:// needs a bucket", {"storage": "s3://"}),
    Refusal("credentials in the storage", "do not belong in the URI", {"storage": "s3://key:secret@bucket/x"}),
    Refusal("an unknown storage option", "option 'endpoint' of s3://", {"storage": "s3://b/x?endpoint=y"}),
    Refusal("a dead object store", "first write failed",
            {"storage": f"s3://b/x?endpoint_override={DEAD}&scheme=http&region=us-east-1"}),
    Refusal("storage that cannot be written", "first write failed", {"storage": "{file}/below"}),
    Refusal("local storage that cannot be written", "cannot be written", {"storage": "params.yaml/below"}),
    Refusal("a dead address", "nothing answers at RAY_ADDRESS=127.0.0.1:1", {}, {"RAY_ADDRESS": DEAD}),
    Refusal("no port", "nothing answers at RAY_ADDRESS=head", {}, {"RAY_ADDRESS": "head"}),
    Refusal("a client address", "is a client address", {}, {"RAY_ADDRESS": "ray://127.0.0.1:10001"}),
    Refusal("a port for clients", "is a port for Ray clients", {}, {"RAY_ADDRESS": "{client}"}),
    Refusal("another service's port", "is no Ray head", {}, {"RAY_ADDRESS": "{web}"}),
    Refusal("another token", "refuses this token (", {},
            {"RAY_ADDRESS": "{head}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}),
    Refusal("no token", "refuses this token (no token was sent)", {},
            {"RAY_ADDRESS": "{head}", "RAY_AUTH_MODE": "disabled"}),
    Refusal("another version of Ray", "the cluster runs Ray 1.13.0", {}, {"RAY_ADDRESS": "{old}"}),
    Refusal("a cluster file that is missing", "DGM_CLUSTER=nowhere.yaml", {}, {"DGM_CLUSTER": "nowhere.yaml"}),
    Refusal("a dead tracking server", "tracking", {}, {"MLFLOW_TRACKING_URI": f"http://{DEAD}"}),
    Refusal("no tracking store", "is not accepted: give sqlite:///FILE", tracking={"uri": "file:mlruns"}),
    Refusal("a model of another family", "belongs to family 'latent'", run={"family": "flow"}),
    Refusal("data that is not prepared", "data/other", run={"data": "other"}),
]  # fmt: skip


class GreetingOfAnotherVersion:
    """Answers `CheckAlive` as a head of long ago would; refuses what has no token, as one with tokens does."""

    def __init__(self, version: str, token: str = "") -> None:
        import grpc
        from ray.core.generated import gcs_service_pb2

        def check_alive(request: Any, context: Any) -> Any:
            if token and dict(context.invocation_metadata()).get("authorization") != f"Bearer {token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return gcs_service_pb2.CheckAliveReply(ray_version=version)  # pyright: ignore[reportAttributeAccessIssue]

        handler = grpc.unary_unary_rpc_method_handler(
            check_alive,
            request_deserializer=gcs_service_pb2.CheckAliveRequest.FromString,  # pyright: ignore[reportAttributeAccessIssue]
            response_serializer=gcs_service_pb2.CheckAliveReply.SerializeToString,  # pyright: ignore[reportAttributeAccessIssue]
        )
        self.server = grpc.server(ThreadPoolExecutor(2))
        service = grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"CheckAlive": handler})
        self.server.add_generic_rpc_handlers((service,))
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()


@contextmanager
def services() -> Iterator[dict[str, str]]:
    """Servers that are not what a driver needs: a web page, a gRPC server without the head's service, heads."""
    import grpc

    web = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    client = grpc.server(ThreadPoolExecutor(1))
    port = client.add_insecure_port("127.0.0.1:0")
    client.start()
    old, head = GreetingOfAnotherVersion("1.13.0"), GreetingOfAnotherVersion("2.60.0", token="a" * 64)
    try:
        yield {
            "web": f"127.0.0.1:{web.server_port}", "client": f"127.0.0.1:{port}",
            "old": old.address, "head": head.address,
        }  # fmt: skip
    finally:
        web.shutdown()
        for server in (client, old.server, head.server):
            server.stop(None)


def arrange(refusal: Refusal, folder: Path, addresses: dict[str, str]) -> dict[str, str]:
    """Write params.yaml; the environment to run in."""
    names = {**addresses, "file": str(folder / "params.yaml")}

    def filled(value: Any) -> Any:
        for name, address in names.items():
            value = value.replace(f"{{{name}}}", address) if isinstance(value, str) else value
        return value

    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params["tune"] = {}
    params["cluster"] = {name: filled(value) for name, value in refusal.cluster.items()}
    params["tracking"] = {"log_model": False, "system_metrics": False, **refusal.tracking}
    params["runs"]["vae"].update({"preset": "tiny", "config": {}, "recipe": {"steps": 20}, **refusal.run})
    if refusal.run.get("data") == "other":
        params["datasets"]["other"] = dict(params["datasets"]["digits_binary"])
    yaml.dump(params, folder / "params.yaml")
    return {name: filled(value) for name, value in refusal.environment.items()}


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    with services() as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dgm_core.data.prepare import prepare
    from pipelines.params import parse_source

    out = tmp_path_factory.mktemp("data") / "digits_binary"
    given = YAML(typ="safe").load(ROOT / "params.yaml")["datasets"]["digits_binary"]
    prepare(parse_source(given), out, name="digits_binary")
    return out.parent


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.name)
def test_what_cannot_work_is_refused_with_the_mend(
    refusal: Refusal,
    addresses: dict[str, str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restored_environment: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data)
    for name, value in {"RAY_AUTH_MODE": "disabled", **arrange(refusal, tmp_path, addresses)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((SystemExit, ValueError)) as refused:
        train.main(["vae"])
    assert refusal.message in str(refused.value)
    assert "Traceback" not in str(refused.value)
    assert "secret" not in str(refused.value)
    assert [p for p in psutil.Process().children(recursive=True) if "ray" in " ".join(p.cmdline())] == []
    left = {f.name for f in (tmp_path / ".dgm/state").rglob("*") if f.is_file()}
    assert left <= {"lock", "mlflow.json"}  # of a stage that was refused after it had taken its place


@pytest.fixture
def restored_environment() -> Iterator[None]:
    """`connected` and Ray's token loader leave things in the process; a stage is a process of its own."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


def test_every_kind_has_a_message_of_its_own() -> None:
    assert len(REFUSALS) >= 20
    assert len({r.name for r in REFUSALS}) == len(REFUSALS)


def test_a_machine_more_needs_a_storage_that_it_sees() -> None:
    from pipelines.connect import _check_storage
    from pipelines.params import Cluster

    _check_storage(Cluster(), {"one"})
    _check_storage(Cluster(storage="/shared"), {"one", "two"})
    with pytest.raises(Usage, match=r"the cluster has 2 machines \(one, two\); give an absolute path"):
        _check_storage(Cluster(), {"one", "two"})
