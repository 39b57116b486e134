"""Ray's placement groups: what a job holds of a cluster, and what is left of one that could not tidy up."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any


def free_placement_groups(seconds: float) -> int:
    """Wait until the placement groups of this driver are gone, and remove those that stay; how many did.

    Ray's own cleaner frees those of a controller that died, a moment later, but for one whose workers had not all
    started.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    own = ray.get_runtime_context().get_job_id()  # the last bytes of what the job makes

    def left() -> list[str]:
        table: dict[str, Any] = ray.util.placement_group_table()
        return [key for key, group in table.items() if key.endswith(own) and group["state"] != "REMOVED"]

    deadline = time.monotonic() + seconds
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    leaked = left()
    for key in leaked:
        with suppress(Exception):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key))))
    return len(leaked)


def drives_itself() -> bool:
    """Whether this process is a driver, with one job of its own, and no actor among others of a search."""
    import ray

    return ray.get_runtime_context().get_actor_id() is None
