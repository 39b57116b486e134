"""ray-cluster-aws.yaml by Ray's own validation and our rules; the cluster files; make_buckets.py on an endpoint."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.params import Cluster
from tests.infra.files import INFRA, load_yaml, project
from tests.support import ROOT

GIVEN = load_yaml((INFRA / "ray-cluster-aws.yaml").read_text())


def validate(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    full = fillout_defaults(copy.deepcopy(config))
    validate_config(full)
    return full


def test_ray_accepts_it() -> None:
    full = validate(GIVEN)
    head, workers = full["available_node_types"]["head"], full["available_node_types"]["gpu-spot"]
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"], "the head would be a spot instance"
    assert workers["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert workers["resources"]["GPU"] >= 1
    assert full["provider"]["cache_stopped_nodes"] is False, "a spot instance cannot be stopped"
    for kind in (head, workers):  # containers are one hop further from the metadata service
        assert kind["node_config"]["MetadataOptions"]["HttpPutResponseHopLimit"] == 2


@pytest.mark.parametrize(
    "change",
    [
        {"cluster_nam": "dgm"},
        {"max_workers": "four"},
        {"docker": {"imag": "dgm"}},
        {"head_node_type": "heads"},
        {"provider": {"region": "us-west-2"}},
    ],
)
def test_what_ray_refuses_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"."):  # Ray raises jsonschema's, click's, ValueError and KeyError
        validate({**GIVEN, **change})


def test_it_needs_a_token_and_holds_no_key() -> None:
    text = (INFRA / "ray-cluster-aws.yaml").read_text()
    assert "--env RAY_AUTH_MODE=token" in GIVEN["docker"]["run_options"]
    assert GIVEN["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert set(GIVEN["auth"]) == {"ssh_user"}
    assert not re.search(r"AKIA|aws_secret|ssh_private_key|KeyName|RAY_AUTH_TOKEN=", text)
    assert any("--dashboard-host=127.0.0.1" in line for line in GIVEN["head_start_ray_commands"])


def test_the_image_and_its_cluster_file_fit() -> None:
    assert GIVEN["docker"]["image"] == f"registry.example.com/dgm:{project()['version']}-cuda"
    (path,) = [remote for remote, local in GIVEN["file_mounts"].items() if local == "infra/aws.cluster.yaml"]
    assert f"--env DGM_CLUSTER={path}" in GIVEN["docker"]["head_run_options"]
    cluster = load_yaml((INFRA / "aws.cluster.yaml").read_text())
    Cluster.model_validate(cluster)
    workers = GIVEN["available_node_types"]["gpu-spot"]
    fewest, most = cluster["workers"]
    per_node = min(
        workers["resources"]["GPU"] // cluster["gpus_per_worker"],
        workers["resources"]["CPU"] // cluster["cpus_per_worker"],
    )
    assert fewest <= workers["min_workers"] * per_node
    assert most <= workers["max_workers"] * per_node
    assert workers["max_workers"] <= GIVEN["max_workers"]
    assert f"region={GIVEN['provider']['region']}" in cluster["storage"]


CLUSTERS = sorted([*INFRA.glob("*.cluster.yaml"), *INFRA.glob("kuberay/overlays/*/cluster.yaml")])


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.relative_to(INFRA).as_posix())
def test_every_cluster_file_is_accepted(file: Path) -> None:
    given = load_yaml(file.read_text())
    Cluster.model_validate(given)
    assert not re.search(r"(?i)(key|secret|token|password)\s*[=:]", file.read_text())


@pytest.mark.parametrize("file", sorted(INFRA.rglob("*.yaml")), ids=lambda file: file.relative_to(INFRA).as_posix())
def test_every_yaml_file_of_infra_means_the_same_to_every_parser(file: Path) -> None:
    assert load_yaml(file.read_text())


@pytest.fixture
def endpoint() -> Iterator[str]:
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def make_buckets(*names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    given = {"PATH": os.environ["PATH"], **keys, **environment}
    command = [sys.executable, str(ROOT / "infra/make_buckets.py"), *names]
    return subprocess.run(command, capture_output=True, text=True, env=given, check=False)


def test_buckets_are_made_once_and_left_alone_afterwards(endpoint: str) -> None:
    first = make_buckets("dgm", AWS_ENDPOINT_URL=endpoint)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == ["dgm: made"]
    again = make_buckets("dgm", "mlflow", AWS_ENDPOINT_URL=endpoint)
    assert again.stdout.splitlines() == ["dgm: was there", "mlflow: made"]


def test_a_store_that_does_not_answer_and_a_missing_address_are_said() -> None:
    away = make_buckets("dgm", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert away.returncode == 1
    assert away.stderr.startswith("error: http://127.0.0.1:9: Could not connect")
    assert make_buckets("dgm").returncode == 2
