"""Sharded work: one function on a worker of the cluster, or over many parts, with finished parts kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipelines.cluster import resources
from pipelines.params import Cluster
from pipelines.worker import FINAL


def call(function: Callable[..., Any], *args: Any, cluster: Cluster) -> Any:
    """Run one function on one of the cluster's workers, with that worker's share of CPUs (and GPU)."""
    if cluster.most == 0:
        return function(*args)
    import ray
    from ray.exceptions import RayTaskError

    each = resources(cluster, 1)
    task: Any = ray.remote(_on_worker).options(
        num_cpus=each["CPU"], num_gpus=each.get("GPU", 0), max_retries=cluster.max_failures
    )
    try:
        return ray.get(task.remote(function, int(each["CPU"]), *args))
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, FINAL) else error from None


def map_parts(
    function: Callable[[Any], Any],
    parts: Sequence[Any],
    cluster: Cluster,
    *,
    what: str,
    near: bool = False,
    gpus: float = 0,
) -> Iterator[Any]:
    """`function` of each part, in order, on as many CPUs as the cluster has; with progress on a terminal.

    A part whose worker or node dies is done again elsewhere, so `function` must be one that can be.

    Args:
        near: on this process's own node, where it gives the cluster CPUs: the parts are on its disk.
        gpus: of each worker.
    """
    bar = tqdm(total=len(parts), desc=what, disable=None, unit="part")
    if cluster.most == 0:
        for part in parts:
            yield function(part)
            bar.update()
        bar.close()
        return
    import ray
    from ray.exceptions import RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "max_retries": cluster.max_failures}
    here = ray.get_runtime_context().get_node_id()
    if near and any(n["NodeID"] == here and n["Resources"].get("CPU", 0) >= 1 for n in ray.nodes()):
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    task: Any = ray.remote(_on_worker).options(**options)
    ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # no more results in memory than this
    waiting = [task.remote(function, 1, part) for part in parts[:ahead]]
    for i in range(len(parts)):
        try:
            value = ray.get(waiting.pop(0))
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, FINAL) else error from None
        if i + ahead < len(parts):
            waiting.append(task.remote(function, 1, parts[i + ahead]))
        bar.update()
        yield value
    bar.close()


def keep_parts(
    function: Callable[[Any], Mapping[str, np.ndarray]],
    parts: Sequence[Any],
    cluster: Cluster,
    folder: Path,
    *,
    what: str,
    gpus: float = 0,
) -> list[Path]:
    """`map_parts` into one npz file a part; parts whose files are there from an attempt before are not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i}.npz" for i in range(len(parts))]
    missing = [(file, part) for file, part in zip(files, parts, strict=True) if not file.exists()]
    found = map_parts(function, [part for _, part in missing], cluster, what=what, gpus=gpus)
    for (file, _), arrays in zip(missing, found, strict=True):
        aside = file.with_suffix(".partial")
        with open(aside, "wb") as sink:
            np.savez(sink, **arrays)
        os.replace(aside, file)
    return files


def _on_worker(function: Callable[..., Any], threads: int, *args: Any) -> Any:
    torch.set_num_threads(threads)
    return function(*args)
