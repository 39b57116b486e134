"""The judge: a small classifier of one data set, whose penultimate layer is the space in which samples are compared.

Published Fréchet distances stand on an Inception network's features; those weights are not to be had everywhere and
know nothing of digits, sounds or codes. A classifier trained on the data set itself orders models the same way, and
works for every kind of data. Distances on its features are called `frechet`, never `fid`: they compare models that
were scored by one and the same judge.

Data without classes has no classifier: its features are standardised coordinates (`kind: "coordinates"`), beyond
`COORDINATES` of them projected on their first principal directions.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.evaluation.examples import Batches, chunks, seeded, take
from dgm_core.evaluation.files import write_atomically

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

COORDINATES = 128  # features of data without classes: a covariance of this size is estimated well from a few thousand
EMBEDDING = 8  # numbers that stand for a code
WINDOW = 256  # samples of a recording that a spectrum is taken of, at most: 32 ms of speech at 8 kHz
BANDS = 32  # that a spectrum is averaged down to: single frequencies are noise
HELD_BYTES = 2**29  # of the training split, kept in memory
CHUNK = 256  # examples put through at once


class Judge(nn.Module):
    """Features and classes of data that follows one `DataSpec`; always in evaluation mode once fitted."""

    center: Tensor
    scale: Tensor
    table: Tensor
    projection: Tensor
    spread: Tensor

    def __init__(self, spec: DataSpec, features: int) -> None:
        super().__init__()
        self.spec = spec
        self.kind: Literal["classes", "coordinates"] = "classes" if spec.classes > 1 else "coordinates"
        self.accuracy: float | None = None
        self.register_buffer("center", torch.zeros(_statistics_shape(spec)))
        self.register_buffer("scale", torch.ones(_statistics_shape(spec)))
        self.register_buffer("spread", torch.ones(()))  # of features: their root mean variance in training
        if self.kind == "classes":
            self.body = _body(spec, features)
            self.head = nn.Linear(features, spec.classes)
            self.size = features
        else:
            width = spec.dims * (EMBEDDING if spec.kind == "codes" else 1)
            self.size = min(width, COORDINATES)
            self.register_buffer("projection", torch.eye(width, self.size) if width > COORDINATES else torch.empty(0))
            if spec.kind == "codes":
                # Random directions keep the distances between one-hot codes (Johnson–Lindenstrauss) at a fixed size.
                self.register_buffer("table", torch.randn(spec.levels or 0, EMBEDDING) / math.sqrt(EMBEDDING))

    def check(self, spec: DataSpec) -> None:
        """Refuse data that this judge was not trained on."""
        for name in ("kind", "shape", "levels", "classes"):
            own, given = getattr(self.spec, name), getattr(spec, name)
            if own != given:
                raise DataMismatch(
                    f"the judge was trained on data with {name} {own}; this data has {name} {given}. Fit a judge on "
                    "this variant of the data set, or give the one that was."
                )

    def features(self, x: Shaped[Tensor, " B *shape"]) -> Float[Tensor, " B F"]:
        """The penultimate layer, or standardised coordinates, at a mean variance of 1 in training; on the CPU."""
        return torch.cat([self._features(part.x) / self.spread for part in self._parts(x)]).cpu()

    def logits(self, x: Shaped[Tensor, " B *shape"]) -> Float[Tensor, " B classes"]:
        """Of the classes, on the CPU."""
        if self.kind != "classes":
            raise DataMismatch("the data has no classes, so its judge gives features only")
        return torch.cat([self.head(F.relu(self._features(part.x))) for part in self._parts(x)]).cpu()

    def classify(self, x: Shaped[Tensor, " B *shape"]) -> Int[Tensor, " B"]:
        """The likeliest class of each example."""
        return self.logits(x).argmax(1)

    def save(self, path: Path) -> None:
        """Write `judge.safetensors`, then `judge.json` (which holds the former's checksum), each at one stroke."""
        weights = save_tensors({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()})
        about = {
            "spec": self.spec.to_dict(),
            "features": self.size,
            "kind": self.kind,
            "accuracy": self.accuracy,
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "judge.safetensors", weights)
        write_atomically(path / "judge.json", (json.dumps(about, indent=1) + os.linesep).encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        about: dict[str, Any] = json.loads((path / "judge.json").read_text())
        weights = (path / "judge.safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() != about["sha256"]:
            raise DataMismatch(f"{path} holds weights that judge.json was not written with: fit the judge again")
        with seeded(0):  # building draws weights that are then replaced
            judge = cls(DataSpec.from_dict(about["spec"]), about["features"])
        judge.load_state_dict(load_tensors(weights))
        judge.accuracy = about["accuracy"]
        return judge.eval().requires_grad_(False)

    def _parts(self, x: Tensor) -> Any:
        if tuple(x.shape[1:]) != self.spec.shape:
            raise DataMismatch(f"the judge was given examples of shape {tuple(x.shape[1:])}, not {self.spec.shape}")
        return chunks(Batch(x), CHUNK, self.center.device)

    def _features(self, x: Tensor) -> Tensor:
        if self.spec.kind == "codes":
            h = x.long() if self.kind == "classes" else self.table[x.long()].flatten(1)
        else:
            h = (x.float() - self.center) / self.scale
        if self.kind == "classes":
            return self.body(h)
        h = h.flatten(1)
        return h @ self.projection if len(self.projection) else h


def fit_judge(
    spec: DataSpec,
    batches: Batches,
    *,
    seed: int,
    steps: int = 400,
    batch_size: int = 128,
    features: int = 64,
    lr: float = 2e-3,
    held_out: Batches | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Judge:
    """Train a judge on one pass's examples, in its own random stream.

    AdamW under a one-cycle schedule. `accuracy` is measured on `held_out` where given. What does not fit into
    `HELD_BYTES` is thinned evenly.
    """
    size = torch.empty((), dtype=spec.dtype).element_size()
    examples = take(batches(), max(4096, HELD_BYTES // (spec.dims * size)))
    with seeded(seed):
        judge = Judge(spec, features)
        _standardise(judge, examples.x)
        judge.to(device)
        if judge.kind == "classes":
            _train(judge, examples, steps, batch_size, lr, device, progress)
        else:
            judge.eval()
    judge.requires_grad_(False)
    found = judge.features(take(iter([examples]), 4096).x)
    judge.spread = found.var(0, correction=0).mean().sqrt().clamp_min(1e-6).to(device)
    if judge.kind == "classes" and held_out is not None:
        test = take(held_out(), 10_000)
        assert test.y is not None
        judge.accuracy = (judge.classify(test.x) == test.y).float().mean().item()
    return judge


def _train(
    judge: Judge,
    examples: Batch,
    steps: int,
    batch_size: int,
    lr: float,
    device: torch.device | str,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    if examples.y is None:
        raise DataMismatch(f"the data names {judge.spec.classes} classes but its examples carry no labels")
    n = examples.x.shape[0]
    batch_size = min(batch_size, n)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    if judge.spec.kind == "image" or len(judge.spec.shape) == 2:
        judge.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    judge.train()
    order = torch.randperm(n)
    position = 0
    for step in range(steps):
        if position + batch_size > n:
            order, position = torch.randperm(n), 0
        batch = examples.rows(order[position : position + batch_size]).to(device)
        position += batch_size
        loss = F.cross_entropy(judge.head(F.relu(judge._features(batch.x))), batch.y)  # pyright: ignore[reportArgumentType]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None and (step + 1) % 50 == 0:
            progress(step + 1, steps, "judge")
    judge.eval()


def _statistics_shape(spec: DataSpec) -> tuple[int, ...]:
    """One scale a channel of an image, a coordinate of a vector, a recording; codes have none."""
    if spec.kind == "image":
        return (spec.shape[0], 1, 1)
    return spec.shape if spec.kind == "vector" else (1,)


def _standardise(judge: Judge, x: Tensor) -> None:
    """Fit centre and scale and, for many coordinates, their principal directions to at most 4096 examples."""
    spec = judge.spec
    x = take(iter([Batch(x)]), 4096).x
    if spec.kind != "codes":
        axes = {"image": (0, 2, 3), "vector": (0,), "audio": (0, 1)}[spec.kind]
        values = x.double()
        spread = values.std(axes, correction=0, keepdim=True)
        # A coordinate that never moves must not turn a trace of noise into a distance without end.
        spread = torch.where(spread > 0, spread, values.std(correction=0).clamp_min(1e-6))
        judge.center = values.mean(axes, keepdim=True).reshape(judge.center.shape).float()
        judge.scale = spread.reshape(judge.scale.shape).float()
    if judge.kind == "coordinates" and len(judge.projection):
        rows = judge.table[x.long()].flatten(1) if spec.kind == "codes" else (x.float() - judge.center) / judge.scale
        rows = rows.flatten(1)[:: -(-len(rows) // 2048)]
        rows = (rows - rows.mean(0)).double()
        values, vectors = torch.linalg.eigh(rows @ rows.T)  # n x n: D x D would not fit for large pictures
        values, vectors = values[-judge.size :].flip(0), vectors[:, -judge.size :].flip(1)
        # What is left of directions that the data does not have is rounding, and would count like any other.
        kept = torch.where(values > 1e-9 * values[0], values.clamp_min(0).rsqrt(), 0.0)
        directions = rows.T @ (vectors * kept)
        judge.projection[:, : directions.shape[1]] = directions.float()
        judge.projection[:, directions.shape[1] :] = 0


def _body(spec: DataSpec, features: int) -> nn.Sequential:
    """Data -> penultimate layer."""
    if spec.kind == "vector":
        return nn.Sequential(
            nn.Linear(spec.dims, 128), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, features),
        )  # fmt: skip
    if spec.kind == "codes":
        front: list[nn.Module] = [nn.Embedding(spec.levels or 0, 2 * EMBEDDING), _ChannelsFirst()]
        return nn.Sequential(*front, *_convolutions(2 * EMBEDDING, spec.shape, features))
    if spec.kind == "audio":
        spectrum = _Spectrogram(spec.dims)
        return nn.Sequential(spectrum, nn.BatchNorm2d(1), *_convolutions(1, spectrum.grid, features))
    return nn.Sequential(*_convolutions(spec.shape[0], spec.shape[1:], features))


def _convolutions(channels: int, grid: tuple[int, ...], features: int) -> list[nn.Module]:
    """Strided convolutions down to a small grid, then a linear layer."""
    plane = len(grid) == 2
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if plane else (nn.Conv1d, nn.BatchNorm1d)
    kernel, stride, smallest = (5, 2, 4) if plane else (9, 4, 16)
    layers: list[nn.Module] = []
    width = 32
    while min(grid) > smallest:
        layers += [conv(channels, width, kernel, stride, kernel // 2, bias=False), norm(width), nn.ReLU()]
        channels, width, kernel = width, min(2 * width, 128), 3 if plane else kernel
        grid = tuple(-(-n // stride) for n in grid)
    target = tuple(min(n, smallest) for n in grid)
    pool = nn.AdaptiveAvgPool2d(target) if len(target) == 2 else nn.AdaptiveAvgPool1d(target[0])
    return [*layers, pool, nn.Flatten(), nn.Linear(channels * math.prod(target), features)]


class _Spectrogram(nn.Module):
    """The logarithm of a recording's power by band and time: a few thousand recordings are too few to learn that."""

    window: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.size = max(4, min(WINDOW, 2 ** int(math.log2(max(1, length // 2)))))
        self.hop = self.size // 2
        self.grid = (min(BANDS, self.size // 2 + 1), length // self.hop + 1)
        self.register_buffer("window", torch.hann_window(self.size), persistent=False)

    def forward(self, x: Float[Tensor, " B T"]) -> Float[Tensor, " B 1 F frames"]:
        spectrum = torch.stft(x, self.size, self.hop, window=self.window, return_complex=True, pad_mode="constant")
        power = F.adaptive_avg_pool2d(spectrum.abs().square()[:, None], self.grid)
        return (power + 1e-3).log()


class _ChannelsFirst(nn.Module):
    def forward(self, x: Float[Tensor, " B *grid C"]) -> Float[Tensor, " B C *grid"]:
        return x.movedim(-1, 1)
