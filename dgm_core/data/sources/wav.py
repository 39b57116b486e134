"""A folder of recordings: `[train|val|test/][class/]recording.wav` (or flac, ogg), cut into crops of one length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dgm_core.contract import DataSpec
from dgm_core.data.sources import sounds
from dgm_core.data.sources.base import Arrays, Map, Part, Plan, Source, chunks
from dgm_core.data.sources.files import class_lines, walk
from dgm_core.data.sources.pictures import Item
from dgm_core.data.sources.sounds import SoundOptions


class Wav(Source, SoundOptions):
    source: Literal["wav"] = "wav"
    labels: bool = Field(True, description="sub-folders are classes; False: only folders")

    def plan(self, *, seed: int, map: Map = map, deep: bool = False) -> Plan:  # noqa: A002
        plan = Plan()
        folder = self.located(plan)
        if folder is None:
            return plan
        tree = walk(folder, sounds.EXTENSIONS, "recordings", labels=self.labels, seed=seed)
        plan.problems += tree.problems
        plan.class_names = tree.class_names
        paths = chunks([e.path for e in tree.entries], 256)
        looks = [found for part in map(partial(_look_all, deep=deep), paths) for found in part]
        plan.lines += [f"{len(tree.entries)} recordings", *tree.lines]
        plan.lines += class_lines([e.label for e in tree.entries if e.label is not None], tree.class_names)
        rate, counts = sounds.settle(looks, self, plan)
        if plan.problems:
            return plan
        plan.facts["sample_rate"] = rate
        plan.spec = DataSpec("audio", (self.length or 0,), None, classes=len(tree.class_names))
        entries = [(number, e, c) for number, (e, c) in enumerate(zip(tree.entries, counts, strict=True)) if c]
        for split in sorted({e.split for e in tree.entries}, key=str):
            for some in chunks([row for row in entries if row[1].split == split], 128):
                payload = ([e.path for _, e, _ in some], [e.label for _, e, _ in some], [c for _, _, c in some], rate)
                groups = tuple(number for number, _, c in some for _ in range(c))
                plan.parts.append(Part(split, len(groups), payload, groups))
        return plan

    def decode(self, payload: Any) -> Arrays:
        paths, labels, counts, rate = payload
        y = None if labels[0] is None else np.repeat(np.asarray(labels, np.int64), counts)
        return Arrays(sounds.decode([Item(path, path) for path in paths], counts, rate, self), y)


def _look_all(paths: Sequence[str], deep: bool) -> list[sounds.Look]:
    return [sounds.look(Item(path, path), deep) for path in paths]
