"""Recordings, looked at and cut into fixed crops, wherever their bytes come from."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soundfile
from pydantic import Field

from dgm_core.config import Strict
from dgm_core.data.sources.base import Plan, refuse
from dgm_core.data.sources.pictures import Item

EXTENSIONS = frozenset({".wav", ".flac", ".ogg"})


class SoundOptions(Strict):
    """How recordings of any length become crops of one."""

    length: int | None = Field(None, ge=1, description="samples in a crop")
    crops: Literal["all", "centre"] = Field("all", description="all that fit end to end, or the middle one")
    short: Literal["refuse", "drop"] = Field("refuse", description="what to do with recordings shorter than `length`")
    rate: int | None = Field(None, gt=0, description="samples a second; None: as they are, if all agree")
    resample: bool = Field(False, description="bring other rates to `rate` (polyphase filter)")
    mono: bool = Field(False, description="average the channels")

    def count(self, frames: int) -> int:
        """Crops in a recording."""
        fit = frames // (self.length or frames)
        return min(1, fit) if self.crops == "centre" else fit


class Look(NamedTuple):
    """What a header says."""

    name: str
    frames: int = 0
    rate: int = 0
    channels: int = 0
    problem: str | None = None


def look(item: Item, deep: bool) -> Look:
    """Read the header, and with `deep` the samples."""
    try:
        data = _bytes(item)
        header = soundfile.info(io.BytesIO(data))
        if data[:4] == b"RIFF" and len(data) < (declared := int.from_bytes(data[4:8], "little")) < 2**32 - 1:
            return Look(item.name, problem=_cut_off(item, len(data), declared + 8))
        if deep:
            soundfile.read(io.BytesIO(data))
        return Look(item.name, header.frames, header.samplerate, header.channels)
    except (OSError, RuntimeError) as error:  # libsndfile's errors are RuntimeErrors
        return Look(item.name, problem=f"{item.name} cannot be read as audio ({error}); replace or remove it")


def decode(items: Sequence[Item], counts: Sequence[int], rate: int, options: SoundOptions) -> np.ndarray:
    """(sum of counts, length) float32 in [−1, 1]."""
    length, crops, problems = options.length or 0, [], []
    for item, count in zip(items, counts, strict=True):
        try:
            wave, found = soundfile.read(io.BytesIO(_bytes(item)), dtype="float32", always_2d=True)
        except (OSError, RuntimeError) as error:
            problems.append(f"{item.name} cannot be read as audio ({error}); replace or remove it")
            continue
        wave = wave.mean(axis=1)
        if found != rate:
            ratio = Fraction(rate, found)
            from scipy.signal import resample_poly  # here: it takes half a second, and is seldom needed

            wave = resample_poly(wave, ratio.numerator, ratio.denominator)
        if len(wave) < count * length:
            problems.append(
                f"{item.name} is cut off: {len(wave)} samples, its header promises more; replace or remove it"
            )
            continue
        start = (len(wave) - length) // 2 if options.crops == "centre" else 0
        crops.append(wave[start : start + count * length].reshape(count, length))
    refuse(problems)
    return np.concatenate(crops).astype(np.float32)


def settle(looks: Sequence[Look], options: SoundOptions, plan: Plan) -> tuple[int, list[int]]:
    """The rate, and how many crops each recording gives; what stands in the way goes to the plan's problems."""
    plan.problems += [found.problem for found in looks if found.problem]
    good = [found for found in looks if not found.problem]
    if not good:
        return 0, []
    rates, channels = Counter(found.rate for found in good), Counter(found.channels for found in good)
    rate = options.rate or rates.most_common(1)[0][0]
    other = [found for found in good if found.rate != rate]
    frames = sorted(found.frames for found in good)
    plan.lines.append("rates: " + ", ".join(f"{r} Hz in {n}" for r, n in rates.most_common()))
    plan.lines.append("channels: " + ", ".join(f"{c} in {n}" for c, n in channels.most_common()))
    plan.lines.append(f"lengths: {frames[0]} … {frames[-1]} samples, median {frames[len(frames) // 2]}")
    if other and not (options.resample and options.rate):
        plan.problems.append(
            f"{other[0].name} has {other[0].rate} samples a second, not {rate} ({len(other)} such); "
            f"give `rate` and `resample: true`, or convert the files"
        )
    stereo = [found for found in good if found.channels > 1]
    if stereo and not options.mono:
        plan.problems.append(
            f"{stereo[0].name} has {stereo[0].channels} channels ({len(stereo)} such); give `mono: true`"
        )
    if options.length is None:
        plan.problems.append(f"give `length`, the samples in a crop: at most {frames[0]} fit in every recording")
        return rate, [0] * len(looks)
    counts = [options.count(-(-found.frames * rate // found.rate)) if found.rate else 0 for found in looks]
    short = [found for found, count in zip(looks, counts, strict=True) if not count and not found.problem]
    if short and options.short == "refuse":
        plan.problems.append(
            f"{short[0].name} has {short[0].frames} samples, too short for crops of {options.length} ({len(short)} "
            "such, and silence is not padded); give a smaller `length`, or `short: drop`"
        )
    if short and options.short == "drop":
        plan.lines.append(f"dropped as too short for crops of {options.length}: {len(short)}")
        plan.facts["dropped_short"] = len(short)
    return rate, counts


def _bytes(item: Item) -> bytes:
    return Path(item.data).read_bytes() if isinstance(item.data, str) else item.data


def _cut_off(item: Item, found: int, declared: int) -> str:
    return f"{item.name} is cut off: {found} bytes of {declared}; replace or remove it"
