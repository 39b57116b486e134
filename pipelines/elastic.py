"""How many workers an elastic job gets, by what the cluster has now.

Ray's coordinator looks at the cluster every 20 seconds and tells a job meanwhile what it saw then: a group that lost a
node would be started again on that node, and wait for it until the start's timeout.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

REFRESH_SECONDS = 5.0  # that a fresh look may take; without one, the last look has to do


class FreshScaling(ElasticScalingPolicy):
    """Ray's own policy, which asks the coordinator to look again before it is asked."""

    def _get_reserved_resources(self) -> Any:
        coordinator: Any = self._autoscaling_coordinator
        with contextlib.suppress(GetTimeoutError, RayActorError):  # the question that follows says what is wrong
            ray.get(
                coordinator.get_reserved_resources.remote(self._requester_id, recompute=True), timeout=REFRESH_SECONDS
            )
        return super()._get_reserved_resources()
