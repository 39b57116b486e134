"""How many workers a job gets: Ray's own policies, each with one thing changed."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy

REFRESH_SECONDS = 5.0  # that a fresh look may take; without one, the last look has to do


class FreshScaling(ElasticScalingPolicy):
    """As many as there is room for now.

    Ray's coordinator looks at the cluster every 20 seconds and tells a job meanwhile what it saw then: a group that
    lost a node would be started again on that node, and wait for it until the start's timeout. This policy asks it to
    look again first.
    """

    def _get_reserved_resources(self) -> Any:
        coordinator: Any = self._autoscaling_coordinator
        with contextlib.suppress(GetTimeoutError, RayActorError):  # the question that follows says what is wrong
            ray.get(
                coordinator.get_reserved_resources.remote(self._requester_id, recompute=True), timeout=REFRESH_SECONDS
            )
        return super()._get_reserved_resources()


class OwnCluster(FixedScalingPolicy):
    """A fixed number, on a cluster that lasts as long as the stage: nobody adds nodes to it, so Ray's coordinator, a
    process of its own that every job waits for, is not told what the job would like to have."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing to ask for."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing to ask for."""
