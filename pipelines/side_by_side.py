"""`make repro JOBS=N`: stages that do not wait for each other, N at once, each by its own `dvc repro --single-item`.

DVC runs one stage at a time; its own locks let several processes of it share a repository while commands run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

LOCKED = "Unable to acquire lock"
PATIENCE = 600.0  # seconds that a stage waits for another's bookkeeping


def stages(targets: Sequence[str]) -> dict[str, set[str]]:
    """Every stage that the targets (all, if none) need, with the stages that it waits for."""
    import networkx
    from dvc.repo import Repo

    with Repo(os.curdir) as repo:
        graph: Any = repo.index.graph
        named = {stage.addressing: stage for stage in graph}
        root = {stage for stage in graph if stage.path_in_repo == "dvc.yaml"}  # searches are not of `dvc repro`
        wanted = {named[t] for t in targets} if targets else root
        needed = wanted | {s for stage in wanted for s in networkx.descendants(graph, stage)}
        return {s.addressing: {d.addressing for d in graph.successors(s)} for s in needed}


def side_by_side(dvc: str, jobs: int, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the graph. After a failure nothing new starts, what runs is waited for, and the failure's code returns."""
    targets = [a for a in arguments if not a.startswith("-")]
    flags = [a for a in arguments if a.startswith("-")]
    waits_for = stages(targets)
    # Jobs share the cluster's CPUs out among them.
    environment = {**environment, "DGM_JOBS": str(jobs)}
    done: set[str] = set()
    running: dict[Future[int], str] = {}
    code = 0
    with ThreadPoolExecutor(jobs) as pool:
        while waits_for or running:
            ready = [] if code else sorted(s for s, before in waits_for.items() if before <= done)
            for stage in ready[: jobs - len(running)]:
                del waits_for[stage]
                running[pool.submit(_one, [dvc, "repro", "--single-item", *flags, stage], environment)] = stage
            if not running:
                break
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                stage = running.pop(future)
                if future.result() == 0:
                    done.add(stage)
                else:
                    sys.stderr.write(f"{stage} failed; waiting for what else runs\n")
                    code = code or future.result()
    return code


def _one(command: Sequence[str], environment: Mapping[str, str]) -> int:
    deadline = time.monotonic() + PATIENCE
    while True:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        locked = False
        for line in process.stdout:
            if LOCKED in line:
                locked = True
            if not locked:
                sys.stdout.write(f"{command[-1]}: {line}" if line.strip() else "")
                sys.stdout.flush()
        code = process.wait()
        if not locked or time.monotonic() > deadline:
            return code
        time.sleep(1)
