"""Evidence from noise is gathered once for a network as it is, however often it is asked for, and anew for another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import images, trained_like
from torch import fx, nn

import fxwidth
from fxwidth import remembered_noise
from fxwidth.moments import Moments


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[fxwidth.WidthGraph]:
    """The graphs that noise was sent through."""
    found: list[fxwidth.WidthGraph] = []
    gather = remembered_noise.moments_from_noise

    def counted(width_graph: fxwidth.WidthGraph) -> Moments | None:
        found.append(width_graph)
        return gather(width_graph, work=1e6)

    monkeypatch.setattr(remembered_noise, "moments_from_noise", counted)
    return found


def network() -> fx.GraphModule:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1)]
    return fxwidth.trace(trained_like(nn.Sequential(*layers)), images(4))


def test_a_resize_knows_what_its_plan_was_made_from(runs: list[fxwidth.WidthGraph]) -> None:
    gm, x = network(), images(4)
    graph = fxwidth.analyze(gm)
    plan = fxwidth.plan(graph, params=0.5)
    fxwidth.plan(graph, params=0.6)
    fxwidth.resize(gm, plan)
    assert runs == [graph]
    alone = fxwidth.resize(network(), dict(plan))
    assert len(runs) == 2
    assert torch.equal(gm(x), alone(x))


def test_networks_and_inputs_of_their_own_are_told_apart(runs: list[fxwidth.WidthGraph]) -> None:
    gm = network()
    graphs = [fxwidth.analyze(gm), fxwidth.analyze(gm, images(4, size=12)), fxwidth.analyze(network())]
    for graph in graphs:
        fxwidth.plan(graph, params=0.5)
    assert runs == graphs


def written(gm: fx.GraphModule) -> None:
    with torch.no_grad():
        gm.get_parameter("0.weight").mul_(2)


def written_past_the_version_counter(gm: fx.GraphModule) -> None:
    gm.get_parameter("0.weight").data.mul_(2)


def replaced(gm: fx.GraphModule) -> None:
    gm.get_submodule("0").weight = nn.Parameter(2 * gm.get_parameter("0.weight").detach())


def statistics_moved(gm: fx.GraphModule) -> None:
    gm.get_buffer("1.running_mean").add_(1)


def rewired(gm: fx.GraphModule) -> None:
    """Have the second convolution read what the activation reads, which runs all the same."""
    nodes = {node.target: node for node in gm.graph.nodes}
    nodes["3"].replace_input_with(nodes["2"], nodes["1"])
    gm.recompile()


def given_another_activation(gm: fx.GraphModule) -> None:
    gm.set_submodule("2", nn.LeakyReLU(0.5))


@pytest.mark.parametrize(
    "change",
    [written, written_past_the_version_counter, replaced, statistics_moved, rewired, given_another_activation],
    ids=lambda f: f.__name__,
)
def test_of_a_network_that_has_changed_it_is_gathered_anew(
    change: Callable[[fx.GraphModule], None], runs: list[fxwidth.WidthGraph]
) -> None:
    gm, x = network(), images(4)
    plan = fxwidth.plan(fxwidth.analyze(gm), params=0.5)
    change(gm)
    fxwidth.resize(gm, plan)
    assert len(runs) == 2
    other = network()
    change(other)
    assert torch.equal(gm(x), fxwidth.resize(other, dict(plan))(x))
