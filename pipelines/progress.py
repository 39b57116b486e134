"""A bar on the driver's terminal for a job whose history is in a file that the driver sees."""

from __future__ import annotations

import threading
from pathlib import Path

from tqdm import tqdm

from dgm_core.training import history


class Progress:
    """Follows the file until the block ends; quiet when not on a terminal."""

    def __init__(self, file: Path, total: int, what: str) -> None:
        self.file, self.total, self.what = file, total, what

    def __enter__(self) -> Progress:
        self.bar = tqdm(total=self.total, desc=self.what, disable=None, unit="round")
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        if not self.bar.disable:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()
        self.bar.close()

    def _watch(self) -> None:
        while not self.done.wait(1.0):
            rows = history.read(self.file)
            if rows:
                row = rows[-1]
                self.bar.update(int(row["step"]) - self.bar.n)
                self.bar.set_postfix({k.split("/", 1)[1]: f"{v:.4g}" for k, v in row.items() if k.endswith("/loss")})
