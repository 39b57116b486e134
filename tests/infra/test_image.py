"""The image: its Dockerfile's rules, what enters it, the driver's script, and a build where an engine runs."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.files import INFRA, Refused, build_arguments, dockerfile, enters_image, image_faults, project
from tests.support import ROOT

TEXT = (INFRA / "Dockerfile").read_text()
RULES = (ROOT / ".dockerignore").read_text()


def test_nothing_is_wrong() -> None:
    assert image_faults(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("USER ray", "USER root", "last USER is root"),
        ("USER ray", "", "last USER is root"),
        ("USER ray", "USER ray\nUSER 0:0", "last USER is root"),
        ("python:3.11.14-slim-bookworm", "python:latest", "no pinned tag"),
        ("python:3.11.14-slim-bookworm", "python", "no pinned tag"),
        ("COPY . .", "ADD . .", "use COPY"),
        ("COPY . .", "COPY . .\nRUN pip install ray", "not pinned by constraints.txt"),
        ("ARG TORCH_INDEX=", "ARG TORCH_INDEX=https://example.com/cpu", "a URL in the file"),
        ("USER ray", "ENV RAY_AUTH_TOKEN=abc\nUSER ray", "would stay in the image"),
        ("USER ray", "RUN curl http://example.com | sh\nUSER ray", "fetches from the network"),
    ],
)
def test_each_rule_can_fail(old: str, new: str, message: str) -> None:
    assert old in TEXT
    assert any(message in fault for fault in image_faults(TEXT.replace(old, new)))


def test_an_instruction_that_goes_on_beyond_the_end_is_refused() -> None:
    with pytest.raises(Refused, match="goes on beyond the end"):
        dockerfile("FROM a:1\nRUN x && \\\n")


def test_its_python_and_extras_are_the_projects() -> None:
    (base,) = [step.rest for step in dockerfile(TEXT) if step.name == "FROM"]
    found = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-\w+", base)
    assert found is not None
    assert found[1] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert project()["requires-python"] == ">=3.11,<3.12"
    (extras,) = re.findall(r"install --constraint constraints\.txt '\.\[([\w,]+)\]'", TEXT)
    assert set(extras.split(",")) <= set(project()["optional-dependencies"])


def test_variants_are_build_arguments_and_no_index_is_named() -> None:
    assert build_arguments(TEXT) == {"VARIANT": "cuda", "TORCH_INDEX": ""}


@pytest.mark.parametrize(
    ("variant", "index", "code", "said"),
    [
        ("cpu", "", 1, "needs --build-arg TORCH_INDEX"),
        ("tpu", "", 1, "VARIANT=tpu is not accepted"),
        ("cuda", "", 0, ""),
    ],
)
def test_the_variants_step_says_what_is_missing(variant: str, index: str, code: int, said: str) -> None:
    (step,) = [step.rest for step in dockerfile(TEXT) if step.name == "RUN" and step.rest.startswith("case")]
    environment = {"PATH": os.environ["PATH"], "VARIANT": variant, "TORCH_INDEX": index}
    done = subprocess.run(["sh", "-c", step], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code
    assert said in done.stderr


def test_what_the_driver_copies_enters_the_image_and_private_things_do_not() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT)
    inside = {path for path in tracked.stdout.splitlines() if enters_image(path, RULES)}
    needed = {
        "constraints.txt", "pyproject.toml", "dvc.yaml", "params.yaml", ".dvcignore", ".dvc/config",
        "dgm_core/contract.py", "pipelines/train.py", "tuned/vae.yaml",
    }  # fmt: skip
    assert needed <= inside
    assert any(path.startswith("pipelines/templates/") for path in inside)
    assert not [path for path in inside if path.split("/")[0] in ("tests", "docs", "benchmarks", ".ci")]
    for private in (
        "infra/.env", ".env", ".git/config", ".venv/bin/python", "data/digits/spec.json", "models/vae/config.json",
        "mlflow.db", ".dgm/state/a", ".dvc/cache/files/md5/aa", ".dvc/config.local", "dgm_core/__pycache__/a.pyc",
    ):  # fmt: skip
        assert not enters_image(private, RULES), private


@pytest.mark.parametrize("name", ["infra/driver.sh", "infra/make_buckets.py", "infra/compose.cluster.yaml"])
def test_files_that_other_files_name_are_in_the_image(name: str) -> None:
    assert (ROOT / name).is_file()
    assert enters_image(name, RULES)


def code_and_workspace(tmp_path: Path) -> tuple[Path, Path]:
    """A stand-in for the image's code whose `pipelines.repro` says what it was given, and an empty workspace."""
    code, workspace = tmp_path / "code", tmp_path / "workspace"
    for folder in ("dgm_core", "pipelines", "tuned", ".dvc"):
        (code / folder).mkdir(parents=True)
    workspace.mkdir()
    (code / "dgm_core/__init__.py").write_text("")
    (code / "pipelines/__init__.py").write_text("")
    (code / "pipelines/repro.py").write_text("import os, sys\nprint(os.getcwd(), *sys.argv[1:])\n")
    shutil.copy(ROOT / ".dvc/config", code / ".dvc/config")
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, code / name)
    (code / "tuned/vae.yaml").write_text("{}\n")
    return code, workspace


def drive(code: Path, workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "DGM_CODE": str(code), "DGM_WORKSPACE": str(workspace)}
    command = [str(INFRA / "driver.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_driver_puts_the_code_into_the_workspace_and_runs_there(tmp_path: Path) -> None:
    code, workspace = code_and_workspace(tmp_path)
    done = drive(code, workspace, "train@vae", "--force")
    assert done.stdout.split() == [str(workspace), "train@vae", "--force"], done.stderr
    status = subprocess.run(
        [str(Path(sys.executable).parent / "dvc"), "config", "core.no_scm"],
        capture_output=True, text=True, cwd=workspace, check=False,
    )  # fmt: skip
    assert status.stdout.strip() == "true", status.stderr


def test_a_new_image_replaces_the_code_but_neither_results_nor_what_a_search_found(tmp_path: Path) -> None:
    code, workspace = code_and_workspace(tmp_path)
    (code / "dgm_core/old.py").write_text("")
    drive(code, workspace)
    (workspace / "models").mkdir()
    (workspace / "dvc.lock").write_text("{}\n")
    (workspace / "tuned/vae.yaml").write_text("recipe: {steps: 9}\n")
    (code / "dgm_core/old.py").unlink()
    (code / "params.yaml").write_text("datasets: {}\nruns: {}\n")
    assert drive(code, workspace).returncode == 0
    assert not (workspace / "dgm_core/old.py").exists()
    assert (workspace / "params.yaml").read_text() == "datasets: {}\nruns: {}\n"
    assert (workspace / "tuned/vae.yaml").read_text() == "recipe: {steps: 9}\n"
    assert (workspace / "models").is_dir()
    assert (workspace / "dvc.lock").exists()


def test_two_drivers_do_not_share_a_workspace(tmp_path: Path) -> None:
    code, workspace = code_and_workspace(tmp_path)
    (workspace / ".dgm").mkdir()
    with open(workspace / ".dgm/driver.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = drive(code, workspace)
    assert refused.returncode == 1
    assert "another driver is at work" in refused.stderr
    assert not (workspace / "dgm_core").exists()
    assert drive(code, workspace).returncode == 0


def test_a_git_clone_is_left_alone(tmp_path: Path) -> None:
    code, workspace = code_and_workspace(tmp_path)
    (workspace / ".git").mkdir()
    refused = drive(code, workspace)
    assert refused.returncode == 2
    assert "is a git clone" in refused.stderr
    assert not (workspace / "dgm_core").exists()


def engine() -> str | None:
    """Why no image can be built here; None where one can."""
    if shutil.which("docker") is None:
        return "no docker here"
    done = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else "no Docker engine answers"


NO_ENGINE = engine()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))
def test_the_image_builds_and_runs_as_nobody_special() -> None:
    tag = "dgm:test"
    build = ["docker", "build", "--quiet", "--file", str(INFRA / "Dockerfile"), "--tag", tag, str(ROOT)]
    subprocess.run(build, check=True)
    probe = "import os, dgm_core, pipelines; print(os.getuid(), dgm_core.__file__)"
    done = subprocess.run(
        ["docker", "run", "--rm", tag, "python", "-c", probe], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1000", "/opt/dgm/dgm_core/__init__.py"]
