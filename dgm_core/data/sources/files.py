"""Folders of files: splits from top folders, classes from sub-folders."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dgm_core.data.sources.base import SPLIT_NAMES


class Entry(NamedTuple):
    path: str
    split: str | None
    label: int | None


@dataclass
class Tree:
    """The files of a folder, in seeded order (so that a slice of a split is a fair sample), and what is odd in it."""

    entries: list[Entry] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def walk(root: Path, extensions: frozenset[str], what: str, *, labels: bool, seed: int) -> Tree:
    """`root/[train|val|test/][class/]file`. Hidden files are ignored, other extensions are reported."""
    tree = Tree()
    if not root.is_dir():
        tree.problems.append(f"{root} is a file; give the folder that holds the {what}")
        return tree
    tops = _folders(root)
    splits: dict[str | None, Path] = {SPLIT_NAMES[f.name.lower()]: f for f in tops if f.name.lower() in SPLIT_NAMES}
    roots: dict[str | None, Path] = {None: root}
    if "train" in splits:
        roots = dict(splits)
        beside = [f.name for f in tops if f not in splits.values()]
        if beside:
            tree.problems.append(
                f"{root}: beside train/ there is {', '.join(beside)}; name splits train, val, test and move the rest"
            )
    classes = {split: _folders(folder) if labels else [] for split, folder in roots.items()}
    tree.class_names = sorted({f.name for f in classes.get("train", classes.get(None, []))})
    skipped: Counter[str] = Counter()
    for split, folder in roots.items():
        if classes[split]:
            loose = _files(folder, extensions, skipped, deep=False)
            if loose:
                tree.problems.append(
                    f"{folder}: {len(loose)} {what} lie beside the class folders, e.g. {loose[0].name}; move each into "
                    "its class, or give `labels: false`"
                )
        elif tree.class_names:
            tree.problems.append(f"{folder} has no class folders, but train/ has; sort its files into the same classes")
        for sub in classes[split] or [folder]:
            found = _files(sub, extensions, skipped, deep=True)
            if not found:
                kind = "class folder" if classes[split] else "folder"
                tree.problems.append(f"{sub}: this {kind} is empty (no {what}); put {what} in, or remove the folder")
            if classes[split] and sub.name not in tree.class_names:
                tree.problems.append(f"{sub}: class {sub.name!r} is not among the training classes; add it to train/")
                continue
            label = tree.class_names.index(sub.name) if classes[split] else None
            tree.entries += [Entry(str(path), split, label) for path in found]
    if skipped:
        told = ", ".join(f"{count} {suffix or 'without extension'}" for suffix, count in skipped.most_common(5))
        tree.lines.append(f"left aside, being no {what}: {told}")
    random.Random(seed).shuffle(tree.entries)
    return tree


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not _hidden(p))


def _files(folder: Path, extensions: frozenset[str], skipped: Counter[str], *, deep: bool) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
        if path.is_file() and not any(_hidden(Path(part)) for part in path.relative_to(folder).parts):
            if path.suffix.lower() in extensions:
                found.append(path)
            else:
                skipped[path.suffix.lower()] += 1
    return found


def _hidden(path: Path) -> bool:
    return path.name.startswith((".", "__MACOSX"))


def class_lines(labels: list[int], names: list[str]) -> list[str]:
    """How many examples each class has."""
    counts = Counter(labels)
    return [f"class {name}: {counts[k]}" for k, name in enumerate(names)]
