"""Reading infra/: strict YAML, compose's variables, Dockerfile instructions, .dockerignore."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML

from tests.support import ROOT

INFRA = ROOT / "infra"


class Refused(ValueError):
    """What a file says is not accepted."""


def load_yaml(text: str) -> Any:
    """One document, refusing duplicate keys and scalars that YAML 1.1 and 1.2 read differently (`on`, `017`, `1_000`).

    Docker's parser reads 1.2, kubectl's and Ray's read 1.1: a file has to mean the same to all.
    """
    newer = YAML(typ="safe", pure=True).load(text)  # refuses duplicate keys
    older = yaml.safe_load(text)
    if newer != older:
        raise Refused(f"YAML 1.1 and 1.2 read this differently: {older} and {newer}")
    return newer


def env_file(text: str) -> dict[str, str]:
    """`NAME=value` lines; comments and empty lines are skipped."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, sign, value = line.partition("=")
            if not sign or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or name in found:
                raise Refused(f"not NAME=value, or twice: {line!r}")
            found[name] = value
    return found


_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Za-z_]\w*)(?:(:?[-?+])([^}]*))?\}|([A-Za-z_]\w*)|(.?))")


def interpolate(tree: Any, variables: Mapping[str, str]) -> Any:
    """A compose file's values with its variables filled in, by compose's rules; keys are left alone."""
    if isinstance(tree, Mapping):
        return {key: interpolate(value, variables) for key, value in tree.items()}
    if isinstance(tree, list):
        return [interpolate(value, variables) for value in tree]
    return _VARIABLE.sub(lambda match: _fill(match, variables), tree) if isinstance(tree, str) else tree


def _fill(match: re.Match[str], variables: Mapping[str, str]) -> str:
    dollar, braced, sign, argument, bare, stray = match.groups()
    if dollar:
        return "$"
    if stray is not None:
        raise Refused(f"a single $ before {stray!r}: write $$ for the sign itself")
    name = braced or bare
    value = variables.get(name)
    lacking = value is None or (sign is not None and sign.startswith(":") and value == "")
    if sign and sign.endswith("+"):
        return "" if lacking else argument
    if not lacking:
        return value or ""
    if sign and sign.endswith("-"):
        return argument
    if sign:
        raise Refused(f"{name}: {argument}")
    raise Refused(f"{name} is not set and has no default")


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str


def dockerfile(text: str) -> list[Instruction]:
    """Instructions in order, with continued lines joined and comments dropped."""
    found: list[Instruction] = []
    waiting = ""
    for line in text.splitlines():
        if line.lstrip().startswith("#") or not line.strip():
            continue
        waiting += line.strip().removesuffix("\\").rstrip() + " "
        if not line.rstrip().endswith("\\"):
            name, _, rest = waiting.strip().partition(" ")
            found.append(Instruction(name.upper(), rest.strip()))
            waiting = ""
    if waiting:
        raise Refused(f"the last instruction goes on beyond the end: {waiting!r}")
    return found


def image_faults(text: str) -> list[str]:
    """What is wrong with a Dockerfile by this project's rules."""
    steps = dockerfile(text)
    faults: list[str] = []
    users = [step.rest for step in steps if step.name == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        faults.append("the last USER is root, or there is none")
    for step in steps:
        if step.name == "FROM" and (":" not in step.rest.split()[0] or ":latest" in step.rest):
            faults.append(f"FROM {step.rest}: no pinned tag")
        if step.name == "ADD":
            faults.append("ADD: use COPY")
        if "://" in step.rest:
            faults.append(f"{step.name}: a URL in the file")
        if step.name in ("ARG", "ENV") and re.search(r"(?i)(password|token|secret|key)\w*=\S", step.rest):
            faults.append(f"{step.name} {step.rest}: a secret would stay in the image's history")
        pinned_or_local = "--constraint constraints.txt" in step.rest or "--no-deps --editable" in step.rest
        if step.name == "RUN" and re.search(r"\bpip\b.*\binstall\b", step.rest) and not pinned_or_local:
            faults.append(f"RUN {step.rest}: not pinned by constraints.txt")
        if step.name == "RUN" and re.search(r"(curl|wget)\s+\S*http", step.rest):
            faults.append(f"RUN {step.rest}: fetches from the network")
    return faults


def build_arguments(text: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for step in dockerfile(text):
        if step.name == "ARG":
            name, sign, value = step.rest.partition("=")
            found[name] = value if sign else None
    return found


def enters_image(path: str, rules: str) -> bool:
    """Whether `COPY . .` takes this file, by .dockerignore's rules: the last pattern that fits decides."""
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    taken = True
    for line in rules.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep = pattern.startswith("!")
        if any(_fits(candidate, pattern.lstrip("!").strip("/")) for candidate in parents):
            taken = keep
    return taken


def _fits(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        rest = pattern.removeprefix("**/")
        parts = path.split("/")
        return any(_fits("/".join(parts[i:]), rest) for i in range(len(parts)))
    given, wanted = path.split("/"), pattern.split("/")
    return len(given) == len(wanted) and all(fnmatchcase(a, b) for a, b in zip(given, wanted, strict=True))


def project() -> dict[str, Any]:
    """pyproject.toml's `[project]`."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, sign, version = line.partition("==")
        if sign and name.lower() == package.lower():
            return version
    raise Refused(f"{package} is not in constraints.txt")
