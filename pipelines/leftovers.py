"""What a stage could not send to MLflow before it ended: say it, and send it later."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipelines.sender import Sender
from pipelines.spool import Spool, lock
from pipelines.tracking_store import hide, masked


def say_what_is_left(spool: Spool, why: str, uri: str) -> None:
    """On stderr; nothing where nothing is left."""
    name = spool.about.get("name", spool.folder.name)
    if waiting := spool.waiting():
        sys.stderr.write(
            f"tracking: {waiting} writes of {name} are not in MLflow ({masked(uri)}: {why or 'no answer in time'}). "
            f"They are kept in {spool.folder}; the next stage sends them, or `python -m pipelines.tracking flush`.\n"
        )
    if refused := spool.refused:
        sys.stderr.write(
            f"tracking: MLflow refused {len(refused)} writes of {name} (the last: {refused[-1]['why']}). "
            f"They are kept in {spool.folder}; delete the folder to forget them.\n"
        )


def settle(folder: Path, uri: str, client: Any, seconds: float) -> str:
    """Send what a run's spool holds, and end a run whose process died; what came of it, in a few words.

    Returns:
        "" if nothing is left, else why not.
    """
    held = lock(folder)
    if held is None:
        return "a stage is at work on it, and sends it"
    spool = Spool(folder)
    about = spool.about
    if not about or about["uri"] != masked(uri):
        held.close()
        return f"it belongs to {about['uri']}: set MLFLOW_TRACKING_URI to send it there" if about else ""
    if not spool.ends():
        spool.append("status", status=about["if_killed"])
    sender = Sender(spool, client, about["run_id"], lambda text: hide(text, uri)).start()
    left = ""
    if not sender.close(seconds):
        left = f"{spool.waiting()} writes wait: {sender.failing or 'no answer in time'}"
    elif refused := spool.refused:
        left = f"MLflow refused {len(refused)} writes (the last: {refused[-1]['why']})"
    else:
        spool.remove()
    if sender.ended:  # else it hangs in a request, and the lock goes with this process
        held.close()
    return left
