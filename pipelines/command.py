"""How a command ends: what the user can mend as a line on stderr, and an exit code that says whose matter it is."""

from __future__ import annotations

import gc
import signal
import sys
from typing import Any, NoReturn

from dgm_core.config import RecipeError
from dgm_core.contract import DataMismatch
from dgm_core.runs import RunError
from dgm_core.training.checkpoint import CheckpointError
from dgm_core.training.history import NonFiniteLoss
from pipelines.storage import StorageError


class Usage(SystemExit):
    """Something the user gave is not accepted; printed without a traceback, exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:
        return self.message


class JobFailed(RuntimeError):
    """A job ended with an error that no restart mends; the message is the worker's own."""


class Interrupted(RuntimeError):
    """A job was asked to stop; it has checkpointed and goes on when it is started again."""


def run_main(main: Any) -> NoReturn:
    """Run a stage's `main(argv)`: what the user can mend becomes a readable line on stderr, without a traceback.

    Exit code 2 for what was given, 1 for what went wrong in the run itself. SIGTERM unwinds like an error, so that
    whatever is open is closed and tracked as failed.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(main(sys.argv[1:]))
    except (Usage, DataMismatch, RecipeError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except (JobFailed, NonFiniteLoss, CheckpointError, StorageError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except Interrupted as stopped:
        sys.stderr.write(f"{stopped}\n")
        sys.exit(128 + signal.SIGTERM)
    finally:
        gc.freeze()  # else Python looks through all that torch and MLflow imported once more: a second of every stage


def _terminate(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)
