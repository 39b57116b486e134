"""infra/kuberay: every overlay builds, the operator would take what comes out, and its numbers fit one another."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipelines.params import Cluster
from tests.infra import kuberay
from tests.infra.files import INFRA, Refused, load_yaml, pinned, project
from tests.infra.kustomize import build

FOLDERS = ["overlays/cpu", "overlays/gpu", "jobs/cpu", "jobs/gpu"]
ROOT = INFRA / "kuberay"

Change = Callable[[dict[str, Any]], Any]


def with_s3(tmp_path: Path) -> Path:
    """A copy of infra/kuberay as its comments say to change it for S3."""
    shutil.copytree(ROOT, tmp_path / "kuberay")
    for hardware in ("cpu", "gpu"):
        folder = tmp_path / "kuberay/overlays" / hardware
        given = (folder / "kustomization.yaml").read_text()
        wanted = given.replace("# components:\n#   - ", "components:\n  - ")
        assert wanted != given
        (folder / "kustomization.yaml").write_text(wanted)
    return tmp_path / "kuberay"


def built(folder: Path) -> dict[str, dict[str, Any]]:
    return {resource["kind"]: resource for resource in build(folder)}


def ray_resource(resources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (found,) = [resource for kind, resource in resources.items() if kind in ("RayCluster", "RayJob")]
    return found


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("s3", [False, True], ids=["claim", "s3"])
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here: built by tests/infra/kustomize.py alone")
def test_our_builder_builds_what_kubectl_builds(name: str, s3: bool, tmp_path: Path) -> None:
    root = with_s3(tmp_path) if s3 else ROOT
    done = subprocess.run(["kubectl", "kustomize", str(root / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = {
        (each["kind"], each["metadata"]["name"]): each for each in YAML(typ="safe", pure=True).load_all(done.stdout)
    }
    assert {(each["kind"], each["metadata"]["name"]): each for each in build(root / name)} == theirs


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("s3", [False, True], ids=["claim", "s3"])
def test_the_operator_and_the_house_take_it(name: str, s3: bool, tmp_path: Path) -> None:
    resources = built((with_s3(tmp_path) if s3 else ROOT) / name)
    wanted = "RayJob" if name.startswith("jobs") else "RayCluster"
    assert set(resources) == {"ConfigMap", "PersistentVolumeClaim", wanted}
    assert kuberay.faults(resources[wanted]) == []
    for role, pod in kuberay.pods(resources[wanted]).items():
        assert kuberay.pod_faults(pod, ray=role != "submitter") == [], role
        (image,) = {container["image"] for container in pod["containers"]}
        assert image == f"registry.example.com/dgm:{project()['version']}-{'cuda' if name.endswith('gpu') else 'cpu'}"
    spec = resources[wanted]["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    if wanted == "RayJob":
        assert spec["backoffLimit"] > 0, "a lost head is not made up for"
        assert spec["shutdownAfterJobFinishes"]
        assert spec["entrypoint"] == "/opt/dgm/infra/driver.sh"


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("s3", [False, True], ids=["claim", "s3"])
def test_volumes_and_credentials_are_where_the_storage_is(name: str, s3: bool, tmp_path: Path) -> None:
    resources = built((with_s3(tmp_path) if s3 else ROOT) / name)
    claim = resources["PersistentVolumeClaim"]
    pods = kuberay.pods(ray_resource(resources))
    pods.pop("submitter", None)
    for role, pod in pods.items():
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        shares = role == "head" or not s3
        assert (mounts.get("workspace") == "/workspace") == shares
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert claims == [claim["metadata"]["name"]] * shares
        (secret,) = [e["secretRef"] for e in pod["containers"][0]["envFrom"] if "secretRef" in e]
        assert secret == {"name": "dgm-credentials", "optional": not s3}
    assert claim["spec"]["accessModes"] == (["ReadWriteOnce"] if s3 else ["ReadWriteMany"])


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_a_jobs_cluster_is_the_overlays(hardware: str) -> None:
    cluster, job = built(ROOT / "overlays" / hardware), built(ROOT / "jobs" / hardware)
    assert job["RayJob"]["spec"]["rayClusterSpec"] == cluster["RayCluster"]["spec"]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_cluster_file_is_accepted_and_fits_the_pods(name: str) -> None:
    resources = built(ROOT / name)
    ray = ray_resource(resources)
    head = kuberay.pods(ray)["head"]
    (where,) = [e["value"] for e in head["containers"][0]["env"] if e["name"] == "DGM_CLUSTER"]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    (file,) = resources["ConfigMap"]["data"]
    assert where == f"{mounts['cluster']}/{file}"
    (volume,) = [v for v in head["volumes"] if v["name"] == "cluster"]
    assert volume["configMap"]["name"] == resources["ConfigMap"]["metadata"]["name"]

    given = load_yaml(resources["ConfigMap"]["data"][file])
    Cluster.model_validate(given)
    spec = ray["spec"]
    (group,) = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
    worker = kuberay.pods(ray)["workers"]
    limits = worker["containers"][0]["resources"]["limits"]
    gpus = int(limits.get("nvidia.com/gpu", 0))
    fewest, most = given["workers"]
    per_pod = int(kuberay.quantity(limits["cpu"]) // given["cpus_per_worker"])
    if given["gpus_per_worker"]:
        per_pod = min(per_pod, gpus // given["gpus_per_worker"])
    # A stage refuses a cluster that is too small when it starts; the autoscaler would not be asked.
    assert fewest <= group["minReplicas"] * per_pod
    assert most <= group["maxReplicas"] * per_pod
    assert (gpus > 0) == (given["gpus_per_worker"] > 0) == name.endswith("gpu")
    assert given["storage"].startswith("/workspace/")
    mounts = {mount["mountPath"]: mount["name"] for mount in worker["containers"][0]["volumeMounts"]}
    (cache,) = [v for v in worker["volumes"] if v["name"] == mounts[given["cache"]]]
    assert given["cache_gib"] * 2**30 < kuberay.quantity(cache["emptyDir"]["sizeLimit"]), "the pod would be evicted"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("components/s3/cluster.yaml", "volumeMounts/2", "volumeMounts/1", "is 'cache', not 'workspace'"),
        ("overlays/gpu/workers.yaml", "value: workers", "value: others", "is 'workers', not 'others'"),
        ("overlays/gpu/workers.yaml", "containers/0/resources", "containers/1/resources", "nothing is there"),
        ("base/kustomization.yaml", "  - workspace.yaml", "  - ../other.yaml", "reads no file from outside"),
        ("overlays/gpu/kustomization.yaml", "resources:", "namePrefix: a-\nresources:", "not in this builder"),
        ("overlays/gpu/kustomization.yaml", "kind: RayCluster", "kind: RayCloister", "nothing is RayCloister"),
        ("overlays/gpu/kustomization.yaml", "disableNameSuffixHash: true", "labels: {}", "a hash behind"),
        ("jobs/gpu/kustomization.yaml", "../../overlays/gpu", "..", "refuses a base that holds"),
    ],
)
def test_a_wrong_overlay_is_refused(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    root = with_s3(tmp_path)
    (root / "other.yaml").write_text("kind: ConfigMap\nmetadata: {name: other}\n")
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    with pytest.raises(Refused, match=message):
        build(root / "jobs/gpu")


def job(change: Change) -> dict[str, Any]:
    resource = copy.deepcopy(built(ROOT / "jobs/gpu")["RayJob"])
    change(resource)
    return resource


def at(path: str, value: Any) -> Change:
    """Set `spec.<path>` (numbers are places in lists); None deletes."""

    def change(resource: dict[str, Any]) -> None:
        *way, last = path.split(".")
        parent: Any = resource["spec"]
        for part in way:
            parent = parent[int(part)] if part.isdigit() else parent[part]
        if value is None:
            del parent[last]
        else:
            parent[last] = value

    return change


HEAD = "rayClusterSpec.headGroupSpec"
GROUP = "rayClusterSpec.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(apiVersion="ray.io/v1alpha1"), "is not ray.io/v1"),
        (lambda r: r["metadata"].update(name="Dgm"), "lower-case letters"),
        (lambda r: r["metadata"].update(name="d" * 48), "at most 47"),
        (at("entrypoint", None), "entrypoint is missing"),
        (at("submissionMode", "SshMode"), "submissionMode 'SshMode'"),
        (at("submissionMode", "SidecarMode"), "SidecarMode has no submitter"),
        (at("submissionMode", "InteractiveMode"), "does not go with InteractiveMode"),
        (at("shutdownAfterJobFinishes", False), "ttlSecondsAfterFinished needs"),
        (lambda r: r["spec"].update(shutdownAfterJobFinishes=False, suspend=True), "suspend needs"),
        (at("clusterSelector", {"ray.io/cluster": "dgm"}), "one of rayClusterSpec and clusterSelector"),
        (at("rayClusterSpec", None), "one of rayClusterSpec and clusterSelector"),
        (at("backoffLimit", -1), "is negative"),
        (at("backoffLimt", 3), "job.backoffLimt is not a field"),
        (at("runtimeEnvYAML", "just words"), "runtimeEnvYAML"),
        (at("submitterPodTemplate.spec.containers", []), "submitterPodTemplate needs a container"),
        (at("rayClusterSpec.rayVersion", "2.51.0"), "2.52.0 or later"),
        (at("rayClusterSpec.rayVersion", None), "2.52.0 or later"),
        (at("rayClusterSpec.authOptions.mode", "tokens"), "authOptions.mode 'tokens'"),
        (at("rayClusterSpec.authOptions.enableK8sTokenAuth", True), "enableK8sTokenAuth"),
        (at("rayClusterSpec.enableInTreeAutoscaling", False), "without enableInTreeAutoscaling"),
        (at("rayClusterSpec.autoscalerOptions.idleTimeoutSecond", 1), "is not a field"),
        (at("rayClusterSpec.headGroupSpec", None), "headGroupSpec is missing"),
        (at(f"{HEAD}.template.spec.restartPolicy", "Always"), "restartPolicy must be Never"),
        (at(f"{HEAD}.template.spec.containers", []), "at least one container"),
        (at(f"{HEAD}.rayStartParams.num-cpus", 0), "num-cpus is not a string"),
        (at(f"{HEAD}.resources", {"CPU": "0"}), "stand both in"),
        (at(f"{HEAD}.template.spec.containers.0.env", [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]), "RAY_REDIS"),
        (at(f"{HEAD}.template.spec.containers.0.env", [{"name": "RAY_enable_autoscaler_v2"}]), "are both set"),
        (at(f"{GROUP}.template.spec.restartPolicy", "OnFailure"), "restartPolicy must be Never"),
        (at(f"{GROUP}.groupName", None), "groupName is missing"),
        (at(f"{GROUP}.replica", 2), "workerGroupSpecs.replica is not a field"),
        (at(f"{GROUP}.replicas", 5), "not between minReplicas and maxReplicas"),
        (at(f"{GROUP}.suspend", True), "cannot be suspended"),
        (at(f"{GROUP}.rayStartParams.labels", "a=b"), "use the group's labels"),
        (lambda r: r["spec"]["rayClusterSpec"]["workerGroupSpecs"].append(
            r["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]), "two groups have one groupName"),
    ],
)  # fmt: skip
def test_each_rule_of_the_operator_can_fail(change: Change, message: str) -> None:
    assert kuberay.faults(job(lambda _: None)) == []
    found = kuberay.faults(job(change))
    assert any(message in fault for fault in found), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at(f"{GROUP}.template.spec.securityContext.runAsNonRoot", False), "may run as root"),
        (at(f"{GROUP}.template.spec.restartPolicy", "Always"), "restartPolicy is not Never"),
        (at(f"{GROUP}.template.spec.containers.0.securityContext.allowPrivilegeEscalation", True), "privileges"),
        (at(f"{GROUP}.template.spec.containers.0.resources.requests.cpu", "1"), "not its limits"),
        (at(f"{GROUP}.template.spec.containers.0.image", "dgm:latest"), "no pinned tag"),
        (at(f"{GROUP}.template.spec.volumes.0.name", "memory"), "which is no volume"),
        (at(f"{GROUP}.template.spec.volumes.0.emptyDir", {}), "/dev/shm is not in memory"),
        (at(f"{GROUP}.template.spec.volumes.0.emptyDir.sizeLimit", "32Gi"), "all of the container's memory"),
    ],
)
def test_each_rule_of_the_house_can_fail(change: Change, message: str) -> None:
    found = kuberay.pod_faults(kuberay.pods(job(change))["workers"])
    assert any(message in fault for fault in found), found
