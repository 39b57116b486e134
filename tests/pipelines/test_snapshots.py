import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgm_core.evaluation.drawing import png
from pipelines import snapshots
from pipelines.mirror import Mirror
from pipelines.storage import Storage

NEAR = 6  # of 255: a GIF's 256 colours also serve the edges of letters


def picture(value: int) -> bytes:
    return png(np.full((40, 90, 3), value, np.uint8))


def frames(film: bytes) -> list[tuple[int, int]]:
    """The grey of each frame's middle below its heading, and how long it stands."""
    opened = Image.open(io.BytesIO(film))
    found = []
    for i in range(getattr(opened, "n_frames", 1)):
        opened.seek(i)
        found.append((int(np.asarray(opened.convert("RGB"))[-20, 45, 0]), opened.info["duration"]))
    return found


def test_a_film_is_of_the_pictures_in_order_and_stays_on_the_last(tmp_path: Path) -> None:
    assert snapshots.film_of(tmp_path) is None
    snapshots.keep(tmp_path, 100, picture(200))
    assert snapshots.film_of(tmp_path) is None  # one picture does not move
    snapshots.keep(tmp_path, 50, picture(10))
    snapshots.keep(tmp_path, 100, picture(90))  # made again, after going on from an earlier checkpoint
    film = snapshots.film_of(tmp_path)
    assert film is not None
    (first, short), (last, long) = frames(film)
    assert (first, last) == pytest.approx((10, 90), abs=NEAR)
    assert long > short


def test_a_long_training_makes_a_film_with_its_ends(tmp_path: Path) -> None:
    many = 3 * snapshots.MOST
    for step in range(many):
        snapshots.keep(tmp_path, step, picture(2 * step % 256))
    film = snapshots.film_of(tmp_path)
    assert film is not None
    found = frames(film)
    assert len(found) == snapshots.MOST
    assert (found[0][0], found[-1][0]) == pytest.approx((0, 2 * (many - 1) % 256), abs=NEAR)


def test_pictures_go_on_elsewhere_with_their_checkpoint(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "shared"))
    first = Mirror(storage, "job", tmp_path / "node1")
    first.pull()
    snapshots.keep(first.folder, 1, picture(10))
    (first.folder / "last.pt").write_text("checkpoint")
    first.push(first.folder / "last.pt")
    first.settle()
    first.close()
    second = Mirror(storage, "job", tmp_path / "node2")
    second.pull()
    snapshots.keep(second.folder, 2, picture(200))
    film = snapshots.film_of(second.folder)
    assert film is not None
    assert [value for value, _ in frames(film)] == pytest.approx([10, 200], abs=NEAR)
