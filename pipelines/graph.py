"""The stages and what each needs, as a drawing: layers from left to right, few crossings, no library."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup, escape

Edge = tuple[str, str]  # (what is needed, what needs it)

MOST = 60  # more stages than this are drawn a group each
SWEEPS = 12
HEIGHT, GAP_X, GAP_Y = 40, 44, 12


@dataclass(frozen=True)
class Layout:
    """Where everything goes; `bends` are the points between an edge's two ends, one a layer that it crosses."""

    width: float
    height: float
    node_width: float
    position: Mapping[str, tuple[float, float]]  # centres
    bends: Mapping[Edge, Sequence[tuple[float, float]]]


def dvc_graph(root: Path) -> tuple[list[str], list[Edge]]:
    """The stages of `root/dvc.yaml` by name, and their edges; those of other files are pipelines of their own."""
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    with Repo(str(root)) as repo:
        graph, file = repo.index.graph, str((root / "dvc.yaml").resolve())
        names = {
            s: str(s.name) for s in graph.nodes if isinstance(s, PipelineStage) and str(Path(s.path).resolve()) == file
        }
        edges = [(names[needed], names[s]) for s, needed in graph.edges if s in names and needed in names]
        return sorted(names.values()), sorted(edges)


def layers(nodes: Sequence[str], edges: Iterable[Edge]) -> dict[str, int]:
    """Longest path from a stage that needs nothing.

    Raises:
        ValueError: an edge names an unknown stage, or stages need each other in a circle.
    """
    needs: dict[str, list[str]] = {node: [] for node in nodes}
    for needed, stage in edges:
        if needed not in needs or stage not in needs:
            raise ValueError(f"the edge {needed} → {stage} names a stage that is not among the nodes")
        needs[stage].append(needed)
    depth: dict[str, int] = {}
    while len(depth) < len(needs):
        ready = [n for n in needs if n not in depth and all(m in depth for m in needs[n])]
        if not ready:
            raise ValueError(f"these stages need each other in a circle: {sorted(set(needs) - set(depth))}")
        for node in ready:
            depth[node] = 1 + max((depth[m] for m in needs[node]), default=-1)
    return depth


def reduced(nodes: Sequence[str], edges: Iterable[Edge]) -> list[Edge]:
    """The edges less those that a longer way says already."""
    unique = list(dict.fromkeys(edges))
    after: dict[str, set[str]] = {node: set() for node in nodes}
    for needed, stage in unique:
        after[needed].add(stage)
    reach: dict[str, set[str]] = {}
    for node in sorted(nodes, key=layers(nodes, unique).__getitem__, reverse=True):
        reach[node] = after[node].union(*(reach[m] for m in after[node]))
    return [(a, b) for a, b in unique if not any(b in reach[m] for m in after[a] if m != b)]


def grouped(nodes: Sequence[str], edges: Sequence[Edge]) -> tuple[list[str], list[Edge]]:
    """`train@a`, `train@b`, … of one layer as one stage; layers keep a circle from arising."""
    depth = layers(nodes, edges)
    members: dict[tuple[str, int], list[str]] = defaultdict(list)
    for node in nodes:
        members[node.partition("@")[0], depth[node]].append(node)
    label: dict[str, str] = {}
    for (stage, layer), names in members.items():
        group = names[0] if len(names) == 1 else f"{stage}@{len(names)} in layer {layer + 1}"
        label.update(dict.fromkeys(names, group))
    return list(dict.fromkeys(label.values())), list(dict.fromkeys((label[a], label[b]) for a, b in edges))


def arrange(nodes: Sequence[str], edges: Sequence[Edge], node_width: float = 120) -> Layout:
    """Layers by longest path, order within them by barycentres, heights drawn towards the neighbours'."""
    depth = layers(nodes, edges)
    columns: list[list[object]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node in nodes:
        columns[depth[node]].append(node)
    left: dict[object, list[object]] = defaultdict(list)
    right: dict[object, list[object]] = defaultdict(list)
    for a, b in edges:  # a long edge gets a place of its own in each layer that it crosses
        chain = [a, *((a, b, layer) for layer in range(depth[a] + 1, depth[b])), b]
        for layer, place in enumerate(chain[1:-1], depth[a] + 1):
            columns[layer].append(place)
        for one, other in pairwise(chain):
            right[one].append(other)
            left[other].append(one)
    y = {place: float(i) for column in columns for i, place in enumerate(column)}
    for sweep in range(SWEEPS):
        towards, ordered = (left, columns) if sweep % 2 == 0 else (right, columns[::-1])
        for column in ordered:
            column.sort(key=lambda place: _mean([y[m] for m in towards[place]], y[place]))
            for i, place in enumerate(column):
                y[place] = float(i)
    for column in columns:
        for i, place in enumerate(column):
            y[place] = i - len(column) / 2
    for sweep in range(SWEEPS):
        for column in columns if sweep % 2 == 0 else columns[::-1]:
            _settle(column, y, lambda place: _mean([y[m] for m in (*left[place], *right[place])], y[place]))
    pitch, top = HEIGHT + GAP_Y, min(y.values(), default=0.0)
    at = {
        place: (node_width / 2 + i * (node_width + GAP_X), HEIGHT / 2 + (y[place] - top) * pitch)
        for i, column in enumerate(columns)
        for place in column
    }
    return Layout(
        width=max(len(columns) * (node_width + GAP_X) - GAP_X, 0),
        height=max((v for _, v in at.values()), default=0) + HEIGHT / 2,
        node_width=node_width,
        position={node: at[node] for node in nodes},
        bends={(a, b): [at[a, b, layer] for layer in range(depth[a] + 1, depth[b])] for a, b in edges},
    )


def svg(nodes: Sequence[str], edges: Sequence[Edge], links: Mapping[str, str] = {}) -> Markup:
    """The drawing, inline; a stage in `links` leads there. Its style sheet is the page's."""
    if len(nodes) > MOST:
        nodes, edges = grouped(nodes, edges)
    edges = reduced(nodes, edges)
    names = {node: _words(node) for node in nodes}
    longest = max((len(part) for words in names.values() for part in words), default=0)
    layout = arrange(nodes, edges, node_width=min(max(7.2 * longest + 24, 96), 220))
    parts = [
        f'<svg class="graph" role="img" aria-label="{len(nodes)} stages and what each needs" '
        f'width="{layout.width + 4:.0f}" height="{layout.height + 4:.0f}" '
        f'viewBox="-2 -2 {layout.width + 4:.0f} {layout.height + 4:.0f}">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0.5 L7 4 L0 7.5 z"/></marker></defs>'
    ]
    for a, b in edges:
        path = _path(layout, a, b)
        parts.append(f'<path class="edge" data-from="{escape(a)}" data-to="{escape(b)}" d="{path}"/>')
    for node in nodes:
        parts.append(_box(node, names[node], layout, links.get(node)))
    return Markup("".join([*parts, "</svg>"]))


def _settle(column: Sequence[object], y: dict[object, float], wish: Callable[[object], float]) -> None:
    """Move each place to where it wishes to be, keeping the order and a distance of one.

    Places that would overlap move as one block, to the mean of what they wish: least squares under the order.
    """
    blocks: list[list[float]] = []  # [sum of wishes less offset, size]
    for i, place in enumerate(column):
        blocks.append([wish(place) - i, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, size = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += size
    offsets = [total / size for total, size in blocks for _ in range(int(size))]
    for i, (place, offset) in enumerate(zip(column, offsets, strict=True)):
        y[place] = i + offset


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _words(node: str) -> tuple[str, str]:
    stage, _, name = node.partition("@")
    return stage, name if len(name) <= 28 else f"{name[:27]}…"


def _path(layout: Layout, a: str, b: str) -> str:
    (x0, y0), (x1, y1) = layout.position[a], layout.position[b]
    half = layout.node_width / 2
    points = [(x0 + half, y0)]
    for x, y in layout.bends[a, b]:  # straight across the layer, between its boxes
        points += [(x - half, y), (x + half, y)]
    points.append((x1 - half, y1))
    d = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        if i % 2:
            d += f" L{x1:.1f} {y1:.1f}"
        else:
            middle = (x0 + x1) / 2
            d += f" C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
    return d


def _box(node: str, words: tuple[str, str], layout: Layout, link: str | None) -> str:
    x, y = layout.position[node]
    stage, name = words
    half = layout.node_width / 2
    inside = (
        f"<title>{escape(node)}</title>"
        f'<rect x="{x - half:.1f}" y="{y - HEIGHT / 2:.1f}" width="{layout.node_width:.1f}" height="{HEIGHT}" rx="7"/>'
    )
    if name:
        inside += f'<text class="stage" x="{x:.1f}" y="{y - 5:.1f}">{escape(stage)}</text>'
        inside += f'<text x="{x:.1f}" y="{y + 12:.1f}">{escape(name)}</text>'
    else:
        inside += f'<text x="{x:.1f}" y="{y + 4:.1f}">{escape(stage)}</text>'
    group = f'<g class="node s-{escape(stage)}" data-node="{escape(node)}">{inside}</g>'
    return f'<a href="{escape(link)}">{group}</a>' if link else group
