"""How soon bad configuration is refused: each kind of tests/pipelines/test_refusals.py, as the command a user runs.

python -m benchmarks.refusals
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks import fit
from benchmarks.harness import ROOT, Row, report
from tests.pipelines.test_refusals import REFUSALS, arrange, services

LIMIT = 10.0


def main() -> int:
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory(prefix="dgm-refusals-") as name, services() as addresses:
        folder = Path(name)
        fit.dataset(folder / "data", "digits_binary", source="digits", size=16, transform="threshold")
        imports = _seconds(["-c", "import pipelines.train"], folder, {})[0]
        for refusal in REFUSALS:
            environment = arrange(refusal, folder, addresses)
            seconds, code, said = _seconds(["-m", "pipelines.train", "vae"], folder, environment)
            wrong += code != 2 or refusal.message not in said or "Traceback" in said
            rows.append(Row(refusal.name, seconds, LIMIT, at_least=False, unit="s"))
        left = [p for p in psutil.Process().children(recursive=True) if "ray" in " ".join(p.cmdline())]
    rows.append(Row("of which a command's imports", imports, None, unit="s"))
    rows.append(Row("refused with another code or message, or processes left", wrong + len(left), 0, False, ""))
    return report("refusals", rows)


def _seconds(arguments: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, int, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "DGM_CLUSTER")}
    env |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **environment}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    return time.monotonic() - started, done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    raise SystemExit(main())
