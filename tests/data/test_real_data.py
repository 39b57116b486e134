"""On real files, where they are: `DGM_SHARED_DATA`, or `../shared/data` beside the repository."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dgm_core.contract import DataMismatch
from dgm_core.data.batches import one_pass
from dgm_core.data.check import check
from dgm_core.data.display import bits_per_dim
from dgm_core.data.shards import Dataset
from tests.data.builders import prepared
from tests.support import ROOT

SHARED = Path(os.environ.get("DGM_SHARED_DATA") or ROOT.parent / "shared" / "data")


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (SHARED / name).is_dir(), reason=f"{name} is not in {SHARED}")


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepared(tmp_path_factory.mktemp("mnist") / "d", source="idx", path=str(SHARED / "mnist"))


@needs("mnist")
def test_mnist(mnist: Dataset) -> None:
    assert mnist.info["counts"] == {"train": 50_000, "val": 10_000, "test": 10_000}
    assert mnist.spec.classes == 10
    test = mnist.split("test").rows(np.arange(10_000)).x.double() / 255
    assert float(test.mean()) == pytest.approx(0.1325, abs=5e-5)  # of the standard test images
    # published: the entropy of the noise of dynamic binarisation on the test images
    entropy = torch.special.entr(test) + torch.special.entr(1 - test)
    assert float(entropy.flatten(1).sum(1).mean()) == pytest.approx(45.53, abs=0.005)


@needs("mnist")
@pytest.mark.slow
def test_logit_mnist_gives_the_published_gaussian(tmp_path: Path) -> None:
    """A full Gaussian on logit-MNIST: −1366.9 ± 1.4 nats, 2.01 bits (Papamakarios et al. 2017)."""
    dataset = prepared(tmp_path / "d", source="idx", path=str(SHARED / "mnist"), transform="logit")

    def examples(name: str) -> torch.Tensor:
        return torch.cat([b.x for b in one_pass(dataset.split(name), 10_000)]).flatten(1).double()

    train, test = examples("train"), examples("test")
    log_prob = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T)).log_prob(test)
    assert float(log_prob.mean()) == pytest.approx(-1366.9, abs=1.4)
    assert float(bits_per_dim(log_prob, test, dataset.info).mean()) == pytest.approx(2.01, abs=0.005)


@needs("tiny_imagenet10")
def test_tiny_imagenet(tmp_path: Path) -> None:
    path = str(SHARED / "tiny_imagenet10")
    with pytest.raises(DataMismatch, match=r"colour in 5456 .*grey in 44 .*give `channels: 3` or `channels: 1`"):
        prepared(tmp_path / "d", source="parquet", path=path)
    assert any("grey among colour" in p for p in check(path).problems)
    dataset = prepared(tmp_path / "d", source="parquet", path=path, channels=3)
    assert dataset.info["counts"] == {"train": 4500, "val": 500, "test": 500}
    assert dataset.info["class_names"][0] == "goldfish"
    assert dataset.spec.shape == (3, 64, 64)


@needs("cifar10_jpeg")
@pytest.mark.slow
def test_cifar10(tmp_path: Path) -> None:
    dataset = prepared(tmp_path / "d", source="parquet", path=str(SHARED / "cifar10_jpeg"))
    assert dataset.info["counts"] == {"train": 45_000, "val": 5_000, "test": 10_000}
    assert dataset.info["class_counts"]["test"] == [1000] * 10
    assert dataset.spec.shape == (3, 32, 32)


@needs("spoken_digits")
def test_spoken_digits(tmp_path: Path) -> None:
    options = {"source": "parquet", "path": str(SHARED / "spoken_digits"), "length": 2048, "transform": "mu_law"}
    with pytest.raises(DataMismatch, match="192 such, and silence is not padded"):
        prepared(tmp_path / "d", **options)
    dataset = prepared(tmp_path / "d", short="drop", **options)
    assert dataset.info["dropped_short"] == 192
    assert dataset.info["sample_rate"] == 8000
    assert dataset.spec.levels == 256
    x = dataset.split("train").rows(np.arange(500)).x
    share = torch.bincount(x.flatten().long(), minlength=256) / x.numel()
    entropy = float(torch.special.entr(share).sum()) / math.log(2)
    assert 4 < entropy < 7.9  # speech: neither silence (0 bits) nor noise that fills all levels (8)
