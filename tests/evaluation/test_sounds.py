"""Recordings to listen to: what is written is what was stored, and rows show the same thing in every column."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch

from dgm_core.contract import Batch, DataSpec
from dgm_core.data.display import display_of
from dgm_core.data.transforms import MuLaw, records
from dgm_core.evaluation import sounds

PLAIN = DataSpec("audio", (40,), None)


def described(levels):
    """A data set of µ-law levels, and what is recorded of it."""
    transform = MuLaw(levels=levels)
    info = {"original": PLAIN.to_dict(), "transforms": records(PLAIN, [transform], None), "sample_rate": 8000}
    return transform.after(PLAIN), info


def compressed(wave, info):
    record = info["transforms"][0]
    return MuLaw.apply(wave, record, np.arange(len(wave)), (0, 0))


@pytest.mark.parametrize("levels", [16, 256])
def test_every_level_survives_a_wav_and_back(levels):
    spec, info = described(levels)
    x = torch.arange(levels).to(spec.dtype)[:, None].expand(-1, 40)
    waves = display_of(info)(x)
    for level, wave in enumerate(waves):
        content, rate = soundfile.read(io.BytesIO(sounds.wav(wave, 8000)), dtype="float32")
        assert rate == 8000
        assert content.shape == (40,)
        assert (compressed(content[None], info) == level).all()
        assert np.abs(content - wave.numpy()).max() <= 2**-15  # half a step of 16 bits, and at 1.0 a whole one


def test_a_wav_is_the_same_bytes_every_time_and_clips():
    x = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0, 0.5])
    assert sounds.wav(x, 16_000) == sounds.wav(x, 16_000)
    content, rate = soundfile.read(io.BytesIO(sounds.wav(x, 16_000)), dtype="int16")
    assert rate == 16_000
    assert content.tolist() == [0, 32767, -32768, 32767, -32768, 16384]


def columns(spec, info, labelled=True, n=30):
    """Recordings whose every sample is the class, so that a row can be checked."""
    real, made = torch.arange(n) % 3, (torch.arange(n) + 1) % 3
    of = [Batch((64 * y[:, None] + 10).expand(-1, 40).to(spec.dtype), y) for y in (real, made)]
    return {"real": of[0], "sampled": of[1] if labelled else of[1]._replace(y=None)}


def test_rows_are_classes_in_every_column():
    spec, info = described(256)
    spec = DataSpec("audio", (40,), 256, classes=3)
    info["class_names"] = ["low", "middle", "high"]
    display = display_of(info)
    shown, files = sounds.beside_each_other(columns(spec, info), spec, info, display)
    assert [(s.row, s.column) for s in shown] == [(r, c) for r in info["class_names"] for c in ("real", "sampled")]
    assert set(files) == {name for s in shown for name in (s.file, s.picture)}
    for s in shown:
        k = info["class_names"].index(s.row)
        assert files[s.file] == sounds.wav(display(torch.full((1, 40), 64 * k + 10))[0], 8000)
        assert files[s.picture].startswith(b"\x89PNG")


def test_a_class_that_a_column_lacks_is_left_out():
    spec, info = DataSpec("audio", (40,), 256, classes=3), described(256)[1]
    given = columns(spec, info)
    given["sampled"] = given["sampled"].rows(given["sampled"].y != 1)
    shown, _ = sounds.beside_each_other(given, spec, info, display_of(info))
    assert [s.row for s in shown] == ["0", "0", "2", "2"]


def test_without_labels_rows_are_spread_over_the_examples():
    spec, info = DataSpec("audio", (40,), 256, classes=3), described(256)[1]
    given = {"real": Batch(torch.arange(40).expand(60, -1) + torch.arange(60)[:, None])}
    shown, files = sounds.beside_each_other(given, spec, info, display_of(info))
    assert [s.row for s in shown] == [str(i + 1) for i in range(sounds.ROWS)]
    expected = [sounds.wav(w, 8000) for w in display_of(info)(given["real"].x[::6])]
    assert [files[s.file] for s in shown] == expected


def test_long_recordings_are_few():
    spec = DataSpec("audio", (100_000,), None)
    given = {"real": Batch(torch.zeros(20, 100_000)), "sampled": Batch(torch.zeros(20, 100_000))}
    shown, files = sounds.beside_each_other(given, spec, {"sample_rate": 8000}, lambda x: x)
    assert len(shown) == 4
    assert sum(len(files[s.file]) for s in shown) <= sounds.BYTES


def test_what_cannot_be_played_has_no_sounds():
    batch = {"real": Batch(torch.zeros(3, 40))}
    assert sounds.beside_each_other(batch, PLAIN, {}, None) == ([], {})
    vector = DataSpec("vector", (40,), None)
    assert sounds.beside_each_other(batch, vector, {"sample_rate": 8000}, None) == ([], {})
