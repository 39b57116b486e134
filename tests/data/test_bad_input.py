"""What is wrong is said before anything is written: which file, and how to mend it."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dgm_core.contract import DataMismatch
from dgm_core.data import prepare as module
from dgm_core.data.check import check
from tests.data.builders import folder_of_images, greys, hub_parquet, idx, png, prepared, wav, wave


def refused(tmp_path: Path, *words: str, **config: Any) -> None:
    """Preparing raises with all these words, and leaves nothing."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataMismatch) as error:
        prepared(tmp_path / "out", **config)
    for word in words:
        assert word in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder_of_images(tmp_path / "in")
    return tmp_path / "in"


def images(pictures: Path, **options: Any) -> dict[str, Any]:
    return {"source": "images", "path": str(pictures), **options}


def test_missing_path(tmp_path: Path) -> None:
    for source in ("idx", "images", "parquet", "npz", "wav", "csv"):
        refused(tmp_path, "nowhere does not exist; correct `path`", source=source, path=str(tmp_path / "nowhere"))
        refused(tmp_path, "needs `path`", source=source)
    refused(tmp_path, "leave `path` empty", source="digits", path="x")


def test_unreadable_image(tmp_path: Path, pictures: Path) -> None:
    (pictures / "class1" / "3.png").write_bytes(b"not a picture")
    refused(tmp_path, "class1/3.png cannot be read as a picture", "replace or remove it", **images(pictures))


def test_truncated_image(tmp_path: Path, pictures: Path) -> None:
    whole = png(greys(1, side=40)[0])
    for path in pictures.rglob("*.png"):
        path.write_bytes(whole)
    (pictures / "class0" / "2.png").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "class0/2.png cannot be read as a picture", "replace or remove it", **images(pictures))


def test_grey_among_colour(tmp_path: Path, pictures: Path) -> None:
    (pictures / "class0" / "0.png").write_bytes(png(np.zeros((6, 6, 3), np.uint8)))
    refused(tmp_path, "grey in 19", "colour in 1 (e.g.", "class0/0.png", "give `channels: 3`", **images(pictures))
    assert prepared(tmp_path / "out", **images(pictures, channels=3)).spec.shape == (3, 6, 6)


def test_mixed_sizes(tmp_path: Path, pictures: Path) -> None:
    (pictures / "class0" / "0.png").write_bytes(png(greys(1, side=9)[0]))
    refused(tmp_path, "2 sizes", "6×6 in 19", "9×9 in 1 (e.g.", "class0/0.png", "give `size`", **images(pictures))
    assert prepared(tmp_path / "out", **images(pictures, size=6)).spec.shape == (1, 6, 6)


def test_empty_class_folder(tmp_path: Path, pictures: Path) -> None:
    (pictures / "class9").mkdir()
    refused(tmp_path, "class9: this class folder is empty", "remove the folder", **images(pictures))


def test_loose_files_strange_folders_and_classes(tmp_path: Path, pictures: Path) -> None:
    (pictures / "loose.png").write_bytes(png(greys(1)[0]))
    refused(tmp_path, "1 pictures lie beside the class folders, e.g. loose.png", "`labels: false`", **images(pictures))
    assert prepared(tmp_path / "out", **images(pictures, labels=False)).spec.classes == 0
    root = tmp_path / "split"
    folder_of_images(root / "train")
    folder_of_images(root / "test", classes=3)
    (root / "extra").mkdir()
    refused(tmp_path, "class 'class2' is not among the training classes", "there is extra", **images(root))


def bomb(side: int) -> bytes:
    """A few kilobytes of PNG that would unfold to side² bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 20_000])  # above our limit; above Pillow's own
def test_decompression_bomb(tmp_path: Path, pictures: Path, side: int) -> None:
    (pictures / "class0" / "0.png").write_bytes(bomb(side))
    refused(tmp_path, "class0/0.png has ", "above max_pixels = 50000000", "raise `max_pixels`", **images(pictures))


def test_pixels_without_a_range(tmp_path: Path, pictures: Path) -> None:
    sink = io.BytesIO()
    Image.fromarray(np.zeros((6, 6), np.float32)).save(sink, "TIFF")
    (pictures / "class0" / "x.tiff").write_bytes(sink.getvalue())
    refused(tmp_path, "x.tiff: pixels of 32 bits", **images(pictures))


def test_many_problems_are_told_at_once(tmp_path: Path, pictures: Path) -> None:
    for k in range(10):
        (pictures / "class0" / f"{k}.png").write_bytes(b"")
        (pictures / "class1" / f"{k}.png").write_bytes(b"")
    refused(tmp_path, "and 10 more", **images(pictures))


def test_idx(tmp_path: Path) -> None:
    files = tmp_path / "in"
    files.mkdir()
    config = {"source": "idx", "path": str(files)}
    refused(tmp_path, "has no file named *images*idx3*", **config)
    pictures, labels = files / "train-images-idx3-ubyte", files / "train-labels-idx1-ubyte"
    idx(pictures, greys(30))
    whole = pictures.read_bytes()
    pictures.write_bytes(whole[:-5])
    refused(tmp_path, "train-images-idx3-ubyte is cut off: 1075 bytes of data, its header says 1080", **config)
    pictures.write_bytes(whole[:7])
    refused(tmp_path, "is cut off within its header", **config)
    pictures.write_bytes(b"PK" + whole[2:])
    refused(tmp_path, "train-images-idx3-ubyte is no IDX file", **config)
    pictures.write_bytes(whole[:2] + b"\x0d" + whole[3:])
    refused(tmp_path, "IDX type 0x0d; only unsigned bytes", **config)
    pictures.write_bytes(whole)
    idx(labels, np.zeros(29, np.uint8))
    refused(tmp_path, "29 labels for 30 images", **config)
    idx(labels, np.full(30, 7, np.uint8))
    refused(tmp_path, "label 7 of example 0 is out of range (30 such)", "with 5 classes", **config, classes=5)
    idx(files / "train-images.idx3-ubyte", greys(3))
    refused(tmp_path, "are for the same split; keep one", **config)


def test_truncated_gzip(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "train-images-idx3-ubyte.gz"
    idx(path, greys(200))
    path.write_bytes(path.read_bytes()[:-100])
    config = {"source": "idx", "path": str(tmp_path / "in")}
    refused(tmp_path, "train-images-idx3-ubyte.gz is cut off or damaged", "fetch it again", **config)


def test_parquet(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "train-0.parquet"
    config = {"source": "parquet", "path": str(tmp_path / "in")}
    refused(tmp_path, "has no .parquet file", **config)
    data = [png(image) for image in greys(20)]
    hub_parquet(path, "image", data, [k % 3 for k in range(20)], ["a", "b"])
    refused(tmp_path, "train-0.parquet, row group 0 from row 0: label 2 of example 2 is out of range", **config)
    hub_parquet(path, "image", [*data[:9], b"junk", *data[10:]], [0] * 20, ["a", "b"])
    refused(tmp_path, "train-0.parquet, row group 1, row 2 (9.bin) cannot be read as a picture", **config)
    refused(tmp_path, "no media column 'photo'; it has image", **config, column="photo")
    refused(tmp_path, "no column 'kind'; it has image, label", **config, label="kind")
    path.write_bytes(path.read_bytes()[:-20])
    refused(tmp_path, "train-0.parquet cannot be read as Parquet", "fetch it again", **config)


def test_wav(tmp_path: Path) -> None:
    files = tmp_path / "in"
    files.mkdir()
    for k in range(10):
        (files / f"{k}.wav").write_bytes(wav(wave(300, seed=k)))
    config = {"source": "wav", "path": str(files)}
    refused(tmp_path, "give `length`", "at most 300", **config)
    (files / "3.wav").write_bytes(wav(wave(90)))
    refused(tmp_path, "3.wav has 90 samples, too short for crops of 100 (1 such", "`short: drop`", **config, length=100)
    dropped = prepared(tmp_path / "out", **config, length=100, short="drop")
    assert dropped.info["dropped_short"] == 1
    assert sum(dropped.info["counts"].values()) == 27
    (files / "3.wav").write_bytes(wav(wave(300), rate=16000))
    refused(tmp_path, "3.wav has 16000 samples a second, not 8000", "`resample: true`", **config, length=100)
    (files / "3.wav").write_bytes(wav(np.stack([wave(300)] * 2, 1)))
    refused(tmp_path, "3.wav has 2 channels", "give `mono: true`", **config, length=100)
    (files / "3.wav").write_bytes(wav(wave(300))[:-100])
    refused(tmp_path, "3.wav is cut off: 544 bytes of 644", **config, length=100)
    (files / "3.wav").write_bytes(b"RIFFjunk")
    refused(tmp_path, "3.wav ", "replace or remove it", **config, length=100)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = [f"{k},{k * 0.5}" for k in range(30)]

    def write(*changed: tuple[int, str]) -> None:
        lines = list(rows)
        for row, line in changed:
            lines[row] = line
        path.write_text("a,b\n" + "\n".join(lines))

    config = {"source": "csv", "path": str(path)}
    write((3, "3,NaN"))
    refused(tmp_path, "a.csv line 5, column 'b': a value is missing (NaN)", "`missing: allow`", **config)
    write((3, "3,"))
    refused(tmp_path, "a.csv line 5, column 'b': a value is missing", **config)
    write((4, "4,three"))
    refused(tmp_path, "a.csv line 6, column 'b': 'three' is no number", "`drop`", **config)
    write((4, "4,inf"))
    refused(tmp_path, "a.csv line 6, column 'b': the value is infinite", **config)
    write((4, "4"))
    refused(tmp_path, "a.csv cannot be read", "Expected 2 columns, got 1", **config)
    write()
    refused(tmp_path, "a.csv has no column 'c'; it has a, b", **config, label="c")
    refused(tmp_path, "a.csv line 3, column 'b': 0.5 is not among 0 … 29", **config, levels=30)
    (tmp_path / "two").mkdir()
    for name in ("train", "other"):
        (tmp_path / "two" / f"{name}.csv").write_text("a\n1")
    refused(tmp_path, "found other.csv, train.csv", source="csv", path=str(tmp_path / "two"))


def test_csv_labels_of_test_must_be_known(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.csv").write_text("a,y\n" + "\n".join(f"{k},{k % 2}" for k in range(30)))
    (tmp_path / "in" / "test.csv").write_text("a,y\n1,0\n2,5\n")
    config = {"source": "csv", "path": str(tmp_path / "in"), "label": "y"}
    refused(tmp_path, "test.csv line 3, column 'y': label 5 is out of the training file's", **config)


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    config = {"source": "npz", "path": str(path)}

    def write(**arrays: Any) -> None:
        np.savez(path, **arrays)

    write(z=greys(5))
    refused(tmp_path, "a.npz has no array 'x'; it has z", **config)
    write(x=np.full((20, 3), np.nan))
    refused(tmp_path, "x holds NaN or infinite values, first in example 0", **config)
    write(x=np.arange(40).reshape(20, 2))
    refused(tmp_path, "x is int64 (20, 2); give `kind`", "`levels`", **config)
    refused(tmp_path, "x holds 0 … 39; with 8 levels values are 0 … 7", **config, kind="codes", levels=8)
    write(x=greys(20), y=np.arange(20))
    refused(tmp_path, "a.npz, y: label 5 of example 5 is out of range (15 such)", **config, classes=5)
    write(x=greys(20), y=np.arange(19))
    refused(tmp_path, "20 integer labels are needed", **config)
    np.savez(path, x=np.array([{}, {}], dtype=object), allow_pickle=True)
    refused(tmp_path, "x is damaged, or holds objects", **config)
    path.write_bytes(b"junk")
    refused(tmp_path, "a.npz cannot be read as a NumPy archive", **config)


def test_too_little_data_for_three_splits(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=greys(3))
    refused(tmp_path, "3 examples cannot spare", "give other `val`, `test`", source="npz", path=str(tmp_path / "a.npz"))


def test_no_room_is_said_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="0 MiB free; nothing was written") as error:
        prepared(tmp_path / "out", source="digits")
    assert error.value.errno == 28
    assert os.listdir(tmp_path) == []


def test_check_tells_what_a_folder_holds_and_all_that_is_wrong(tmp_path: Path, pictures: Path) -> None:
    good = check(pictures)
    assert good.ok
    assert good.kind == "source: images"
    told = str(good)
    for word in ("20 pictures", "class class0: 10", "6×6 in 20", "grey in 20", "2 classes", "nothing is wrong"):
        assert word in told
    whole = png(greys(1, side=40)[0])
    (pictures / "class0" / "0.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "class0" / "1.png").write_bytes(b"junk")
    (pictures / "class1" / "2.png").write_bytes(png(np.zeros((7, 6, 3), np.uint8)))
    (pictures / "class2").mkdir()
    bad = check(pictures)
    assert not bad.ok
    told = "\n".join(bad.problems)
    for word in ("class0/0.png", "class0/1.png", "2 sizes", "grey among colour", "class2: this class folder is empty"):
        assert word in told


def test_check_guesses_every_kind(tmp_path: Path) -> None:
    for name in ("idx", "csv", "wav", "parquet", "npz"):
        (tmp_path / name).mkdir()
    idx(tmp_path / "idx" / "train-images-idx3-ubyte", greys(20))
    (tmp_path / "csv" / "train.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "wav" / "a.wav").write_bytes(wav(wave(100)))
    hub_parquet(tmp_path / "parquet" / "a.parquet", "image", [png(i) for i in greys(9)], [0] * 9, ["a"])
    np.savez(tmp_path / "npz" / "a.npz", x=greys(4))
    for name in ("idx", "csv", "wav", "parquet", "npz"):
        report = check(tmp_path / name)
        assert report.kind == f"source: {name}"
        assert report.ok == (name != "wav")  # which needs a length
    prepared(tmp_path / "done", source="digits", size=8)
    assert check(tmp_path / "done").ok
    shard = tmp_path / "done" / "val-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert "val-00000.arrow changed" in check(tmp_path / "done").problems[0]
    (tmp_path / "empty").mkdir()
    assert "holds nothing that can be read" in check(tmp_path / "empty").problems[0]
    assert "does not exist" in check(tmp_path / "nowhere").problems[0]
