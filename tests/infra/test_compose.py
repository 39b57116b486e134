"""compose.yaml with .env.example filled in: what starts, in which order, who reaches it, with what secrets."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
from typing import Any

import click
import pytest

from pipelines.params import Cluster
from tests.infra.files import INFRA, Refused, env_file, interpolate, load_yaml, project

RAW = load_yaml((INFRA / "compose.yaml").read_text())
EXAMPLE = env_file((INFRA / ".env.example").read_text())
SECRETS = {name for name, value in EXAMPLE.items() if not value and name != "TORCH_INDEX"}
FILLED = {**EXAMPLE, **{name: f"{name.lower()}1" for name in SECRETS}}
SERVICES: dict[str, dict[str, Any]] = interpolate(RAW, FILLED)["services"]

ONE_SHOT = {"buckets", "driver"}
NODES = ["ray-head", "ray-worker", "driver"]


def seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def faults(services: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with a filled-in compose file, by this project's rules."""
    found: list[str] = []
    for name, service in services.items():
        if name not in ONE_SHOT and ("healthcheck" not in service or service.get("restart") != "unless-stopped"):
            found.append(f"{name}: long-lived, without a health check or a restart")
        for port in service.get("ports", []):
            if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port):
                found.append(f"{name}: {port} is not on loopback")
        image = service["image"]
        if not re.search(r":v?\d+\.\d+[\w.-]*$", image):
            found.append(f"{name}: {image} has no pinned tag")
        for needed, how in service.get("depends_on", {}).items():
            if needed not in services:
                found.append(f"{name}: waits for {needed}, which is no service")
            elif needed in ONE_SHOT and how["condition"] != "service_completed_successfully":
                found.append(f"{name}: {needed} ends, and would never be healthy")
            elif needed not in ONE_SHOT and how["condition"] != "service_healthy":
                found.append(f"{name}: does not wait until {needed} is healthy")
            elif services[needed].get("profiles") and services[needed]["profiles"] != service.get("profiles"):
                found.append(f"{name}: {needed} is in a profile of its own")
        if name in NODES:
            environment = service.get("environment", {})
            if environment.get("RAY_AUTH_MODE") != "token" or not environment.get("RAY_AUTH_TOKEN"):
                found.append(f"{name}: no token")
            if service.get("shm_size") is None:
                found.append(f"{name}: no shm_size")
        if image.startswith("dgm:") and "build" not in service and service.get("pull_policy") != "never":
            found.append(f"{name}: would ask a public registry for an image of this name")
        if image.startswith("dgm:") and service.get("cap_drop") != ["ALL"]:
            found.append(f"{name}: keeps capabilities")
    return found


def test_nothing_is_wrong() -> None:
    assert faults(SERVICES) == []


@pytest.mark.parametrize(
    ("service", "key", "value", "message"),
    [
        ("mlflow", "healthcheck", None, "without a health check"),
        ("ray-head", "restart", "no", "without a health check or a restart"),
        ("mlflow", "ports", ["5000:5000"], "not on loopback"),
        ("ray-head", "ports", ["0.0.0.0:8265:8265"], "not on loopback"),
        ("postgres", "image", "postgres:latest", "no pinned tag"),
        ("postgres", "image", "postgres", "no pinned tag"),
        ("mlflow", "depends_on", {"buckets": {"condition": "service_healthy"}}, "would never be healthy"),
        ("ray-worker", "depends_on", {"ray-head": {"condition": "service_started"}}, "does not wait until"),
        ("mlflow", "depends_on", {"minio": {"condition": "service_healthy"}}, "which is no service"),
        ("mlflow", "depends_on", {"grafana": {"condition": "service_healthy"}}, "profile of its own"),
        ("driver", "environment", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}, "no token"),
        ("ray-worker", "environment", {"RAY_AUTH_MODE": "token"}, "no token"),
        ("ray-worker", "shm_size", None, "no shm_size"),
        ("mlflow", "pull_policy", None, "would ask a public registry"),
        ("driver", "cap_drop", None, "keeps capabilities"),
    ],
)
def test_each_rule_can_fail(service: str, key: str, value: Any, message: str) -> None:
    changed = copy.deepcopy(SERVICES)
    changed[service].pop(key, None)
    if value is not None:
        changed[service][key] = value
    assert any(f"{service}: " in fault and message in fault for fault in faults(changed)), faults(changed)


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_secret_left_empty_stops_compose(name: str) -> None:
    for given in ({**FILLED, name: ""}, {k: v for k, v in FILLED.items() if k != name}):
        with pytest.raises(Refused, match=f"{name}: set it in .env"):
            interpolate(RAW, given)


def test_secrets_are_the_ones_expected_and_everything_else_has_a_default() -> None:
    expected = ["OBJECT_STORE_ACCESS_KEY", "OBJECT_STORE_SECRET_KEY", "POSTGRES_PASSWORD", "RAY_AUTH_TOKEN"]
    assert sorted(SECRETS) == expected
    alone = interpolate(RAW, {name: FILLED[name] for name in SECRETS})["services"]
    assert alone == SERVICES, "the example and the defaults in compose.yaml disagree"
    used = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    assert used == set(EXAMPLE), "a variable that the example does not show, or shows in vain"


def test_a_secret_stands_in_environments_only() -> None:
    for name, service in SERVICES.items():
        rest = str({key: value for key, value in service.items() if key != "environment"})
        assert not [secret for secret in SECRETS if FILLED[secret] in rest], name


def test_the_order_of_starting_has_no_circle() -> None:
    waiting = {name: set(service.get("depends_on", {})) for name, service in SERVICES.items()}
    while ready := [name for name, needs in waiting.items() if not needs & set(waiting)]:
        for name in ready:
            del waiting[name]
    assert not waiting


def test_mlflow_takes_clients_that_use_the_services_name_and_no_others() -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    options = dict(part.lstrip("-").partition("=")[::2] for part in SERVICES["mlflow"]["command"][2:])
    hosts = options["allowed-hosts"].split(",")
    assert is_allowed_host_header(hosts, "mlflow:5000")
    assert is_allowed_host_header(hosts, f"localhost:{EXAMPLE['MLFLOW_PORT']}")
    assert not is_allowed_host_header(hosts, "example.com")
    assert options["artifacts-destination"] == "s3://mlflow"
    assert options["workers"] == "1"
    environment = SERVICES["mlflow"]["environment"]
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_BACKEND_STORE_URI"].endswith("@postgres:5432/mlflow")
    for node in NODES:
        assert SERVICES[node]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, while its command line is imported
def test_every_option_given_to_ray_and_mlflow_is_one_of_theirs() -> None:
    from mlflow.cli import server
    from ray.scripts.scripts import healthcheck, start

    known = {("ray", "start"): start, ("ray", "health-check"): healthcheck, ("mlflow", "server"): server}
    lines = [SERVICES[name]["command"] for name in ("mlflow", "ray-head", "ray-worker")]
    lines.append(SERVICES["ray-head"]["healthcheck"]["test"][1:])
    lines.append(shlex.split(SERVICES["driver"]["entrypoint"][2].replace("$@", "").split("&&")[0]))
    for program, verb, *given in lines:
        options = {part.partition("=")[0] for part in given}
        assert options <= options_of(known[program, verb]), (program, verb)


def test_nodes_join_the_head_and_only_workers_have_cpus() -> None:
    assert "--port=6379" in SERVICES["ray-head"]["command"]
    assert "--num-cpus=0" in SERVICES["ray-head"]["command"]
    assert "--address=ray-head:6379" in SERVICES["ray-worker"]["command"]
    assert SERVICES["driver"]["environment"]["RAY_ADDRESS"] == "ray-head:6379"
    joins = SERVICES["driver"]["entrypoint"][2]
    assert 'ray start --address="$RAY_ADDRESS" --num-cpus=0' in joins
    assert joins.endswith('&& exec /opt/dgm/infra/driver.sh "$@"')
    for node in ("ray-head", "ray-worker"):  # Ray drains for 30 s on SIGTERM; Docker kills after 10 by default
        assert seconds(SERVICES[node]["stop_grace_period"]) > 30
    agents = [part for part in SERVICES["ray-worker"]["command"] if part.startswith("--dashboard-agent-listen-port=")]
    assert agents[0].split("=")[1] in SERVICES["ray-worker"]["healthcheck"]["test"][1]


def test_the_cluster_file_fits_the_containers() -> None:
    path = SERVICES["driver"]["environment"]["DGM_CLUSTER"]
    assert path == "/opt/dgm/infra/compose.cluster.yaml"
    given = load_yaml((INFRA / "compose.cluster.yaml").read_text())
    Cluster.model_validate(given)
    replicas = int(SERVICES["ray-worker"]["deploy"]["replicas"])
    cpus = int(EXAMPLE["RAY_WORKER_CPUS"])
    assert given["workers"][1] * given["cpus_per_worker"] <= replicas * cpus
    bucket = given["storage"].removeprefix("s3://").split("/")[0]
    assert bucket in SERVICES["buckets"]["command"]
    assert "endpoint_override=object-store:9000" in given["storage"]
    assert not [secret for secret in SECRETS if secret in given["storage"]]
    keys = {name for name in SERVICES["driver"]["environment"] if name.startswith("AWS_")}
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= keys
    assert keys <= set(SERVICES["ray-worker"]["environment"])


def test_metrics_read_what_the_head_generates() -> None:
    assert "ray:/tmp/ray" in SERVICES["ray-head"]["volumes"]
    for name in ("prometheus", "grafana"):
        assert SERVICES[name]["profiles"] == ["metrics"]
        assert "ray:/tmp/ray:ro" in SERVICES[name]["volumes"]
    assert SERVICES["ray-head"]["environment"]["RAY_PROMETHEUS_HOST"] == "http://prometheus:9090"


def test_volumes_are_declared_and_mounted_files_exist() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (INFRA / source).exists(), (name, source)
            else:
                assert source in RAW["volumes"], (name, source)


def test_the_images_version_is_the_projects() -> None:
    own = {service["image"] for service in SERVICES.values() if service["image"].startswith("dgm:")}
    assert own == {f"dgm:{project()['version']}-{EXAMPLE['VARIANT']}"}


def test_the_variables_rules_are_composes() -> None:
    given = {"A": "a", "E": ""}
    cases = {
        "${A}": "a", "$A": "a", "${E}": "", "${E:-d}": "d", "${E-d}": "", "${N-d}": "d", "${A:+y}": "y", "${E:+y}": "",
        "$$A": "$A", "a${A:?why}b": "aab",
    }  # fmt: skip
    assert {text: interpolate(text, given) for text in cases} == cases
    for text in ("${N}", "${N?why}", "${E:?why}", "$@"):
        with pytest.raises(Refused):
            interpolate(text, given)


def test_duplicate_keys_and_ambiguous_scalars_are_refused() -> None:
    from ruamel.yaml.constructor import DuplicateKeyError

    with pytest.raises(DuplicateKeyError):
        load_yaml("a: 1\na: 2\n")
    for ambiguous in ("a: yes\n", "a: 017\n", "a: 1e-4\n"):
        with pytest.raises(Refused):
            load_yaml(ambiguous)


def compose_version() -> str | None:
    if shutil.which("docker") is None:
        return None
    done = subprocess.run(["docker", "compose", "version"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


@pytest.mark.skipif(compose_version() is None, reason="no docker compose here")
@pytest.mark.parametrize("profile", ["driver", "metrics"])
def test_docker_compose_reads_it(profile: str, tmp_path: Any) -> None:
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in FILLED.items()))
    command = ["docker", "compose", "--env-file", str(tmp_path / ".env"), "--file", str(INFRA / "compose.yaml")]
    done = subprocess.run([*command, "--profile", profile, "config", "-q"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
