import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits

from dgm_core.contract import DataMismatch
from dgm_core.data.shards import SPLITS
from dgm_core.data.sources import SOURCES, parse
from tests.data.builders import (
    RATE,
    everything,
    folder_of_images,
    greys,
    hub_parquet,
    idx,
    png,
    prepared,
    rows_of,
    wav,
    wave,
)


def labelled(batch: Any) -> list[tuple[bytes, int]]:
    return sorted((x.numpy().tobytes(), int(y)) for x, y in zip(batch.x, batch.y, strict=True))


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    dataset = prepared(tmp_path / "d", source="digits", size=8)
    original, labels = load_digits(return_X_y=True)
    scaled = np.round(np.asarray(original) * 255 / 16).astype(np.uint8)
    expected = sorted((row.tobytes(), int(y)) for row, y in zip(scaled, np.asarray(labels), strict=True))
    assert labelled(everything(dataset)) == expected
    assert dataset.info["counts"] == {"train": 1437, "val": 180, "test": 180}
    resized = prepared(tmp_path / "r", source="digits")
    assert resized.spec.shape == (1, 16, 16)
    assert resized.split("train").rows(np.arange(100)).x.max() == 255


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_idx_round_trip(tmp_path: Path, suffix: str, with_labels: bool) -> None:
    x, y = greys(60), np.random.default_rng(0).integers(0, 4, 60).astype(np.uint8)
    y[0] = 3
    files = tmp_path / "in"
    files.mkdir()
    for name, part in (("train", slice(0, 48)), ("t10k", slice(48, 60))):
        idx(files / f"{name}-images-idx3-ubyte{suffix}", x[part])
        if with_labels:
            idx(files / f"{name}-labels-idx1-ubyte{suffix}", y[part])
    dataset = prepared(tmp_path / "d", source="idx", path=str(files))
    assert dataset.info["counts"] == {"train": 40, "val": 8, "test": 12}
    assert rows_of(dataset.split("test").rows(np.arange(12)).x[:, 0]) == rows_of(x[48:])
    assert rows_of(everything(dataset).x[:, 0]) == rows_of(x)
    assert dataset.spec.classes == (4 if with_labels else 0)
    if with_labels:
        assert labelled(everything(dataset)) == sorted((a.tobytes(), int(b)) for a, b in zip(x, y, strict=True))


def test_images_with_classes(tmp_path: Path) -> None:
    stored = folder_of_images(tmp_path / "in", classes=3)
    (tmp_path / "in" / ".DS_Store").write_text("")
    (tmp_path / "in" / "class0" / "notes.txt").write_text("")
    dataset = prepared(tmp_path / "d", source="images", path=str(tmp_path / "in"))
    assert dataset.spec.classes == 3
    assert dataset.info["class_names"] == ["class0", "class1", "class2"]
    expected = sorted((im.tobytes(), k) for k in range(3) for im in stored[f"class{k}"])
    assert labelled(everything(dataset)) == expected
    y = dataset.split("train").rows(np.arange(24)).y
    assert y is not None
    assert y.diff().ne(0).sum() > 2  # in seeded order, not class by class


def test_images_with_splits_of_their_own_and_without_classes(tmp_path: Path) -> None:
    for split, names in (("train", 10), ("valid", 3), ("test", 4)):
        (tmp_path / "in" / split).mkdir(parents=True)
        for i, image in enumerate(greys(names, seed=names)):
            (tmp_path / "in" / split / f"{i}.png").write_bytes(png(image))
    dataset = prepared(tmp_path / "d", source="images", path=str(tmp_path / "in"))
    assert dataset.info["counts"] == {"train": 10, "val": 3, "test": 4}
    assert dataset.spec.classes == 0
    assert rows_of(dataset.split("val").rows(np.arange(3)).x[:, 0]) == rows_of(greys(3, seed=3))


def one_image(tmp_path: Path, content: bytes, **options: Any) -> torch.Tensor:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.png").write_bytes(content)
    x = everything(prepared(tmp_path / "d", source="images", path=str(folder), **options)).x
    assert (x == x[0]).all()
    return x[0]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 36).astype(np.uint16).reshape(6, 6)
    assert np.array_equal(one_image(tmp_path, png(ramp))[0].numpy(), ramp // 257)


def test_transparency_shows_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, 2:, 3] = 255  # the left half is see-through, the right black
    x = one_image(tmp_path, png(pixels))
    assert x.shape == (3, 4, 4)
    assert (x[..., :2] == 255).all()
    assert (x[..., 2:] == 0).all()


def test_rotated_photographs_stand_upright(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    sink = io.BytesIO()
    picture.save(sink, "PNG", exif=exif)
    x = one_image(tmp_path, sink.getvalue())
    assert np.array_equal(x[0].numpy(), np.rot90(np.asarray(picture), -1))


def test_size_and_fit(tmp_path: Path) -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 255  # a white square in the middle
    crop = one_image(tmp_path / "a", png(wide), size=10) if (tmp_path / "a").mkdir() is None else None
    assert crop is not None
    assert (crop == 255).all()
    (tmp_path / "b").mkdir()
    stretched = one_image(tmp_path / "b", png(wide), size=[10, 12], fit="stretch", channels=3)
    assert stretched.shape == (3, 10, 12)
    assert stretched[:, :, 0].max() < 128 < stretched[:, :, 5].min()


def test_parquet_images(tmp_path: Path) -> None:
    x, y = greys(40), np.arange(40) % 3
    (tmp_path / "in").mkdir()
    names = ["cat", "dog", "emu"]
    for split, rows in (("train", slice(0, 30)), ("test", slice(30, 40))):
        path = tmp_path / "in" / f"{split}-00000-of-00001.parquet"
        hub_parquet(path, "image", [png(image) for image in x[rows]], y[rows].tolist(), names)
    dataset = prepared(tmp_path / "d", source="parquet", path=str(tmp_path / "in"))
    assert dataset.info["counts"] == {"train": 27, "val": 3, "test": 10}
    assert dataset.info["class_names"] == names
    assert labelled(everything(dataset)) == sorted((a.tobytes(), int(b)) for a, b in zip(x, y, strict=True))


def test_parquet_audio_keeps_the_crops_of_a_clip_together(tmp_path: Path) -> None:
    clips = [wave(250, seed=k) for k in range(20)]
    (tmp_path / "in").mkdir()
    labels = [k % 2 for k in range(20)]
    hub_parquet(tmp_path / "in" / "data.parquet", "audio", [wav(c) for c in clips], labels, ["a", "b"])
    dataset = prepared(tmp_path / "d", source="parquet", path=str(tmp_path / "in"), length=100)
    assert dataset.info["sample_rate"] == RATE
    crops = {clips[k][100 * c : 100 * c + 100].tobytes(): k for k in range(20) for c in range(2)}
    homes: dict[int, set[str]] = {}
    for split in SPLITS:
        for row in dataset.split(split).rows(np.arange(len(dataset.split(split)))).x:
            homes.setdefault(crops.pop(row.numpy().tobytes()), set()).add(split)
    assert not crops  # every crop is there, bit by bit
    assert all(len(splits) == 1 for splits in homes.values())


@pytest.mark.parametrize(
    ("arrays", "options", "shape", "levels"),
    [
        ({"x": greys(30), "y": np.arange(30) % 2}, {}, (1, 6, 6), 256),
        ({"images": greys(30)[..., None].repeat(3, 3), "labels": (np.arange(30) % 2)[:, None]}, {}, (3, 6, 6), 256),
        ({"x": np.random.default_rng(0).standard_normal((30, 5))}, {}, (5,), None),
        ({"x": greys(30) % 7}, {"kind": "codes", "levels": 7}, (6, 6), 7),
        ({"x": np.arange(300).reshape(30, 10)}, {"kind": "codes", "levels": 300}, (10,), 300),
        ({"wave": wave(300).reshape(30, 10)}, {"x": "wave", "kind": "audio", "rate": RATE}, (10,), None),
        ({"x": np.random.default_rng(0).random((30, 4, 4))}, {"kind": "image"}, (1, 4, 4), None),
    ],
)
def test_npz_round_trip(
    tmp_path: Path, arrays: dict[str, np.ndarray], options: dict[str, Any], shape: tuple[int, ...], levels: int | None
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    dataset = prepared(tmp_path / "d", source="npz", path=str(tmp_path / "a.npz"), **options)
    assert dataset.spec.shape == shape
    assert dataset.spec.levels == levels
    original = next(iter(arrays.values()))
    if len(shape) == 3 and original.ndim == 4:
        original = np.moveaxis(original, 3, 1)
    found = everything(dataset).x.numpy()
    assert rows_of(found.reshape(30, -1)) == rows_of(original.reshape(30, -1).astype(found.dtype))
    assert dataset.spec.classes == (2 if len(arrays) == 2 else 0)


def test_npz_with_splits(tmp_path: Path) -> None:
    x = greys(30)
    np.savez(tmp_path / "a.npz", x_train=x[:20], x_test=x[20:], y_train=np.arange(20) % 4, y_test=np.arange(10) % 4)
    dataset = prepared(tmp_path / "d", source="npz", path=str(tmp_path / "a.npz"))
    assert dataset.info["counts"] == {"train": 18, "val": 2, "test": 10}
    assert rows_of(dataset.split("test").rows(np.arange(10)).x[:, 0]) == rows_of(x[20:])


def test_wav_crops_end_to_end_or_from_the_centre(tmp_path: Path) -> None:
    clips = {f"{k}": wave(330, seed=k) for k in range(12)}
    for name, clip in clips.items():
        folder = tmp_path / "in" / ("even" if int(name) % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.wav").write_bytes(wav(clip))
    every = everything(prepared(tmp_path / "a", source="wav", path=str(tmp_path / "in"), length=100))
    expected = [clip[start : start + 100] for clip in clips.values() for start in (0, 100, 200)]
    assert rows_of(every.x) == rows_of(expected)
    dataset = prepared(tmp_path / "c", source="wav", path=str(tmp_path / "in"), length=100, crops="centre")
    assert rows_of(everything(dataset).x) == rows_of([clip[115:215] for clip in clips.values()])
    assert dataset.info["class_names"] == ["even", "odd"]
    assert dataset.info["sample_rate"] == RATE


def test_wav_resampling_keeps_a_tone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    t = np.arange(8000) / 8000
    tone = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    for k in range(10):
        (tmp_path / "in" / f"{k}.wav").write_bytes(wav(tone))
    options = {"length": 3900, "rate": 4000, "resample": True}
    x = everything(prepared(tmp_path / "d", source="wav", path=str(tmp_path / "in"), **options)).x[0].numpy()
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(3900) / 4000)
    assert np.abs(x - expected)[100:].max() < 0.01  # the filter's ripple, away from where the tone starts


def test_stereo_is_averaged_on_request(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    left, right = wave(100, seed=1), wave(100, seed=2)
    for k in range(10):
        (tmp_path / "in" / f"{k}.wav").write_bytes(wav(np.stack([left, right], 1)))
    x = everything(prepared(tmp_path / "d", source="wav", path=str(tmp_path / "in"), length=100, mono=True)).x
    np.testing.assert_allclose(x[0], (left + right) / 2, atol=1e-7)  # float32


def test_csv_round_trip_with_word_labels(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    lines = [f"{a!r},{('no', 'yes')[i % 2]},{b!r},{c!r}" for i, (a, b, c) in enumerate(x.tolist())]
    (tmp_path / "a.csv").write_text("\n".join(["a,kind,b,c", *lines]))
    dataset = prepared(tmp_path / "d", source="csv", path=str(tmp_path / "a.csv"), label="kind")
    assert dataset.info["class_names"] == ["no", "yes"]
    assert dataset.info["columns"] == ["a", "b", "c"]
    assert labelled(everything(dataset)) == sorted((r.tobytes(), i % 2) for i, r in enumerate(x))


def test_csv_missing_values_become_a_mask(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 3)) * [1, 5, 9] + [0, 20, -3]
    seen = rng.random((200, 3)) < 0.7
    holed = np.where(seen, x, np.nan).tolist()
    lines = [",".join("NaN" if math.isnan(v) else repr(v) for v in row) for row in holed]
    (tmp_path / "a.csv").write_text("a,b,c\n" + "\n".join(lines))
    options: dict[str, Any] = {"source": "csv", "path": str(tmp_path / "a.csv"), "missing": "allow"}
    found = everything(prepared(tmp_path / "d", **options))
    assert sorted(found.context["observed"].sum(1).tolist()) == sorted(seen.sum(1).tolist())
    assert rows_of(found.x) == rows_of(np.where(seen, x, 0).astype(np.float32))
    train = prepared(tmp_path / "s", transform="standardize", **options).split("train").rows(np.arange(160))
    mask = train.context["observed"].bool()
    assert (train.x[~mask] == 0).all()
    for k in range(3):  # moments of what is observed, in float32
        values = train.x[mask[:, k], k].double()
        assert abs(values.mean()) < 1e-6
        assert abs(values.var(unbiased=False) - 1) < 1e-5


def test_csv_splits_and_integers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, count in (("train", 20), ("val", 5), ("test", 6)):
        (tmp_path / "in" / f"{name}.csv").write_text("\n".join(f"{i % 3} {(i + 1) % 3}" for i in range(count)))
    options: dict[str, Any] = {"levels": 3, "delimiter": " ", "header": False}
    dataset = prepared(tmp_path / "d", source="csv", path=str(tmp_path / "in"), **options)
    assert dataset.info["counts"] == {"train": 20, "val": 5, "test": 6}
    assert dataset.spec.levels == 3
    assert dataset.split("val").rows(np.arange(5)).x.tolist() == [[0, 1], [1, 2], [2, 0], [0, 1], [1, 2]]


@pytest.mark.parametrize("name", ["eight_gaussians", "ring", "grid", "checkerboard", "banana", "u1", "u4"])
def test_densities_are_written_with_what_is_known_of_them(tmp_path: Path, name: str) -> None:
    dataset = prepared(tmp_path / "d", source="density", density=name, train=60_000, val=100, test=200)
    assert dataset.info["counts"] == {"train": 60_000, "val": 100, "test": 200}
    known = dataset.info["density"]
    assert known["name"] == name
    assert known["entropy"] > -3
    assert ("log_z" in known) == name.startswith("u")
    assert ("modes" in known) == (name in ("eight_gaussians", "ring", "grid"))
    x = dataset.split("train").rows(np.arange(60_000)).x
    assert len(torch.unique(x, dim=0)) > 59_000  # the second part is not the first again
    if "modes" in known:
        nearest = torch.cdist(x, torch.tensor(known["modes"])).min(1).values
        near = (nearest < 3 * known["sd"]).double().mean()
        inside = 1 - np.exp(-4.5)  # of an isotropic Gaussian within 3 σ; neighbours only add to it
        assert near > inside - 5 * np.sqrt(inside * (1 - inside) / 60_000)


def test_options_of_another_density_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataMismatch, match="density 'ring' has no option 'noise'; its options: modes, radius, sd"):
        prepared(tmp_path / "d", source="density", density="ring", noise=0.1)


def test_unknown_sources_and_keys_name_the_nearest() -> None:
    with pytest.raises(DataMismatch, match="source 'image' is not known; did you mean 'images'"):
        parse({"source": "image"})
    with pytest.raises(ValidationError, match="has no key 'sise'; did you mean 'size'"):
        parse({"source": "digits", "sise": 3})
    with pytest.raises(ValidationError, match="a share between 0 and 1, or a whole number"):
        parse({"source": "digits", "val": 1.5})
    for name, config in SOURCES.items():
        assert config.model_fields["source"].default == name
