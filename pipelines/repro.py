"""`make repro`: one Ray head on loopback for all stages, `dvc repro`, and where to look afterwards.

A cluster that `RAY_ADDRESS` names is used as it is. `--jobs N` (`make repro JOBS=N`) runs stages that do not wait for
each other side by side. Other arguments go to `dvc repro`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipelines.command import Usage, run_main
from pipelines.params import load_params
from pipelines.side_by_side import side_by_side

BIN = Path(sys.executable).parent


@contextmanager
def ray_head() -> Iterator[str]:
    """A head in a process group of its own, ended with the block. `ray stop` would end every cluster of the machine."""
    port, dashboard = free_port(), free_port()
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
    ]  # fmt: skip
    log = Path(".dgm/ray-head.log")
    log.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}
    with open(log, "w") as sink:
        head = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True, env=environment)
    try:
        _wait_for(port, head, log)
        sys.stdout.write(f"Ray dashboard while this runs: http://127.0.0.1:{dashboard}\n")
        sys.stdout.flush()
        yield f"127.0.0.1:{port}"
    finally:
        _end(head)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and head.poll() is None:
        if "Ray runtime started" in log.read_text():
            return
        time.sleep(0.1)
    raise Usage(f"the Ray head did not start; its log is {log}")


def _end(head: subprocess.Popen[bytes]) -> None:
    for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(head.pid, sign)
            head.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    try:
        os.killpg(head.pid, signal.SIGKILL)  # what the head left of its group
    except ProcessLookupError:
        return


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.repro", description="dvc repro with one Ray head.")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="stages at once, where they do not wait")
    given, rest = parser.parse_known_args(argv)
    params = load_params()  # what is wrong with params.yaml is said before anything starts
    if given.jobs < 1:
        raise Usage(f"JOBS={given.jobs} is not accepted: at least 1")
    if not Path(".dvc").exists():
        raise Usage("this is no DVC project: run in a clone of the repository")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    started = time.monotonic()
    with children_stop_first():
        if os.environ.get("RAY_ADDRESS") or params.cluster.most == 0:
            code = _repro(given.jobs, rest, environment)
        else:
            with ray_head() as address:
                environment |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}
                code = _repro(given.jobs, rest, environment)
    if code == 0:
        _say_where_to_look(time.monotonic() - started)
    return code


def _repro(jobs: int, arguments: Sequence[str], environment: dict[str, str]) -> int:
    dvc = shutil.which("dvc", path=environment["PATH"]) or "dvc"
    if jobs > 1:
        return side_by_side(dvc, jobs, arguments, environment)
    return subprocess.run([dvc, "repro", *arguments], env=environment, check=False).returncode


@contextmanager
def children_stop_first() -> Iterator[None]:
    """SIGTERM goes to the stages below DVC, which checkpoint and end; then DVC ends, and so do we. Ctrl-C reaches them
    from the terminal, and we wait for them as well."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def hand_on(*_: object) -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(word.startswith("pipelines.") for word in child.cmdline()):
                    child.terminate()

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def _say_where_to_look(seconds: float) -> None:
    sys.stdout.write(
        f"\nDone in {seconds:.0f} s.\n"
        f"  report       {Path('report/index.html').resolve()}\n"
        "  metrics      dvc metrics show\n"
        "  plots        dvc plots show\n"
        "  dashboards   make dashboards   (MLflow and Ray)\n"
        "  samples      python -c 'import dgm_core; print(dgm_core.load(\"models/flow\").sample(16).shape)'\n"
    )


if __name__ == "__main__":
    run_main(main)
