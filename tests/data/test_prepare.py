import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.data.display import to_display
from dgm_core.data.prepare import carve, prepare
from dgm_core.data.shards import SPLITS, open_dataset
from dgm_core.data.sources import parse
from dgm_core.data.sources.base import Part, Plan
from tests.data.builders import everything, folder_of_images, greys, prepared, rows_of


def test_the_same_seed_gives_the_same_files_another_seed_others(tmp_path: Path) -> None:
    options: dict[str, Any] = {"source": "digits", "size": 8, "transform": "static"}
    a, b = prepared(tmp_path / "a", **options), prepared(tmp_path / "b", **options)
    c = prepared(tmp_path / "c", seed=1, **options)
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_work_travels_and_how_it_is_spread_changes_nothing(tmp_path: Path) -> None:
    """Every function and item handed to `map` survives pickling, and items may be worked on in any order."""
    folder_of_images(tmp_path / "in", classes=3, each=400)

    def spread(f: Callable[[Any], Any], items: Iterable[Any], /) -> list[Any]:
        pairs = [(pickle.loads(pickle.dumps(f)), pickle.loads(pickle.dumps(item))) for item in items]
        return [function(item) for function, item in reversed(pairs)][::-1]

    config = parse({"source": "images", "path": str(tmp_path / "in"), "transform": "logit"})
    a = prepare(config, tmp_path / "a", name="a", map=spread)
    b = prepare(config, tmp_path / "b", name="b")
    assert a.fingerprint == b.fingerprint


def test_splits_are_disjoint_whole_and_random(tmp_path: Path) -> None:
    x = np.arange(1000, dtype=np.float32)[:, None]
    np.savez(tmp_path / "a.npz", x=x)
    dataset = prepared(tmp_path / "d", source="npz", path=str(tmp_path / "a.npz"), val=100, test=0.2)
    assert dataset.info["counts"] == {"train": 700, "val": 100, "test": 200}
    assert rows_of(everything(dataset).x) == rows_of(x)
    test = dataset.split("test").rows(np.arange(200)).x
    # the mean of 200 of 1,000 numbers drawn without replacement, within five standard errors
    assert abs(float(test.mean()) - 499.5) < 5 * 288.7 * (0.8 / 200) ** 0.5
    assert torch.equal(test, test.sort(0).values)  # within a split the source's order is kept


def test_groups_are_never_torn() -> None:
    config = parse({"source": "digits", "val": 0.2, "test": 0.2})
    groups = tuple(np.repeat(np.arange(50), np.arange(50) % 4 + 1).tolist())
    plan = Plan([Part(None, len(groups), None, groups)])
    split_of = carve(plan, config, seed=0)
    assert {tuple(np.unique(split_of[np.asarray(groups) == g])) for g in range(50)} == {(0,), (1,), (2,)}
    for number in (1, 2):  # the wanted share, to within a group
        assert 0 <= (split_of == number).sum() - round(0.2 * len(groups)) < 4


def test_what_the_source_has_is_kept() -> None:
    config = parse({"source": "digits", "val": 3, "test": 5})
    plan = Plan([Part("test", 10, None), Part("train", 20, None)])
    split_of = carve(plan, config, seed=0)
    assert (split_of[:10] == 2).all()
    assert np.bincount(split_of[10:]).tolist() == [17, 3]
    with pytest.raises(DataMismatch, match="has test but no train split"):
        carve(Plan([Part("test", 10, None)]), config, seed=0)


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    folder_of_images(tmp_path / "in", each=400)
    config = parse({"source": "images", "path": str(tmp_path / "in")})
    prepare(config, tmp_path / "d", name="d", progress=lambda done, total: heard.append((done, total)))
    assert heard == [(512, 800), (800, 800)]
    heard.clear()
    config = parse({"source": "digits", "transform": ["dequantize", "standardize"]})
    prepare(config, tmp_path / "s", name="s", progress=lambda done, total: heard.append((done, total)))
    assert heard[-1] == (2 * 1797, 2 * 1797)


def test_info_records_where_the_data_came_from(tmp_path: Path) -> None:
    config: dict[str, Any] = {"source": "digits", "size": 8, "transform": [{"name": "pad", "to": 12}, "dynamic"]}
    dataset = prepared(tmp_path / "d", seed=7, **config)
    info = dataset.info
    assert (info["name"], info["source"], info["seed"]) == ("test", "digits", 7)
    assert info["variant"] == "pad(to=12, value=0)+dynamic"
    assert parse(info["config"]) == parse(config)
    assert DataSpec.from_dict(info["original"]).shape == (1, 8, 8)
    assert set(info["sha256"]) == {f"{split}-00000.arrow" for split in SPLITS}
    assert sum(sum(counts) for counts in info["class_counts"].values()) == 1797
    assert abs(sum(dataset.spec.class_shares) - 1) < 1e-12
    assert dataset.spec.shape == (1, 12, 12)
    assert dataset.spec.levels == 2
    shown = to_display(dataset.split("val").rows(np.arange(5)).x, info)
    assert shown.shape == (5, 1, 8, 8)
    assert set(shown.unique().tolist()) <= {0, 255}


def test_small_shards_hold_the_same_examples(tmp_path: Path) -> None:
    folder_of_images(tmp_path / "in", each=700)
    options = {"source": "images", "path": str(tmp_path / "in")}
    a, b = prepared(tmp_path / "a", **options), prepared(tmp_path / "b", shard_bytes=10_000, **options)
    assert len(b.info["files"]) > len(a.info["files"]) == 3
    rows = np.random.default_rng(0).permutation(len(a.split("train")))
    assert torch.equal(a.split("train").rows(rows).x, b.split("train").rows(rows).x)


def test_real_valued_pictures_are_shown_over_their_range(tmp_path: Path) -> None:
    x = greys(30).astype(np.float64) / 100 - 1
    np.savez(tmp_path / "a.npz", x=x)
    dataset = prepared(tmp_path / "d", source="npz", path=str(tmp_path / "a.npz"), kind="image")
    train = dataset.split("train")
    batch = train.rows(np.arange(len(train)))
    low, high = dataset.info["range"]
    assert (low, high) == (float(batch.x.min()), float(batch.x.max()))
    shown = to_display(batch.x, dataset.info)
    assert (int(shown.min()), int(shown.max())) == (0, 255)


def test_preparing_again_replaces_and_a_failure_keeps_the_old(tmp_path: Path) -> None:
    prepared(tmp_path / "d", source="digits", size=8)
    with pytest.raises(DataMismatch):
        prepared(tmp_path / "d", source="digits", size=8, transform="mu_law")
    assert open_dataset(tmp_path / "d").spec.shape == (1, 8, 8)
    prepared(tmp_path / "d", source="digits", size=9)
    assert open_dataset(tmp_path / "d").spec.shape == (1, 9, 9)
