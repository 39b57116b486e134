import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.data import shards
from dgm_core.data.shards import ShardWriter, open_dataset, verify, write_dataset
from tests.data.builders import numbered
from tests.support import ROOT


@pytest.mark.parametrize("shard_bytes", [10**9, 1])  # one shard; several
def test_rows_come_back_in_the_order_asked_for(tmp_path: Path, shard_bytes: int) -> None:
    split = numbered(tmp_path / "d", shard_bytes=shard_bytes).split("train")
    asked = np.array([49, 0, 20, 19, 20, 3])
    batch = split.rows(asked)
    assert batch.x.dtype == torch.int64
    assert batch.x.shape == (6, 2, 2)
    assert batch.x[:, 0, 0].tolist() == asked.tolist()
    assert batch.y is not None
    assert batch.y.tolist() == (asked % 2).tolist()
    assert batch.context["top"].flatten().tolist() == (asked % 7).tolist()
    assert batch.index is not None
    assert batch.index.tolist() == asked.tolist()
    assert (len(split._shards) > 1) == (shard_bytes == 1)


@pytest.mark.parametrize("levels", [2, 256, 257, None])
def test_every_dtype_goes_through_the_disk_unchanged(tmp_path: Path, levels: int | None) -> None:
    spec = DataSpec("vector", (3,), levels)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 3)).astype(np.float32) if levels is None else rng.integers(0, levels, (9, 3))
    given = Batch(torch.from_numpy(x).to(spec.dtype))
    dataset = write_dataset(tmp_path / "d", spec, {s: [given] for s in shards.SPLITS}, {})
    found = dataset.split("val").rows(np.arange(9))
    assert found.x.dtype == spec.dtype
    assert torch.equal(found.x, given.x)


def test_class_shares_are_those_of_training(tmp_path: Path) -> None:
    dataset = numbered(tmp_path / "d", train=45)
    assert dataset.spec.class_shares == (23 / 45, 22 / 45)
    assert dataset.info["class_counts"]["test"] == [5, 5]
    assert dataset.info["counts"] == {"train": 45, "val": 10, "test": 10}


def test_rows_are_copies_and_the_file_is_mapped(tmp_path: Path) -> None:
    split = numbered(tmp_path / "d").split("train")
    before = pa.total_allocated_bytes()
    split.rows(np.arange(50)).x.zero_()
    assert split.rows(np.array([7])).x[0, 0, 0] == 7
    assert pa.total_allocated_bytes() == before  # Arrow read nothing into memory of its own
    with pytest.raises(ValueError, match="read-only"):
        split._shards[0]["x"][0] = 1


def test_out_of_range_indices_are_refused(tmp_path: Path) -> None:
    split = numbered(tmp_path / "d").split("val")
    for bad in (-1, 10):
        with pytest.raises(IndexError, match="10 examples"):
            split.rows(np.array([bad]))


def test_a_split_travels_by_its_path(tmp_path: Path) -> None:
    split = numbered(tmp_path / "d").split("train")
    packed = pickle.dumps(split)
    assert len(packed) < 500
    assert torch.equal(pickle.loads(packed).rows(np.array([5])).x, split.rows(np.array([5])).x)
    assert pickle.loads(pickle.dumps(split.dataset)).info == split.dataset.info


def test_changed_and_cut_off_shards_are_named(tmp_path: Path) -> None:
    numbered(tmp_path / "d")
    shard = tmp_path / "d" / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    verify(tmp_path / "d")
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataMismatch, match=r"train-00000\.arrow changed"):
        verify(tmp_path / "d")
    shard.write_bytes(content[:-10])
    with pytest.raises(DataMismatch, match=r"train-00000\.arrow has \d+ bytes instead of \d+"):
        open_dataset(tmp_path / "d")
    shard.unlink()
    with pytest.raises(DataMismatch, match=r"train-00000\.arrow is missing"):
        open_dataset(tmp_path / "d")


def test_no_dataset_no_split(tmp_path: Path) -> None:
    with pytest.raises(DataMismatch, match=r"is no prepared data set.*prepare it first"):
        open_dataset(tmp_path)
    with pytest.raises(DataMismatch, match="no split 'dev'; it has train, val, test"):
        numbered(tmp_path / "d").split("dev")


def test_the_fingerprint_follows_contents_not_names(tmp_path: Path) -> None:
    a, b, c = numbered(tmp_path / "a"), numbered(tmp_path / "b"), numbered(tmp_path / "c", train=49)
    assert a.fingerprint == b.fingerprint != c.fingerprint


SPEC = DataSpec("image", (1, 4, 4), 256)


def test_an_error_leaves_nothing_behind_and_the_old_data_in_place(tmp_path: Path) -> None:
    def fail_midway() -> None:
        with ShardWriter(tmp_path / "d", SPEC, shard_bytes=1) as writer:
            writer.add("train", np.zeros((5, 1, 4, 4), np.uint8))
            assert any(tmp_path.glob(".d.partial-*/*.arrow"))  # something was there to be removed
            raise RuntimeError("midway")

    for old in (False, True):
        if old:
            numbered(tmp_path / "d")
        with pytest.raises(RuntimeError, match="midway"):
            fail_midway()
        assert os.listdir(tmp_path) == (["d"] if old else [])
    assert len(open_dataset(tmp_path / "d").split("train")) == 50


def test_a_finished_write_replaces_the_old_data_set(tmp_path: Path) -> None:
    numbered(tmp_path / "d")
    assert len(numbered(tmp_path / "d", train=30).split("train")) == 30
    assert os.listdir(tmp_path) == ["d"]


def test_a_folder_that_is_no_data_set_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_text("precious")
    with pytest.raises(DataMismatch, match="is no prepared data set, so it is left alone"):
        numbered(tmp_path / "d")
    assert (tmp_path / "d" / "thesis.tex").read_text() == "precious"


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    name = f".d.partial-{os.uname().nodename}-"
    dead, alive, other = (tmp_path / f"{name}{pid}" for pid in (killed.stdout.strip(), os.getppid(), "other"))
    for folder in (dead, alive, other):
        folder.mkdir()
    numbered(tmp_path / "d")
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()


def test_a_full_disk_is_said_and_nothing_stays(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow, as on a full disk (EFBIG instead of ENOSPC)."""
    program = f"""
import numpy as np, resource, signal
from dgm_core.contract import DataSpec
from dgm_core.data.shards import ShardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
with ShardWriter({str(tmp_path / "d")!r}, DataSpec("image", (1, 4, 4), 256), shard_bytes=100_000) as writer:
    for _ in range(20):
        writer.add("train", np.zeros((1000, 1, 4, 4), np.uint8))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "d was not written: " in done.stderr
    assert "Nothing half-written is kept" in done.stderr
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_enospc_tells_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, mode: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.pa, "OSFile", full)
    with pytest.raises(OSError, match=r"the disk is full\. Nothing half-written is kept; free some space") as error:
        numbered(tmp_path / "d")
    assert error.value.errno == 28
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 1, 4, 5), np.uint8), r"x is uint8 \(2, 1, 4, 5\); the spec says uint8 \(2, 1, 4, 4\)"),
        (np.zeros((2, 1, 4, 4), np.int64), "x is int64"),
        (np.full((2, 1, 4, 4), 9, np.uint8), "x holds 9 … 9; the spec's values are 0 … 7"),
    ],
)
def test_what_does_not_fit_the_spec_is_refused(tmp_path: Path, x: np.ndarray, message: str) -> None:
    spec = DataSpec("image", (1, 4, 4), 8)
    with ShardWriter(tmp_path / "d", spec) as writer, pytest.raises(DataMismatch, match=message):
        writer.add("train", x)


def test_codes_beyond_their_levels_are_refused_before_they_wrap(tmp_path: Path) -> None:
    bad = Batch(torch.full((2, 3), 256))
    with pytest.raises(DataMismatch, match="x holds 256"):
        write_dataset(tmp_path / "d", DataSpec("codes", (3,), 256), {"train": [bad]}, {})
    assert os.listdir(tmp_path) == []


def test_labels_columns_and_empty_splits_are_refused(tmp_path: Path) -> None:
    spec = DataSpec("vector", (1,), None, classes=3)
    x = np.zeros((2, 1), np.float32)
    with ShardWriter(tmp_path / "d", spec) as writer:
        with pytest.raises(DataMismatch, match="numbers in 0 … 2"):
            writer.add("train", x, np.array([0, 3]))
        with pytest.raises(DataMismatch, match="3 classes, labels were not given"):
            writer.add("train", x)
        with pytest.raises(DataMismatch, match="columns"):
            writer.add("train", x, np.array([0, 1]), {"mask": x})
        with pytest.raises(DataMismatch, match="NaN"):
            writer.add("train", x + np.float32(np.nan), np.array([0, 1]))
        writer.add("train", x, np.array([0, 1]))
        with pytest.raises(DataMismatch, match="no example fell to val, test"):
            writer.finish({})
    assert os.listdir(tmp_path) == []


def test_spec_and_info_are_plain_json(tmp_path: Path) -> None:
    dataset = numbered(tmp_path / "d")
    assert DataSpec.from_dict(json.loads((tmp_path / "d" / "spec.json").read_text())) == dataset.spec
    assert json.loads((tmp_path / "d" / "info.json").read_text()) == dataset.info
    with pa.memory_map(str(tmp_path / "d" / "train-00000.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.schema.field("x").type == pa.list_(pa.field("item", pa.int64()), 4)
    assert table.column_names == ["x", "context.top", "y"]
