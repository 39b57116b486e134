"""What KubeRay asks of a RayCluster and a RayJob (`ray.io/v1`), and this project of every pod.

The fields are those of the custom resource definitions; the rules are the ones that the operator checks only once a
resource is there, when a mistake shows as a cluster that never comes up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

CLUSTER = {
    "rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions",
    "gcsFaultToleranceOptions", "networkPolicy", "tlsOptions", "historyServerOptions", "upgradeStrategy", "suspend",
    "managedBy", "headServiceAnnotations",
}  # fmt: skip
GROUP = {"template", "rayStartParams", "resources", "labels"}
HEAD = GROUP | {"headService", "serviceType", "enableIngress"}
WORKERS = GROUP | {
    "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts", "scaleStrategy",
    "suspend",
}  # fmt: skip
AUTOSCALER = {
    "version", "idleTimeoutSeconds", "upscalingMode", "image", "imagePullPolicy", "resources", "securityContext",
    "env", "envFrom", "volumeMounts",
}  # fmt: skip
AUTH = {"mode", "secretName", "enableK8sTokenAuth"}
JOB = {
    "entrypoint", "runtimeEnvYAML", "rayClusterSpec", "clusterSelector", "submissionMode", "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished", "activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit",
    "submitterPodTemplate", "submitterConfig", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources",
    "deletionStrategy", "suspend", "managedBy", "metadata", "jobId",
}  # fmt: skip
MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
LONGEST = {"RayCluster": 53, "RayJob": 47}  # of a name, so that those derived from it still fit
UNITS = {"m": 1e-3, "": 1.0, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str) -> float:
    """Kubernetes' `500m`, `2`, `16Gi` as a number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[KMGT]i|)", str(text))
    if found is None:
        raise ValueError(f"{text!r} is no quantity")
    return float(found[1]) * UNITS[found[2]]


def faults(resource: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a RayCluster or a RayJob; empty where the operator would take it."""
    kind, name = resource["kind"], resource["metadata"]["name"]
    found = [] if resource["apiVersion"] == "ray.io/v1" else [f"apiVersion {resource['apiVersion']} is not ray.io/v1"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST[kind]:
        found.append(f"{kind} name {name!r}: lower-case letters, digits and -, at most {LONGEST[kind]}")
    check = _cluster if kind == "RayCluster" else _job
    return [*found, *check(resource["spec"])]


def _unknown(given: dict[str, Any], known: set[str], where: str) -> Iterator[str]:
    yield from (f"{where}.{key} is not a field" for key in given if key not in known)


def _cluster(spec: dict[str, Any]) -> Iterator[str]:
    yield from _unknown(spec, CLUSTER, "cluster")
    if "headGroupSpec" not in spec:
        yield "headGroupSpec is missing"
        return
    groups = spec.get("workerGroupSpecs", [])
    yield from _unknown(spec["headGroupSpec"], HEAD, "headGroupSpec")
    for group in groups:
        yield from _unknown(group, WORKERS, "workerGroupSpecs")
        yield from (
            f"workerGroupSpecs.{key} is missing"
            for key in ("groupName", "minReplicas", "maxReplicas")
            if key not in group
        )
        fewest, most = group.get("minReplicas", 0), group.get("maxReplicas", 0)
        if not fewest <= group.get("replicas", fewest) <= most:
            yield "replicas is not between minReplicas and maxReplicas"
    if len({group.get("groupName") for group in groups}) < len(groups):
        yield "two groups have one groupName"
    for group in (spec["headGroupSpec"], *groups):
        yield from _group(group)
    yield from _autoscaler(spec, groups)
    yield from _authentication(spec)
    head = _environment(spec["headGroupSpec"])
    if "RAY_REDIS_ADDRESS" in head and "gcsFaultToleranceOptions" not in spec:
        yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"


def _group(group: dict[str, Any]) -> Iterator[str]:
    if not _containers(group):
        yield "a group's template needs at least one container"
    params = group.get("rayStartParams", {})
    if wrong := [key for key, value in params.items() if not isinstance(value, str)]:
        yield f"rayStartParams.{wrong[0]} is not a string"
    if "labels" in params:
        yield "rayStartParams.labels: use the group's labels"
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(params):
        yield "resources stand both in rayStartParams and in the group"


def _containers(group: dict[str, Any]) -> list[dict[str, Any]]:
    return group.get("template", {}).get("spec", {}).get("containers", [])


def _environment(group: dict[str, Any]) -> set[str]:
    return {entry["name"] for container in _containers(group)[:1] for entry in container.get("env", [])}


def _autoscaler(spec: dict[str, Any], groups: list[dict[str, Any]]) -> Iterator[str]:
    options = spec.get("autoscalerOptions", {})
    yield from _unknown(options, AUTOSCALER, "autoscalerOptions")
    switch = "RAY_enable_autoscaler_v2" in _environment(spec["headGroupSpec"])
    if not spec.get("enableInTreeAutoscaling"):
        if options or switch:
            yield "autoscaler settings without enableInTreeAutoscaling"
        return
    if "version" in options and switch:
        yield "autoscalerOptions.version and RAY_enable_autoscaler_v2 are both set"
    if any(group.get("suspend") for group in groups):
        yield "a worker group cannot be suspended with the autoscaler"
    if options.get("version") == "v2" or switch:
        for group in (spec["headGroupSpec"], *groups):
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield "restartPolicy must be Never with autoscaler v2"


def _authentication(spec: dict[str, Any]) -> Iterator[str]:
    options = spec.get("authOptions", {})
    yield from _unknown(options, AUTH, "authOptions")
    if options.get("mode", "disabled") not in ("token", "disabled"):
        yield f"authOptions.mode {options['mode']!r}"
    if options.get("mode") == "token":
        version = re.match(r"(\d+)\.(\d+)\.\d+$", str(spec.get("rayVersion", "")))
        if version is None or (int(version[1]), int(version[2])) < (2, 52):
            yield "token authentication needs rayVersion, 2.52.0 or later"


def _job(spec: dict[str, Any]) -> Iterator[str]:
    yield from _unknown(spec, JOB, "job")
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in MODES:
        yield f"submissionMode {mode!r} is not one of {sorted(MODES)}"
    if not spec.get("entrypoint") and mode != "InteractiveMode":
        yield "entrypoint is missing"
    ttl, ends = spec.get("ttlSecondsAfterFinished", 0), spec.get("shutdownAfterJobFinishes", False)
    if ttl < 0 or (ttl and not ends):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes, and is not negative"
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes"
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        yield "one of rayClusterSpec and clusterSelector must be there"
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit does not go with InteractiveMode"
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(spec):
        yield "SidecarMode has no submitter"
    if spec.get("backoffLimit", 0) < 0 or spec.get("activeDeadlineSeconds", 1) <= 0:
        yield "backoffLimit or activeDeadlineSeconds is negative"
    if "submitterPodTemplate" in spec and not spec["submitterPodTemplate"].get("spec", {}).get("containers"):
        yield "submitterPodTemplate needs a container"
    if "runtimeEnvYAML" in spec and not isinstance(yaml.safe_load(spec["runtimeEnvYAML"]), dict):
        yield "runtimeEnvYAML is no YAML mapping"
    if "rayClusterSpec" in spec:
        if spec["rayClusterSpec"].get("authOptions", {}).get("enableK8sTokenAuth"):
            yield "a RayJob cannot use enableK8sTokenAuth"
        yield from _cluster(spec["rayClusterSpec"])


def pods(resource: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod specs that a RayCluster or a RayJob leads to, by role."""
    spec = resource["spec"]
    cluster = spec if resource["kind"] == "RayCluster" else spec["rayClusterSpec"]
    found = {"head": cluster["headGroupSpec"]["template"]["spec"]}
    found |= {group["groupName"]: group["template"]["spec"] for group in cluster.get("workerGroupSpecs", [])}
    if "submitterPodTemplate" in spec:
        found["submitter"] = spec["submitterPodTemplate"]["spec"]
    return found


def pod_faults(pod: dict[str, Any], *, ray: bool = True) -> list[str]:
    """What is wrong with a pod by this project's rules; `ray`: it runs a Ray node."""
    found: list[str] = []
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or security.get("runAsUser", 0) == 0:
        found.append("may run as root")
    if pod.get("restartPolicy") != "Never":
        found.append("restartPolicy is not Never")
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        own, resources = container.get("securityContext", {}), container.get("resources", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
            found.append("keeps privileges")
        if not resources.get("limits") or resources.get("requests") != resources.get("limits"):
            found.append("requests are not its limits")
        if container["image"].endswith(":latest") or ":" not in container["image"]:
            found.append(f"image {container['image']} has no pinned tag")
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        found += [f"mounts {name}, which is no volume of the pod" for name in mounts.values() if name not in volumes]
        memory = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
        if ray and memory.get("medium") != "Memory":
            found.append("/dev/shm is not in memory")
        elif ray and quantity(memory["sizeLimit"]) >= quantity(resources["limits"]["memory"]):
            found.append("/dev/shm can take all of the container's memory")
    return found
