"""Linear groups in the basis of their spectrum."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from nets import Attention, build, tokens, trained_like
from torch import Tensor, nn

import fxwidth
from fxwidth.evidence import gather_evidence
from fxwidth.groups import ChannelGroup, WidthGraph
from fxwidth.rotations import linear_group, rotated
from fxwidth.tracing import analyze_module


class Bottleneck(nn.Module):
    """A sum of two linear maps, read by a third, and a nonlinear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 10), nn.Linear(16, 10, bias=False)
        self.up, self.head = nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.one(x) + self.two(x.tanh())).relu())


class Convolutions(nn.Module):
    """Two convolutions with nothing in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).relu())


def images() -> Tensor:
    return torch.randn(32, 1, 9, 9, generator=torch.Generator().manual_seed(0)).double()


LINEAR = {"bottleneck": (Bottleneck, tokens, "one"), "attention": (Attention, tokens, "v#1"),
          "convolutions": (Convolutions, images, "first")}  # fmt: skip


def traced(name: str) -> tuple[torch.fx.GraphModule, Tensor, WidthGraph, ChannelGroup]:
    torch.manual_seed(0)
    make, inputs, group = LINEAR[name]
    x = inputs()
    gm = fxwidth.trace(trained_like(make()), x[:4])
    graph = WidthGraph(analyze_module(gm))
    return gm, x, graph, graph[group]


@pytest.mark.parametrize("name", LINEAR)
def test_a_rotation_changes_no_function(name: str) -> None:
    gm, x, graph, group = traced(name)
    evidence = gather_evidence(graph, [x], rotates=True)
    turned = evidence.rotation(group)
    assert turned is not None
    assert evidence.moments is not None
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    with torch.no_grad():
        expected = gm(x)
        with ExitStack() as undo:
            moments = rotated(graph, turned, evidence.moments, undo)
            torch.testing.assert_close(gm(x), expected, rtol=1e-8, atol=1e-9)
            changed = [key for key, value in gm.state_dict().items() if not torch.equal(value, before[key])]
            assert set(changed) == {place[0] for place in turned.group.places}
            # The moments are those of the network as it is now.
            again = gather_evidence(graph, [x]).moments
            assert again is not None
            key = turned.group.reader.key
            torch.testing.assert_close(
                moments.contracted[key].covariance, again.contracted[key].covariance, rtol=1e-7, atol=1e-8
            )
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())


@pytest.mark.parametrize("name", LINEAR)
def test_it_loses_less_than_a_subset(name: str) -> None:
    errors = {}
    for rotate in (True, False):
        gm, x, _, group = traced(name)
        with torch.no_grad():
            expected = gm(x)
        fxwidth.resize(gm, {group.name: group.width // 2}, data=[x], rotate=rotate)
        with torch.no_grad():
            errors[rotate] = float((gm(x) - expected).square().mean())
    assert errors[True] < errors[False]


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_lost_is_the_tail_of_the_spectrum(name: str) -> None:
    _, x, graph, group = traced(name)
    evidence = gather_evidence(graph, [x], rotates=True)
    turned = evidence.rotation(group)
    assert turned is not None
    plain = evidence.unrotated()
    assert (evidence.errors(group)[1:-1] <= plain.errors(group)[1:-1] + 1e-9).all()
    heads = turned.forward @ turned.backward
    torch.testing.assert_close(heads, torch.eye(group.width).double().expand_as(heads), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["conv", "grouped", "tile", "in place", "shared", "tied"])
def test_groups_behind_nonlinear_ops_keep_their_basis(name: str) -> None:
    graph, _ = build(name)
    linear = [group.name for group in graph.free if linear_group(graph, group) is not None]
    assert linear == []


def test_of_attention_only_values_are_rotated() -> None:
    graph, _ = build("attention")
    assert [group.name for group in graph.free if linear_group(graph, group) is not None] == ["v#1"]


@pytest.mark.parametrize("between", [nn.ReLU(), nn.LayerNorm(10), nn.BatchNorm1d(10), nn.Hardtanh(), nn.Softmax(-1)])
def test_nothing_may_stand_in_between(between: nn.Module) -> None:
    x = tokens()[:, 0]
    gm = fxwidth.trace(trained_like(nn.Sequential(nn.Linear(16, 10), between, nn.Linear(10, 4), nn.ReLU())), x[:4])
    graph = WidthGraph(analyze_module(gm))
    assert all(linear_group(graph, group) is None for group in graph.free)


def test_an_optimizer_keeps_the_basis() -> None:
    gm, x, _, group = traced("bottleneck")
    old = gm.get_parameter("one.weight").detach().clone()
    fxwidth.resize(gm, {group.name: 5}, data=[x], optimizer=torch.optim.Adam(gm.parameters()))
    new = gm.get_parameter("one.weight").detach()
    assert all(bool((old == row).all(1).any()) for row in new)
