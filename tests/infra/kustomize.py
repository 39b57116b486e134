"""As much of kustomize as infra/kuberay uses, so that its overlays can be built and checked without it.

Resources, components, strategic-merge patches (maps merge, lists replace, `$patch: delete`), JSON patches, images,
generated ConfigMaps and replacements, in kustomize's order. Anything else in a kustomization is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.infra.files import Refused, load_yaml

Resource = dict[str, Any]

_KNOWN = {
    "apiVersion", "kind", "resources", "components", "patches", "images", "configMapGenerator", "generatorOptions",
    "replacements",
}  # fmt: skip


def build(folder: Path) -> list[Resource]:
    """What `kubectl kustomize FOLDER` prints, in no particular order."""
    return _accumulate(folder.resolve(), [], [])


def _accumulate(folder: Path, resources: list[Resource], above: list[Path]) -> list[Resource]:
    if any(folder == root or folder in root.parents for root in above):
        raise Refused(f"{folder}: kustomize refuses a base that holds the folder that names it")
    given = load_yaml((folder / "kustomization.yaml").read_text())
    if unknown := set(given) - _KNOWN:
        raise Refused(f"{folder}: not in this builder: {sorted(unknown)}")
    for name in given.get("resources", []):
        path = (folder / name).resolve()
        if path.is_dir():
            found = _accumulate(path, [], [*above, folder])
        else:
            found = [_plain(document) for document in YAML(typ="safe", pure=True).load_all(_inside(folder, name))]
        for resource in found:
            if any(_identity(resource) == _identity(other) for other in resources):
                raise Refused(f"{folder}: {_identity(resource)} is there twice")
            resources.append(resource)
    for name in given.get("components", []):
        resources = _accumulate((folder / name).resolve(), resources, [*above, folder])
    resources.extend(_config_maps(folder, given))
    for patch in given.get("patches", []):
        text = patch["patch"] if "patch" in patch else _inside(folder, patch["path"])
        resources = _patched(resources, load_yaml(text), patch.get("target"))
    for image in given.get("images", []):
        _set_images(resources, image)
    for replacement in given.get("replacements", []):
        _replace(resources, replacement)
    return resources


def _inside(folder: Path, name: str) -> str:
    path = (folder / name).resolve()
    if folder not in path.parents:
        raise Refused(f"{path}: kustomize reads no file from outside {folder}")
    return path.read_text()


def _plain(tree: Any) -> Any:
    """A copy in which YAML's aliases are no longer one object."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list) else tree


def _identity(resource: Resource) -> tuple[str, str]:
    return resource["kind"], resource["metadata"]["name"]


def _config_maps(folder: Path, given: dict[str, Any]) -> list[Resource]:
    generated = given.get("configMapGenerator", [])
    if generated and not given.get("generatorOptions", {}).get("disableNameSuffixHash"):
        raise Refused(f"{folder}: a hash behind a ConfigMap's name does not reach the fields of a RayCluster")
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": entry["name"]},
            "data": {name: _inside(folder, name) for name in entry["files"]},
        }
        for entry in generated
    ]


def _selected(resources: list[Resource], select: dict[str, str]) -> list[Resource]:
    if unknown := set(select) - {"kind", "name", "fieldPath"}:
        raise Refused(f"not in this builder: selection by {sorted(unknown)}")
    found = [r for r in resources if _identity(r) == (select["kind"], select["name"])]
    if not found:
        raise Refused(f"nothing is {select['kind']} {select['name']}")
    return found


def _patched(resources: list[Resource], patch: Any, target: dict[str, str] | None) -> list[Resource]:
    if isinstance(patch, list):
        for resource in _selected(resources, target or {}):
            for step in patch:
                _apply_step(resource, step)
        return resources
    kind, name = _identity(patch)
    (resource,) = _selected(resources, target or {"kind": kind, "name": name})
    if patch.get("$patch") == "delete":
        return [other for other in resources if other is not resource]
    _merge(resource, patch)
    return resources


def _merge(onto: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        if value is None:
            onto.pop(key, None)
        elif isinstance(value, dict) and isinstance(onto.get(key), dict):
            _merge(onto[key], value)
        else:
            onto[key] = copy.deepcopy(value)


def _apply_step(resource: Resource, step: dict[str, Any]) -> None:
    """One step of a JSON patch (RFC 6902)."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
    parent: Any = resource
    try:
        for part in way:
            parent = parent[int(part)] if isinstance(parent, list) else parent[part]
        key: Any = int(last) if isinstance(parent, list) and last != "-" else last
        if step["op"] == "add" and isinstance(parent, list):
            parent.insert(len(parent) if key == "-" else key, step["value"])
        elif step["op"] == "add":
            parent[key] = step["value"]
        elif step["op"] == "replace":
            _ = parent[key]  # there must be something to replace
            parent[key] = step["value"]
        elif step["op"] == "remove":
            del parent[key]
        elif step["op"] == "test":
            if parent[key] != step["value"]:
                raise Refused(f"{step['path']} is {parent[key]!r}, not {step['value']!r}")
        else:
            raise Refused(f"not in this builder: {step['op']}")
    except (KeyError, IndexError) as error:
        raise Refused(f"{step['op']} {step['path']}: nothing is there ({error!r})") from None


def _set_images(tree: Any, image: dict[str, str]) -> None:
    if isinstance(tree, list):
        for value in tree:
            _set_images(value, image)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                for container in value:
                    if container.get("image", "").split(":")[0] == image["name"]:
                        container["image"] = f"{image['newName']}:{image['newTag']}"
            _set_images(value, image)


def _replace(resources: list[Resource], replacement: dict[str, Any]) -> None:
    (source,) = _selected(resources, replacement["source"])
    value: Any = source
    for part in replacement["source"]["fieldPath"].split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    for target in replacement["targets"]:
        for resource in _selected(resources, target["select"]):
            for path in target["fieldPaths"]:
                *way, last = path.split(".")
                parent: Any = resource
                for part in way:
                    parent = parent[int(part)] if isinstance(parent, list) else parent[part]
                if last not in parent and not target.get("options", {}).get("create"):
                    raise Refused(f"{path}: nothing is there, and `create` is not set")
                parent[last] = copy.deepcopy(value)
