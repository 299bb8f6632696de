"""Evidence from noise is gathered once for a network as it is, however often it is asked for, and anew for another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import fxwidth
from fxwidth.statistics import remembered_noise
from fxwidth.statistics.moments import Moments
from tests.zoo.nets import images, trained_like


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


def rows_swapped(gm: fx.GraphModule) -> None:
    """Give the channels of the first layer another order, by which no sum changes."""
    with torch.no_grad():
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            tensor = gm.state_dict()[name]
            tensor.copy_(tensor.flip(0))


def test_an_order_of_channels_is_no_other_one_of_the_same_sum(runs: list[fxwidth.WidthGraph]) -> None:
    gm = network()
    with torch.no_grad():
        for tensor in gm.state_dict().values():
            # Sums of whole numbers are exact.
            tensor.copy_((4 * tensor).round() + (tensor.dim() == 1))
    fxwidth.plan(fxwidth.analyze(gm), params=0.5)
    sums = [tensor.sum() for tensor in gm.state_dict().values()]
    rows_swapped(gm)
    assert [tensor.sum() for tensor in gm.state_dict().values()] == sums
    fxwidth.plan(fxwidth.analyze(gm), params=0.5)
    assert len(runs) == 2


@pytest.mark.parametrize("options", [{}, {"data": [images(4)]}])
def test_it_is_not_gathered_where_nobody_asks_for_it(
    options: dict[str, object], runs: list[fxwidth.WidthGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxwidth.importance.estimates.moments_from_data", lambda *_: pytest.fail("data were looked at"))
    gm, other = network(), network()
    fxwidth.resize(gm, {"0": 4, "3": 3}, selection="magnitude", fold=False, recalibrate=False, **options)
    assert not runs
    text = str(fxwidth.report(gm))
    assert "channels chosen by magnitude, readers not refitted" in text
    assert fxwidth.report(gm).resizes[0]["evidence"] is None
    monkeypatch.undo()
    # By evidence that is at hand nothing else is done.
    fxwidth.evolve(other, params=0.5, selection="magnitude", fold=False, data=[images(4)], recalibrate=False)
    assert "channels chosen by magnitude, readers not refitted" in str(fxwidth.report(other))


def test_the_report_says_by_what_channels_were_chosen() -> None:
    x = [images(4)]
    texts = []
    for options in ({}, {"fold": False}, {"selection": "magnitude"}):
        gm = network()
        fxwidth.resize(gm, {"0": 4}, data=x, recalibrate=False, **options)
        texts.append(str(fxwidth.report(gm)).splitlines()[0].split(", ", 1)[1].split("), ", 1)[-1])
    assert "channels chosen by greedy, readers refitted from data" in texts[0]
    assert "channels chosen by greedy from data" in texts[1]
    assert "channels chosen by greedy from data and noise, readers not refitted" in texts[1]
    assert "channels chosen by magnitude, readers refitted from data" in texts[2]
    gm = network()
    fxwidth.resize(gm, {"0": 10})
    assert "readers" not in str(fxwidth.report(gm))
