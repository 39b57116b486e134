"""Our quantiser beside vector-quantize-pytorch's layer, alone and in a network: `python -m benchmarks.quantiser`.

Alone: 65,536 vectors of 64 features against K codes, all in float32. A training step is the forward pass, gradients to
the vectors and the codebook's moving averages; then the codes alone, in evaluation. Both layers start with the same
codebook, and what they choose is compared. Peak memory is what a fresh process takes beyond its inputs; the distances
of all vectors to all codes would be N × K × 4 bytes, which is the goal's bound.

In a network: the convolutions of `vq_vae` at 64 channels, K = 512, the same initial weights, batches and seeds. Both
layers have a decay of 0.99, ten rounds of k-means on the first batch, codes revived below a tenth of their fair share,
the straight-through estimator and a commitment loss of weight 0.25. The error is that of held-out images, pixels in
[−1, 1], a mean over seeds; the rate is of training steps, encoder, decoder and Adam included.

The peer is no dependency of this project: install `vector-quantize-pytorch==1.32.0` beside it. Without it ours alone is
measured. `--tiny` shows within a minute that all runs, and stores nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import fit
from benchmarks.harness import RESULTS, ROOT, Row, interleave, report
from benchmarks.rows import real_data
from dgm_core.data.batches import Stream, one_pass
from dgm_core.data.shards import Dataset
from dgm_core.distributions.observation import to_network
from dgm_core.evaluation import codes as counting
from dgm_core.nn.quantiser import VectorQuantiser
from dgm_core.nn.residual import strided_decoder, strided_encoder

PEER = "vector_quantize_pytorch"
FEATURES, DECAY, BETA, ALIVE = 64, 0.99, 0.25, 0.1
ROWS, CODEBOOKS = 65_536, (512, 8192)
BATCH, CODES, STEPS, SEEDS, HELD_OUT = 64, 512, 300, (0, 1, 2), 1000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Ours(nn.Module):
    def __init__(self, codes: int, rows: int) -> None:
        super().__init__()
        self.layer = VectorQuantiser(codes, FEATURES, decay=DECAY, revive_below=ALIVE)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The quantised vectors, their codes, and the commitment loss with its weight."""
        out = self.layer(z, observe=self.training)
        return out.value, out.codes, BETA * out.commitment

    def finish(self) -> None:
        """After a step."""
        self.layer.settle()

    def start(self, z: Tensor) -> None:
        self.layer.start_from(z.movedim(1, -1).flatten(0, -2))

    def start_with(self, codebook: Tensor) -> None:
        self.layer.codebook.copy_(codebook)
        self.layer.code_sum.copy_(codebook / len(codebook))


class Peer(nn.Module):
    def __init__(self, codes: int, rows: int, kmeans: bool = True) -> None:
        super().__init__()
        self.layer: Any = importlib.import_module(PEER).VectorQuantize(
            dim=FEATURES,
            codebook_size=codes,
            decay=DECAY,
            kmeans_init=kmeans,
            threshold_ema_dead_code=ALIVE * rows / codes,  # it counts vectors, where ours has shares
            commitment_weight=BETA,
            rotation_trick=False,
            accept_image_fmap=True,
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.layer(z)

    def finish(self) -> None:
        """It has moved its codebook in the forward pass."""

    def start(self, z: Tensor) -> None:
        self.layer(z)  # its first pass in training

    def start_with(self, codebook: Tensor) -> None:
        self.layer.codebook = codebook
        self.layer._codebook.cluster_size.fill_(ROWS / len(codebook))
        self.layer._codebook.embed_avg.copy_(codebook * ROWS / len(codebook))


def alone(kind: str, K: int, rows: int) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """A training step and the codes of `rows` vectors, on a map of 32 × 32."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(rows // 1024, FEATURES, 32, 32, generator=g).to(DEVICE).requires_grad_()
    out = torch.randn(rows // 1024, FEATURES, 32, 32, generator=g).to(DEVICE)
    side = (Ours(K, rows) if kind == "ours" else Peer(K, rows, kmeans=False)).to(DEVICE)
    with torch.no_grad():
        side.start_with(z.movedim(1, -1).reshape(-1, FEATURES)[:K].clone())

    def step() -> None:
        side.train()
        z.grad = None
        value, _, commitment = side(z)
        ((value * out).sum() + commitment).backward()
        side.finish()

    @torch.no_grad()
    def find() -> Tensor:
        return side.eval()(z)[1]

    return step, find


def measure_alone(K: int, rows: int, pairs: int, peer: bool) -> list[Row]:
    size = f"N = {rows:,}, D = {FEATURES}, K = {K:,}"
    step, find = alone("ours", K, rows)
    other_step, other_find = alone("peer", K, rows) if peer else (step, find)
    agree = (find() == other_find()).double().mean().item()
    found = []
    for what, mine, theirs in (("training step", step, other_step), ("codes", find, other_find)):
        timed = interleave(mine, theirs, pairs=pairs)
        if peer:
            found.append(Row(f"{what}: rate over the peer's ({size})", timed.ratio, 1.0))
        found.append(Row(f"{what}: ours ({size})", 1e3 * statistics.median(timed.ours), None, unit="ms"))
    if peer:
        # Single precision may see a tie where there is none.
        found.append(Row(f"vectors for which both choose the same code ({size})", agree, 0.999, unit=""))
    matrix = rows * K * 4 / 2**20
    for what in ("step", "codes"):
        large = rows * K > 16 * rows * FEATURES  # or the vectors' own copies weigh more than the distances
        goal = matrix if large or (what == "codes" and rows == ROWS) else None
        mine = memory("ours", what, K, rows)
        found.append(Row(f"{what}: peak memory, ours ({size})", mine, goal, at_least=False, unit="MiB"))
        if peer:
            found.append(Row(f"{what}: peak memory, the peer's", memory("peer", what, K, rows), None, unit="MiB"))
    return found


def memory(kind: str, what: str, K: int, rows: int) -> float:
    """MiB at most beyond the inputs, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.quantiser", "--memory", kind, what, str(K), str(rows)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(child.stdout.split()[-1]) / 2**20


def peak(kind: str, what: str, K: int, rows: int) -> int:
    """Bytes; on Linux the process's own high-water mark, which can be reset."""
    for run in alone(kind, 16, 1024):
        run()  # what libraries set up once is not counted
    step, find = alone(kind, K, rows)
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        (step if what == "step" else find)()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    (step if what == "step" else find)()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Network(nn.Module):
    """The layer between the convolutions of `vq_vae`, which are made first and so are alike for one seed."""

    def __init__(self, kind: str, image: tuple[int, ...], seed: int, codes: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = strided_encoder(image[0], 64, 32, 2, 2, 32)
        self.to_code = nn.Conv2d(64, FEATURES, 1)
        self.decoder = strided_decoder(FEATURES, 64, 32, 2, 2, 32, outputs=image[0])
        self.side = (Ours if kind == "ours" else Peer)(codes, BATCH * image[1] * image[2] // 16)
        self.optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, codes, commitment = self.side(self.to_code(self.encoder(x)))
        return self.decoder(value), codes, commitment

    def start(self, x: Tensor) -> None:
        with torch.no_grad():
            self.side.start(self.to_code(self.encoder(x)))

    def step(self, x: Tensor) -> None:
        self.train()
        image, _, commitment = self(x)
        loss = F.mse_loss(image, x) + commitment
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.side.finish()

    @torch.no_grad()
    def error(self, data: Dataset, codes: int) -> tuple[float, float, float]:
        """Of held-out images: the mean squared error, codes in use, and perplexity over K."""
        x = scaled(data, next(one_pass(data.split("test"), HELD_OUT)).x)
        parts = [self.eval()(part) for part in x.split(BATCH)]
        counts = counting.histogram(torch.cat([part[1].cpu() for part in parts]), codes)
        mse = F.mse_loss(torch.cat([part[0] for part in parts]), x).item()
        return mse, counting.usage(counts), counting.perplexity(counts) / codes


def scaled(data: Dataset, x: Tensor) -> Tensor:
    return to_network(x.to(DEVICE), data.spec, torch.float32)


def trained(kind: str, data: Dataset, seed: int, steps: int, codes: int) -> Network:
    network = Network(kind, data.spec.shape, seed, codes).to(DEVICE)
    stream = Stream(data.split("train"), seed=seed)
    torch.manual_seed(seed)
    network.start(scaled(data, stream.at(0, BATCH).x))
    for i in range(steps):
        network.step(scaled(data, stream.at(i * BATCH, BATCH).x))
    return network


def in_network(name: str, data: Dataset, seeds: Sequence[int], steps: int, pairs: int, codes: int) -> list[Row]:
    found: dict[str, list[tuple[float, float, float]]] = {"ours": [], "peer": []}
    last: dict[str, Network] = {}
    for seed in seeds:
        for kind in ("ours", "peer") if seed % 2 == 0 else ("peer", "ours"):
            last[kind] = trained(kind, data, seed, steps, codes)
            found[kind].append(last[kind].error(data, codes))
    stream = Stream(data.split("train"), seed=0)
    batches = [scaled(data, stream.at(i * BATCH, BATCH).x) for i in range(10)]

    def several(network: Network) -> Callable[[], None]:
        def run() -> None:
            for x in batches:
                network.step(x)

        return run

    timed = interleave(several(last["ours"]), several(last["peer"]), pairs=pairs)
    (ours, used, perplexity), (theirs, their_used, their_perplexity) = (
        [statistics.fmean(column) for column in zip(*found[kind], strict=True)] for kind in ("ours", "peer")
    )
    each = ", ".join(f"{a[0]:.5f} / {b[0]:.5f}" for a, b in zip(found["ours"], found["peer"], strict=True))
    size = f"{name}, K = {codes}, {steps} steps of {BATCH}, {len(seeds)} seeds"
    return [
        Row(f"reconstruction error over the peer's ({size}) [{each}]", ours / theirs, 1.0, at_least=False),
        Row(f"reconstruction error, ours ({name})", ours, None, unit=""),
        Row(f"codes in use, ours; the peer {their_used:.3f} ({name})", used, None, unit=""),
        Row(f"perplexity over K, ours; the peer {their_perplexity:.3f} ({name})", perplexity, None, unit=""),
        Row(f"training rate over the peer's ({name}, batch {BATCH}, float32)", timed.ratio, 1.0),
    ]


def datasets(workdir: Path, tiny: bool) -> dict[str, Dataset]:
    if tiny:
        return {"digits": fit.dataset(workdir, "digits", source="digits", size=16)}
    sources: dict[str, dict[str, Any]] = {
        "MNIST": {"source": "idx", "path": str(real_data("mnist")), "transform": {"name": "pad", "to": 32}},
        "CIFAR-10": {"source": "parquet", "path": str(real_data("cifar10_jpeg"))},
        "64 × 64 colour": {"source": "parquet", "path": str(real_data("tiny_imagenet10")), "channels": 3},
    }
    return {name: fit.dataset(workdir, f"data{i}", **s) for i, (name, s) in enumerate(sources.items())}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, one seed; stores nothing")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)  # of the fresh process
    given = parser.parse_args(argv)
    if given.memory:
        kind, what, K, rows = given.memory
        sys.stdout.write(str(peak(kind, what, int(K), int(rows))))
        return 0
    peer = importlib.util.find_spec(PEER) is not None
    if not peer:
        print("vector-quantize-pytorch is not installed: ours alone is measured, and the networks are left out")
    rows, codebooks, pairs = (4096, (128,), 1) if given.tiny else (ROWS, CODEBOOKS, 7)
    seeds, steps, codes = ((0,), 5, 32) if given.tiny else (SEEDS, STEPS, CODES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = [row for K in codebooks for row in measure_alone(K, rows, pairs, peer)]
        if peer:
            for label, data in datasets(folder, given.tiny).items():
                found += in_network(label, data, seeds, steps, pairs, codes)
        return report("quantiser", found, folder if given.tiny else RESULTS)


if __name__ == "__main__":
    sys.exit(main())
