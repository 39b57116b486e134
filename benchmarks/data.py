"""Batches from shards against decoding pictures every step, and a worker's memory: `python -m benchmarks.data`.

The peer opens 128 PNG files a step with Pillow and stacks them, as an image folder without shards must; its files are
in the page cache, its order is the same. Memory is what a fresh process holds for itself alone (private pages of
/proc/self/smaps_rollup) at most, over one epoch and into the next, beyond what it held before. This
process maps the shards too, as other workers on a machine do, so that the shared page cache is not counted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import ROOT, Row, interleave, report
from dgm_core.contract import Batch, DataSpec
from dgm_core.data.batches import Stream, one_pass
from dgm_core.data.prepare import prepare
from dgm_core.data.shards import Split, open_dataset, write_dataset
from dgm_core.data.sources import parse

BATCH, STEPS, SIDE = 128, 50, 28
EXAMPLES = 500_000  # enough for bytes an example to stand out from what a process allocates anyway


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return report("data", [*_speed(Path(folder)), *_memory(Path(folder))])


def _speed(folder: Path) -> list[Row]:
    split = prepare(parse({"source": "digits", "size": SIDE}), folder / "digits", name="digits").split("train")
    paths = [folder / "png" / f"{row}.png" for row in range(len(split))]
    paths[0].parent.mkdir()
    for batch in one_pass(split, 1):
        assert batch.index is not None
        Image.fromarray(batch.x[0, 0].numpy()).save(paths[int(batch.index)])
    stream = Stream(split, seed=0)

    def ours() -> None:
        for step in range(STEPS):
            stream.at(step * BATCH, BATCH)

    order = np.concatenate([stream.at(step * BATCH, BATCH).index for step in range(STEPS)])  # type: ignore[arg-type]

    def peer() -> None:
        for step in range(STEPS):
            rows = order[step * BATCH : (step + 1) * BATCH]
            torch.from_numpy(np.stack([np.asarray(Image.open(paths[row]))[None] for row in rows]))

    pairs = interleave(ours, peer, pairs=9)
    return [
        Row(f"batches of {BATCH} images of {SIDE}×{SIDE}: shards against PNGs", pairs.ratio, 20.0),
        Row("a batch from shards", float(np.median(pairs.ours)) / STEPS * 1e3, None, unit="ms"),
        Row("a batch from PNGs", float(np.median(pairs.peer)) / STEPS * 1e3, None, unit="ms"),
    ]


def _memory(folder: Path) -> list[Row]:
    spec = DataSpec("image", (1, SIDE, SIDE), 256)
    dataset = write_dataset(
        folder / "large", spec, {"train": _noise(EXAMPLES), "val": _noise(1), "test": _noise(1)}, {"name": "noise"}
    )
    for _ in one_pass(dataset.split("train"), 1000):
        pass
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", "--epoch", str(dataset.path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        Row(
            "a worker's private memory, growth over an epoch",
            int(child.stdout) / EXAMPLES,
            8.0,
            at_least=False,
            unit="B/ex.",
        ),
    ]


def _noise(count: int) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        yield Batch(torch.from_numpy(rng.integers(0, 256, (size, 1, SIDE, SIDE), np.uint8)))


def _epoch(path: str) -> int:
    """In a fresh process: the most bytes held within an epoch and across its end, beyond those before it."""
    other = open_dataset(path).split("val")
    Stream(other, seed=0).at(0, 1)  # code paths and allocators are warm, nothing of the size of the data is held
    split: Split = open_dataset(path).split("train")
    split.rows(np.arange(BATCH))
    before = _private()
    stream, peak = Stream(split, seed=0), 0
    for position in range(0, len(split) + BATCH, BATCH):
        stream.at(position, BATCH)
        if position % (100 * BATCH) == 0 or position + BATCH >= len(split):
            peak = max(peak, _private() - before)
    return peak


def _private() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(fields[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--epoch"]:
        sys.stdout.write(str(_epoch(sys.argv[2])))
        sys.exit(0)
    sys.exit(main())
