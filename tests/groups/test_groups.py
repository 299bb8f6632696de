"""Channel groups: what they are called, where they occur, and how they are explained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxwidth.analysis.roles import Role
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import Site
from fxwidth.groups.width_graph import WidthGraph
from tests.oracles.judges import analysed, as_one_node, randomise
from tests.zoo.networks import CASES


def width_graph(name: str) -> WidthGraph:
    return WidthGraph(analysed(CASES[name].build(), CASES[name].inputs()))


class Block(nn.Module):
    """A residual block with norms, a depthwise convolution and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.expand = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1, bias=False)
        self.project, self.head = nn.Conv2d(12, 8, 1), nn.Linear(8, 5)
        self.gain = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.gain * self.project(torch.relu(self.expand(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def block() -> WidthGraph:
    return WidthGraph(analysed(Block(), [torch.randn(2, 3, 8, 8)]))


def test_names_widths_and_freedom(block):
    assert {group.name: group.width for group in block.free} == {"stem": 8, "expand": 12}
    assert {group.name for group in block.groups} == {"stem", "expand", "stem:1", "head"}
    assert all(name in block for name in ("stem", "head"))
    assert "relu" not in block


def test_sites_say_what_each_parameter_does(block):
    roles = {(site.parameter, site.dim): site.role.value for site in block["stem"].sites}
    assert roles == {
        ("stem.weight", 0): "writer",
        ("stem.bias", 0): "writer",
        ("norm.weight", 0): "per-channel",
        ("norm.bias", 0): "per-channel",
        ("norm.running_mean", 0): "per-channel",
        ("norm.running_var", 0): "per-channel",
        ("depthwise.weight", 0): "per-channel",
        ("depthwise.bias", 0): "writer",
        ("expand.weight", 1): "reader",
        ("project.weight", 0): "writer",
        ("project.bias", 0): "writer",
        ("gain", 0): "per-channel",
        ("head.weight", 1): "reader",
    }
    assert block["expand"].sites_as(Role.READER) == [Site("project.weight", 1, Role.READER)]


def test_pins_name_their_op_and_node(block):
    assert block["head"].pinned == "the size of the model's output (model output)"
    assert block["stem:1"].pinned == (
        "it must equal a dimension of fixed size (convolution at node stem): it is dimension 1 of the model's input 'x'"
    )
    assert block["stem"].pinned is None
    assert block["head"].inexact_growth == "pinned: the size of the model's output (model output)"


def test_mixing_is_told():
    mixed = {group.name: group.mixed for group in width_graph("Encoder").free}
    assert mixed["into"] == "layer norm (native_layer_norm at node encoder, in layers.0.norm1)"
    assert mixed["encoder.layers.0.linear1"] is None


def test_parts_of_one_dim_are_numbered():
    graph = width_graph("PaddedShortcut")
    assert {group.name: group.width for group in graph.free} == {"stem": 16, "block#0": 8, "block#2": 8}


def test_every_name_is_one_group():
    for name in CASES:
        graph = width_graph(name)
        names = [group.name for group in graph.groups]
        assert len(set(names)) == len(names)
        assert all(graph[name].name == name for name in names)


def test_unknown_names_bring_the_nearest(block):
    with pytest.raises(FxwidthError) as caught:
        block["expnd"]
    assert str(caught.value) == (
        "there is no channel group 'expnd'; did you mean 'expand'? print(fxwidth.analyze(gm)) lists all groups."
    )


def test_unused_parameters_stay():
    case = CASES["UnusedParameters"]
    graph = WidthGraph(analysed(as_one_node(randomise(case.build())), case.inputs()))
    assert [group.name for group in graph.free] == ["model.used"]
    assert graph["model.unused.bias"].pinned == "the graph never uses this parameter"


def test_explanations(block):
    told = block.explain("stem.weight:0", "project.weight:0").splitlines()
    assert told[0] == "stem.weight:0 and project.weight:0 share 8 channels:"
    assert any("add at node add" in line for line in told[1:])
    assert block.explain("stem", "expand") == "stem.weight:0 and expand.weight:0 share no channels."


def test_explanations_count_what_is_shared():
    told = width_graph("PaddedShortcut").explain("block.weight:0", "stem.weight:0")
    assert told.startswith("block.weight:0 and stem.weight:0 share 16 channels:")


def test_explanations_follow_every_pair_that_shares():
    for name in ("TiledShortcut", "ShuffledHalves", "GroupsOfManySizes", "FusedAttention", "GroupedQueryAttention"):
        graph = width_graph(name)
        for group in graph.free:
            places = [f"{site.parameter}:{site.dim}" for site in group.sites]
            assert all("share no" not in graph.explain(places[0], place) for place in places[1:])


@pytest.mark.parametrize("name", ["stem.weight:7", "norm.num_batches_tracked:0"])
def test_dims_that_do_not_exist(block, name):
    with pytest.raises(FxwidthError, match=r"has no dim \d of size above one\.$"):
        block.explain(name, "stem")


def test_the_table(block):
    lines = str(block).splitlines()
    assert lines[0].split() == ["group", "width", "kind", "writers", "readers", "notes"]
    assert next(line for line in lines if line.startswith("expand")).split() == ["expand", "12", "hidden", "1", "1"]
    assert any("pinned: the size of the model's output" in line for line in lines)
