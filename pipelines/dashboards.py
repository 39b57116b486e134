"""`make dashboards`: MLflow's UI on the project's store, and a Ray head with its dashboard, on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.command import run_main
from pipelines.params import load_params
from pipelines.repro import ray_head
from pipelines.tracking_store import store_uri


def main(argv: Sequence[str]) -> int:
    uri = store_uri(load_params().tracking)
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "5000", "--workers", "1"]
    with ray_head() as address:
        sys.stdout.write(f"stages join this cluster with: export RAY_ADDRESS={address} RAY_AUTH_MODE=disabled\n")
        if uri.startswith("http"):
            sys.stdout.write(f"MLflow: {uri}\nCtrl-C ends the dashboards.\n")
            sys.stdout.flush()
            try:
                sys.stdin.read()
            except KeyboardInterrupt:
                return 0
            return 0
        sys.stdout.write("MLflow: http://127.0.0.1:5000\nCtrl-C ends both.\n")
        sys.stdout.flush()
        server = subprocess.Popen([*command, "--backend-store-uri", uri], env=environment, cwd=Path.cwd())
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.terminate()
            server.wait()
            return 0


if __name__ == "__main__":
    run_main(main)
