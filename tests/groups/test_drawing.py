"""Pictures of groups: what is in them, where it is drawn, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.errors import FxwidthError
from fxwidth.groups.flow_boxes import colours_of, flow_of, folded_flow, folded_groups
from fxwidth.groups.graph_layout import lay_out
from fxwidth.groups.width_graph import WidthGraph
from tests.groups.test_groups import Block, width_graph
from tests.oracles.judges import analysed, as_one_node

image = pytest.importorskip("matplotlib.image")


@pytest.fixture(scope="module")
def block() -> WidthGraph:
    return fxwidth.analyze(fxwidth.trace(Block(), torch.randn(2, 3, 8, 8)))


def test_png(block, tmp_path):
    block.draw(tmp_path / "block.PNG")
    pixels = image.imread(tmp_path / "block.PNG", format="png")
    assert min(pixels.shape[:2]) > 300
    colours = {
        tuple(colour) for colour in np.unique((pixels[..., :3] * 255).round().astype(int).reshape(-1, 3), axis=0)
    }
    assert {_rgb(fill) for fills in _fills(block, tmp_path).values() for fill in fills} <= colours


def test_svg_names_boxes_and_groups(block, tmp_path):
    block.draw(str(tmp_path / "block.svg"))
    texts = _texts(tmp_path / "block.svg")
    assert {"stem", "Conv2d · BatchNorm2d · relu", "expand", "project", "depthwise", "head", "x", "input"} <= set(texts)
    assert {"2 free groups of 4, with their widths", "stem  8", "expand  12", "pinned"} <= set(texts)


def test_boxes_have_the_colours_of_their_groups(block, tmp_path):
    fills = _fills(block, tmp_path)
    assert fills["stem"] == fills["depthwise"] == fills["project"] == fills["add"] != fills["expand"]
    assert fills["head"] == fills["x"] not in (fills["stem"], fills["expand"])


def test_a_box_with_several_groups_has_as_many_stripes(tmp_path):
    fills = _fills(width_graph("PaddedShortcut"), tmp_path)
    assert len(fills["stem"]) == 1
    assert len(set(fills["block"])) == len(fills["block"]) == 3


class OneLayer(nn.Module):
    """An encoder layer, whose heads and hidden channels are inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_groups_inside_of_a_module_are_a_bar(tmp_path):
    graph = WidthGraph(analysed(as_one_node(OneLayer()), [torch.randn(2, 3, 16)]))
    assert len(graph.free) == 3
    assert len(_fills(graph, tmp_path)["model"]) == 1 + 3


def test_the_same_picture_twice(block, tmp_path):
    for name in ("one.svg", "two.svg"):
        block.draw(tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_other_suffixes_are_refused(block, tmp_path):
    with pytest.raises(FxwidthError) as caught:
        block.draw(tmp_path / "block.pdf")
    assert str(caught.value) == ("groups are drawn as SVG or PNG, not as 'block.pdf'. End the path in .svg or .png.")
    assert not (tmp_path / "block.pdf").exists()


def test_folders_must_exist(block, tmp_path):
    with pytest.raises(
        FxwidthError, match=r"there is no folder '.*nowhere' to draw 'block\.png' in\. Make it first\.$"
    ):
        block.draw(tmp_path / "nowhere" / "block.png")


def test_without_matplotlib(block, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FxwidthError) as caught:
        block.draw(tmp_path / "block.png")
    assert str(caught.value) == "drawing needs matplotlib. Run pip install 'fxwidth[draw]'."


def test_one_layer_alone(tmp_path):
    fxwidth.analyze(fxwidth.trace(nn.Linear(3, 2), torch.randn(2, 3))).draw(tmp_path / "linear.svg")
    assert "0 free groups of 2, with their widths" in _texts(tmp_path / "linear.svg")


class TestLayout:
    """Rows by depth; nothing overlaps."""

    graph = nx.DiGraph([("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"), ("a", "e"), ("e", "d"), ("late", "d")])
    widths = dict.fromkeys("abcde", 1.0) | {"late": 2.0}

    def test_arrows_point_down(self):
        places = lay_out(self.graph, self.widths).places
        assert all(places[first][1] < places[last][1] for first, last in self.graph.edges)
        assert places["late"][1] == places["d"][1] - 1

    def test_vertices_and_long_edges_keep_apart(self):
        layout = lay_out(self.graph, self.widths)
        spans = [(row, x - self.widths[v] / 2, x + self.widths[v] / 2) for v, (x, row) in layout.places.items()]
        spans += [(row, x, x) for bends in layout.bends.values() for x, row in bends]
        spans.sort()
        for (row, _, end), (next_row, start, _) in nx.utils.pairwise(spans):
            assert row != next_row or end < start

    def test_long_edges_have_one_point_per_row_they_cross(self):
        layout = lay_out(self.graph, self.widths)
        assert [row for _, row in layout.bends["a", "d"]] == [1, 2]
        assert layout.bends["a", "b"] == []

    def test_the_longest_path_is_straight(self):
        places = lay_out(self.graph, self.widths).places
        middle = [places[vertex][0] for vertex in "abcd"]
        assert max(middle) - min(middle) < 0.3

    def test_nothing_to_place(self):
        assert lay_out(nx.DiGraph(), {}).places == {}


def _texts(path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


def _fills(graph: WidthGraph, folder: Path) -> dict[str, list[str]]:
    """Return the colours of each box, by its title."""
    graph.draw(folder / "fills.svg")
    drawn = (folder / "fills.svg").read_text(encoding="utf-8")
    fills: dict[str, list[str]] = {}
    for title, fill in re.findall(r'<g id="(\S+) at [^"]*">\s*<path[^>]*fill: (#\w+)', drawn):
        fills.setdefault(title, []).append(fill)
    return fills


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


class Blocks(nn.Module):
    """Blocks that are alike but for one, around a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6)) for width in (8, 8, 5, 8)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_repeated_blocks_are_drawn_once(tmp_path):
    graph = fxwidth.analyze(fxwidth.trace(Blocks(), torch.randn(2, 4)))
    graph.draw(tmp_path / "blocks.svg")
    texts = _texts(tmp_path / "blocks.svg")
    assert texts.count("blocks.0..1.0") == 1
    assert {"blocks.2.0", "blocks.3.0", "Linear · ReLU, 2 times", "blocks.0..1.2"} <= set(texts)
    assert {"blocks.0..1,3.0  8", "blocks.2.0  5"} <= set(texts)
    flow = flow_of(graph.analysis, graph.free)
    whole = folded_flow(flow)
    boxes, all_boxes = ([box for _, box in one.nodes(data="box")] for one in (whole, flow))
    # A block that differs is between those before and after it.
    titles = {node: box.title for node, box in whole.nodes(data="box")}
    below = {titles[node]: {titles[reader] for reader in whole[node]} for node in whole}
    assert below["blocks.2.0"] == {"blocks.2.2"}
    assert below["blocks.2.2"] == {"add''"}
    assert "blocks.3.0" in below["add''"]
    # Nothing is lost, and arrows go down.
    assert sum(box.count for box in boxes) == len(all_boxes)
    assert sorted(name for box in boxes for name in box.nodes) == sorted(
        name for box in all_boxes for name in box.nodes
    )
    assert nx.is_directed_acyclic_graph(whole)
    assert len({box.title for box in all_boxes}) == len(all_boxes)


def test_groups_of_one_dim_are_no_blocks():
    block = nn.TransformerEncoderLayer(16, 4, 4, batch_first=True)  # as many heads as dims of each
    graph = fxwidth.analyze(fxwidth.trace(block, torch.randn(2, 3, 16)))
    entries = folded_groups(graph.free)
    assert [own for _, own in entries] == [(group,) for group in graph.free]
    assert len(set(colours_of(entries).values())) == len(graph.free)


def test_boxes_have_the_names_of_modules_and_not_of_nodes(tmp_path):
    block = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2, enable_nested_tensor=False
    )
    graph = fxwidth.analyze(fxwidth.trace(block, torch.randn(2, 3, 16)))
    titles = [box.title for _, box in flow_of(graph.analysis, graph.free).nodes(data="box")]
    assert any(title.startswith("layers.0") for title in titles)
    assert not any(title.endswith(("_1", "_2", "_3")) for title in titles), titles


class Nested(nn.Module):
    """Blocks within blocks, of which the inner ones are alike everywhere, and the last outer one is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(count))
            for count in (2, 2, 3)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:
                x = x + block(x)
        return self.head(x)


def test_blocks_within_blocks_are_folded_as_a_whole_or_not_at_all():
    graph = fxwidth.analyze(fxwidth.trace(nn.Sequential(nn.Linear(4, 6), Nested()), torch.randn(2, 4)))
    flow = folded_flow(flow_of(graph.analysis, graph.free))
    counts = {box.title: box.count for _, box in flow.nodes(data="box")}
    assert counts["1.stages.0..1.0.0"] == counts["1.stages.0..1.1.0"] == 2
    assert counts["1.stages.2.0..2.0"] == 3
    # Each box is on a way from the input to the output.
    first, last = (node for node in flow if node.op in ("placeholder", "output"))
    assert set(flow) == nx.descendants(flow, first) | {first} == nx.ancestors(flow, last) | {last}
