"""A folder of pictures: `[train|val|test/][class/]picture.png`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dgm_core.contract import DataSpec
from dgm_core.data.sources import pictures
from dgm_core.data.sources.base import Arrays, Map, Part, Plan, Source, chunks
from dgm_core.data.sources.files import class_lines, walk
from dgm_core.data.sources.pictures import Item, Look, PictureOptions


class Images(Source, PictureOptions):
    source: Literal["images"] = "images"
    labels: bool = Field(True, description="sub-folders are classes; False: only folders")

    def plan(self, *, seed: int, map: Map = map, deep: bool = False) -> Plan:  # noqa: A002
        plan = Plan()
        folder = self.located(plan)
        if folder is None:
            return plan
        tree = walk(folder, pictures.EXTENSIONS, "pictures", labels=self.labels, seed=seed)
        plan.problems += tree.problems
        plan.class_names = tree.class_names
        looks = [
            found
            for part in map(partial(_look_all, options=self, deep=deep), chunks([e.path for e in tree.entries], 1024))
            for found in part
        ]
        plan.lines += [f"{len(tree.entries)} pictures", *tree.lines]
        plan.lines += class_lines([e.label for e in tree.entries if e.label is not None], tree.class_names)
        shape = pictures.settle(looks, self, plan)
        if plan.problems or shape is None:
            return plan
        plan.spec = DataSpec("image", shape, 256, classes=len(tree.class_names))
        for split in sorted({e.split for e in tree.entries}, key=str):
            for entries in chunks([e for e in tree.entries if e.split == split], 512):
                payload = ([e.path for e in entries], [e.label for e in entries], shape)
                plan.parts.append(Part(split, len(entries), payload))
        return plan

    def decode(self, payload: Any) -> Arrays:
        paths, labels, shape = payload
        y = None if labels[0] is None else np.asarray(labels, np.int64)
        return Arrays(pictures.decode([Item(path, path) for path in paths], shape, self), y)


def _look_all(paths: Sequence[str], options: PictureOptions, deep: bool) -> list[Look]:
    return [pictures.look(Item(path, path), options, deep) for path in paths]
