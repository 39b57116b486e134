"""The drawing of the graph: edges go rightwards, nothing overlaps, and no need is lost."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pipelines.graph import HEIGHT, MOST, Edge, arrange, dvc_graph, grouped, layers, reduced, svg


def random_graph(seed: int, size: int) -> tuple[list[str], list[Edge]]:
    rng = random.Random(seed)
    nodes = [f"stage{i % 4}@n{i}" for i in range(size)]
    edges = [(nodes[i], nodes[j]) for j in range(size) for i in range(j) if rng.random() < 3 / size]
    rng.shuffle(nodes)
    return nodes, edges


def reachable(nodes: list[str], edges: list[Edge]) -> set[Edge]:
    found = set(edges)
    for b, a, c in itertools.product(nodes, nodes, nodes):  # Floyd and Warshall: b is the stage passed through
        if (a, b) in found and (b, c) in found:
            found.add((a, c))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_edge_goes_to_a_later_layer_and_boxes_keep_apart(seed: int) -> None:
    nodes, edges = random_graph(seed, 25)
    layout = arrange(nodes, edges)
    for a, b in edges:
        assert layout.position[a][0] < layout.position[b][0]
    for a, b in itertools.combinations(nodes, 2):
        (xa, ya), (xb, yb) = layout.position[a], layout.position[b]
        assert abs(xa - xb) >= layout.node_width or abs(ya - yb) >= HEIGHT, (a, b)
    for node in nodes:
        x, y = layout.position[node]
        assert layout.node_width / 2 <= x <= layout.width - layout.node_width / 2
        assert HEIGHT / 2 <= y <= layout.height - HEIGHT / 2


@pytest.mark.parametrize("seed", range(5))
def test_long_edges_pass_between_the_boxes(seed: int) -> None:
    nodes, edges = random_graph(seed, 25)
    layout = arrange(nodes, edges)
    boxes = layout.position.values()
    for (a, b), bends in layout.bends.items():
        assert len(bends) == layers(nodes, edges)[b] - layers(nodes, edges)[a] - 1
        for x, y in bends:
            assert all(abs(x - bx) >= layout.node_width or abs(y - by) > HEIGHT / 2 for bx, by in boxes)


@pytest.mark.parametrize("seed", range(5))
def test_leaving_out_what_a_longer_way_says_loses_no_need(seed: int) -> None:
    nodes, edges = random_graph(seed, 20)
    fewer = reduced(nodes, edges)
    assert reachable(nodes, fewer) == reachable(nodes, edges)
    for edge in fewer:  # and each that is left is needed
        assert reachable(nodes, [e for e in fewer if e != edge]) != reachable(nodes, edges)


def test_a_straight_chain_is_drawn_straight() -> None:
    nodes = list("abcd")
    layout = arrange(nodes, [("a", "b"), ("b", "c"), ("c", "d")])
    assert len({y for _, y in layout.position.values()}) == 1


def test_circles_and_unknown_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="circle"):
        layers(["a", "b"], [("a", "b"), ("b", "a")])
    with pytest.raises(ValueError, match="not among"):
        layers(["a"], [("a", "b")])


def test_many_stages_are_drawn_by_groups() -> None:
    nodes = ["prepare@d", *(f"train@{i}" for i in range(MOST)), "report"]
    edges = [("prepare@d", f"train@{i}") for i in range(MOST)] + [(f"train@{i}", "report") for i in range(MOST)]
    names, links = grouped(nodes, edges)
    assert names == ["prepare@d", f"train@{MOST} in layer 2", "report"]
    assert links == [("prepare@d", names[1]), (names[1], "report")]
    assert svg(nodes, edges).count("<rect") == 3


def test_the_drawing_is_well_formed_whatever_the_names() -> None:
    nodes = ['prepare@<b>&"', "train@" + "x" * 60]
    drawing = ET.fromstring(str(svg(nodes, [(nodes[0], nodes[1])], {nodes[1]: "#run-x"})))
    titles = [title.text for title in drawing.iter("title")]
    assert titles == nodes
    assert [link.attrib["href"] for link in drawing.iter("a")] == ["#run-x"]


def test_the_stages_come_from_dvc(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  make:\n    foreach: [a, b]\n    do:\n      cmd: echo\n      outs:\n        - ${item}.txt\n"
        "  join:\n    cmd: echo\n    deps:\n      - a.txt\n      - b.txt\n"
    )
    (tmp_path / "aside").mkdir()  # a pipeline of its own
    (tmp_path / "aside" / "dvc.yaml").write_text("stages:\n  search:\n    cmd: echo\n    deps:\n      - ../a.txt\n")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True, capture_output=True)
    nodes, edges = dvc_graph(tmp_path)
    assert nodes == ["join", "make@a", "make@b"]
    assert edges == [("make@a", "join"), ("make@b", "join")]
