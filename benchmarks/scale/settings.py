"""On which data each model is counted, and examples of the right shape for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dgm_core.config import Recipe, Strict
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.distributed import share
from dgm_core.models import CATALOG


@dataclass(frozen=True)
class Setting:
    """A model's `defaults` on the data that its paper reports, or the nearest that it takes."""

    model: str
    data: str  # in words
    spec: DataSpec
    examples: int  # of the training split
    device: str = "meta"  # cpu: a play reads from the device how many rows each rank offers for dead codes

    def defaults(self) -> tuple[Strict, Recipe]:
        return CATALOG[self.model].defaults(self.spec)

    def build(self) -> GenerativeModel:
        return CATALOG[self.model](self.defaults()[0], self.spec)

    @property
    def example_bytes(self) -> int:
        """As stored; labels are 8 bytes."""
        return self.spec.dims * self.spec.dtype.itemsize + (8 if self.spec.classes else 0)


MNIST, CIFAR, IMAGENET = 50_000, 45_000, 1_281_167
_BINARY = DataSpec("image", (1, 28, 28), 2)
_CIFAR = DataSpec("image", (3, 32, 32), 256)

SETTINGS = {
    setting.model: setting
    for setting in (
        Setting("ppca", "MNIST, logit", DataSpec("image", (1, 28, 28), None), MNIST),
        Setting("vae", "MNIST, two levels", _BINARY, MNIST),
        Setting("vq_vae", "ImageNet 128 × 128", DataSpec("image", (3, 128, 128), 256), IMAGENET, "cpu"),
        Setting("vq_vae2", "ImageNet 256 × 256", DataSpec("image", (3, 256, 256), 256), IMAGENET, "cpu"),
        Setting("real_nvp", "CIFAR-10", _CIFAR, CIFAR),
        Setting("gated_pixel_cnn", "ImageNet 32 × 32", _CIFAR, IMAGENET),
        Setting("pixel_snail", "top codes of ImageNet 256", DataSpec("codes", (32, 32), 512, classes=1000), IMAGENET),
        Setting("wgan_gp", "CIFAR-10", _CIFAR, CIFAR),
        Setting("rbm", "MNIST, two levels", _BINARY, MNIST),
    )
}


class Examples:
    """`TrainingData` of noise, all of it drawn at once."""

    def __init__(self, spec: DataSpec, n: int, device: str = "cpu") -> None:
        g = torch.Generator().manual_seed(0)

        def draw(spec: DataSpec) -> torch.Tensor:
            shape = (n, *spec.shape)
            if device == "meta":
                return torch.empty(shape, dtype=spec.dtype, device="meta")
            if spec.levels is None:
                return torch.randn(shape, generator=g)
            return torch.randint(spec.levels, shape, generator=g).to(spec.dtype)

        y = torch.randint(spec.classes, (n,), generator=g).to(device) if spec.classes else None
        context = {name: draw(inner) for name, inner in spec.context.items()}
        self.whole, self.n = Batch(draw(spec), y, context, torch.arange(n, device=device)), n

    def at(self, position: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        mine = share(size, rank, world)
        start = (position + mine.start) % (self.n - (mine.stop - mine.start) + 1)
        return self.whole.rows(slice(start, start + mine.stop - mine.start))

    def one_pass(self, size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for start in range(0, self.n - size + 1, size):
            mine = share(size, rank, world)
            yield self.whole.rows(slice(start + mine.start, start + mine.stop))
