"""Ray: join the cluster at `RAY_ADDRESS`, or start one on this machine for as long as a stage lasts."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.command import Usage
from pipelines.params import Cluster

PREFLIGHT_SECONDS = 4.0
JOINING_SECONDS = 3.0
_GONE = 5.0  # seconds after which an elastic job no longer waits for resources that it was promised
_TURN = 6 * 3600.0  # seconds that a job waits for its turn where several run side by side


@contextmanager
def connected(cluster: Cluster, *, dashboard: bool = False) -> Iterator[None]:
    """Join the cluster at `RAY_ADDRESS`, else start one here for as long as the block lasts.

    Args:
        dashboard: start one with a cluster of our own. Ray Train's placement-group cleaner asks its State API, so
            whoever stops jobs from outside (a search) needs it; a stage alone ends its whole cluster anyway.

    Raises:
        Usage: nothing answers at the address, what answers is no head of this Ray, the token is wrong, or the cluster
            is smaller than `cluster:` asks for.
    """
    if cluster.most == 0:
        yield
        return
    refuse_early(cluster)
    address = _address()
    _settings(cluster, own=address == "local")
    import ray

    try:
        _init(address, cluster, dashboard)
        _wait_for_nodes(cluster, address)
        _check_size(cluster, ray.cluster_resources())
        _check_storage(cluster, {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]})
        yield
    finally:
        ray.shutdown()
        os.environ.pop(NO_DASHBOARD, None)


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or "local"


def refuse_early(cluster: Cluster) -> None:
    """What can be known of a cluster without joining or starting it; a stage asks before it does anything else.

    Raises:
        Usage: see `connected`.
    """
    if cluster.most == 0:
        return
    if (address := _address()) == "local":
        _check_size(cluster, {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()})
    elif address != "auto":
        preflight(address)


NO_DASHBOARD = "DGM_CLUSTER_WITHOUT_DASHBOARD"  # set in the process whose cluster has none


def _settings(cluster: Cluster, *, own: bool) -> None:
    """Ray reads these from the environment, before it is imported or when it starts."""
    alone = os.environ.get("DGM_JOBS", "1") == "1"
    # An elastic job asks for no more than it was told there is: where it has to wait, a node has just died.
    patience = min(cluster.start_timeout_s, _GONE) if cluster.least < cluster.most else cluster.start_timeout_s
    defaults = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(patience if alone else _TURN),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same on the driver and its workers
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_NUM_REDIS_GET_RETRIES": "5",  # seconds; the preflight said already that a head is there
    }
    if own:
        # Nothing preempts this machine, and Ray Train's processes have an environment of their own, for which workers
        # started beforehand are of no use: on few cores these cost seconds of a stage's start.
        defaults |= {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_enable_worker_prestart": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _init(address: str, cluster: Cluster, dashboard: bool) -> None:
    import ray

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        options |= {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
        if not dashboard:
            os.environ[NO_DASHBOARD] = "1"
    if cluster.ship_code:
        import dgm_core
        import pipelines

        options["runtime_env"] = {"py_modules": [os.path.dirname(m.__file__ or "") for m in (dgm_core, pipelines)]}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise Usage(f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')}: the cluster cannot be joined: {first}") from None


def preflight(address: str) -> None:
    """Ask the head at host:port who it is, before Ray's own patience (tens of seconds, and no reason) begins.

    Raises:
        Usage: says what is there instead, and how to mend it.
    """
    if "://" in address:
        raise Usage(
            f"RAY_ADDRESS={address} is a client address; run this on a machine of the cluster and give host:port "
            "of its head (usually port 6379)"
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PREFLIGHT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise Usage(
            f"nothing answers at RAY_ADDRESS={address} ({error}); start a head there with `ray start --head`, or unset "
            "RAY_ADDRESS to start a cluster here"
        ) from None
    _ask_head(address)


def _ask_head(address: str) -> None:
    import grpc
    import ray
    from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    try:
        header = AuthenticationTokenLoader.instance().get_token_for_http_header()
    except Exception as error:
        raise Usage(f"Ray's token cannot be read: {str(error).splitlines()[0]}; set RAY_AUTH_TOKEN") from None
    metadata = [(key.lower(), value) for key, value in header.items()]
    try:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            request = gcs_service_pb2.CheckAliveRequest()  # pyright: ignore[reportAttributeAccessIssue]
            reply = head.CheckAlive(request, timeout=PREFLIGHT_SECONDS, metadata=metadata)
    except grpc.RpcError as error:
        code = error.code()  # pyright: ignore[reportAttributeAccessIssue]
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            how = "another token" if header else "no token"
            raise Usage(
                f"the head at RAY_ADDRESS={address} refuses this token ({how} was sent); set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's"
            ) from None
        if code == grpc.StatusCode.UNIMPLEMENTED:
            raise Usage(
                f"RAY_ADDRESS={address} is a port for Ray clients; give host:port of the head itself (usually 6379)"
            ) from None
        raise Usage(
            f"what answers at RAY_ADDRESS={address} is no Ray head ({code.name}); give host:port of the head "
            "(usually 6379)"
        ) from None
    check_version(reply.ray_version, ray.__version__)


def check_version(theirs: str, ours: str) -> None:
    """Ray's processes talk to their own version only."""
    if theirs != ours:
        raise Usage(
            f"the cluster runs Ray {theirs}, this machine {ours}; install Ray {theirs} here, or rebuild the cluster's "
            f"image with {ours}"
        )


def _wait_for_nodes(cluster: Cluster, address: str) -> None:
    """A cluster that is joined may have a node that joins it just now."""
    import ray

    deadline = time.monotonic() + (JOINING_SECONDS if address != "local" else 0)
    while time.monotonic() < deadline:
        try:
            _check_size(cluster, ray.cluster_resources())
            return
        except Usage:
            time.sleep(0.2)


def _check_size(cluster: Cluster, has: Mapping[str, float]) -> None:
    cpus = cluster.least * (cluster.cpus_per_worker or 1)
    gpus = cluster.least * cluster.gpus_per_worker
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > has.get(name, 0):
            raise Usage(
                f"cluster: {cluster.least} workers need {needed:g} {name}s; there are {has.get(name, 0):g}; lower "
                f"cluster.workers or cluster.{name.lower()}s_per_worker, or join a larger cluster (RAY_ADDRESS)"
            )


def _check_storage(cluster: Cluster, hosts: set[str]) -> None:
    if not cluster.shared and len(hosts) > 1:
        raise Usage(
            f"cluster.storage is {cluster.storage!r}, on this machine's disk, but the cluster has {len(hosts)} "
            f"machines ({', '.join(sorted(hosts)[:5])}); give an absolute path that all of them see, or s3://bucket/prefix"
        )
