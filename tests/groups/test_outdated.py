"""A width graph that its module has outgrown is refused wherever it is used; training in between is no change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxwidth
from fxwidth import FxwidthError, WidthGraph
from fxwidth.costs.registry import cost_polynomial
from fxwidth.importance.estimates import gather_evidence
from fxwidth.resizing.resize import resize_analyzed
from tests.zoo.nets import images


def network() -> fx.GraphModule:
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1)]
    return fxwidth.trace(nn.Sequential(*layers).double(), images(4))


def resized(gm: fx.GraphModule) -> None:
    fxwidth.resize(gm, {"0": 4}, selection="magnitude", fold=False)


def rewired(gm: fx.GraphModule) -> None:
    nodes = {node.target: node for node in gm.graph.nodes}
    nodes["3"].replace_input_with(nodes["2"], nodes["1"])


def given_another_module(gm: fx.GraphModule) -> None:
    gm.set_submodule("2", nn.Tanh())


def given_another_parameter(gm: fx.GraphModule) -> None:
    gm.get_submodule("0").weight = nn.Parameter(gm.get_parameter("0.weight").detach().clone())


def given_other_values_of_another_size(gm: fx.GraphModule) -> None:
    gm.get_parameter("0.weight").data = torch.zeros(5, 1, 3, 3, dtype=torch.float64)


def of_another_dtype(gm: fx.GraphModule) -> None:
    gm.float()


def without_a_node(gm: fx.GraphModule) -> None:
    relu = next(node for node in gm.graph.nodes if node.target == "4")
    relu.replace_all_uses_with(relu.args[0])
    gm.graph.erase_node(relu)


CHANGES = {
    resized: r"0.weight was \[8, 1, 3, 3\] \(float64, cpu\) and is \[4, 1, 3, 3\]",
    rewired: "node '_3' is another, or what it calls",
    given_another_module: "node '_2' is another, or what it calls",
    given_another_parameter: "0.weight is another tensor",
    given_other_values_of_another_size: r"0.weight was \[8, 1, 3, 3\] \(float64, cpu\) and is \[5, 1, 3, 3\]",
    of_another_dtype: r"0.weight was \[8, 1, 3, 3\] \(float64, cpu\) and is \[8, 1, 3, 3\] \(float32, cpu\)",
    without_a_node: "its graph is another, of 7 nodes in the place of 8",
}
USES: dict[str, Callable[[WidthGraph], Any]] = {
    "plan": fxwidth.plan,
    "plan under a budget": lambda graph: fxwidth.plan(graph, params=0.5),
    "spectrum": fxwidth.spectrum,
    "why_pinned": lambda graph: graph.why_pinned("5"),
    "explain": lambda graph: graph.explain("0", "3"),
    "draw": lambda graph: graph.draw(Path("nowhere.svg")),
    "resize_analyzed": lambda graph: resize_analyzed(graph, {"0": 5}),
    "evidence": lambda graph: gather_evidence(graph, None),
    "cost": lambda graph: cost_polynomial(graph, "flops"),
}


@pytest.mark.parametrize(("change", "text"), CHANGES.items(), ids=[f.__name__ for f in CHANGES])
def test_what_has_changed_is_told(change: Callable[[fx.GraphModule], None], text: str) -> None:
    gm = network()
    graph = fxwidth.analyze(gm)
    assert graph.outdated is None
    change(gm)
    with pytest.raises(FxwidthError, match=f"the graph has changed since it was analysed: {text}.*analyze.gm. again"):
        fxwidth.plan(graph)
    assert str(graph).startswith("outdated: ")


def test_analysed_again_it_is_of_use() -> None:
    gm = network()
    resized(gm)
    assert fxwidth.plan(fxwidth.analyze(gm), params=0.9, data=[images(4)])


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_it_is_refused_wherever_it_is_used(use: Callable[[WidthGraph], Any]) -> None:
    gm = network()
    graph = fxwidth.analyze(gm)
    resized(gm)
    with pytest.raises(FxwidthError, match="the graph has changed since it was analysed"):
        use(graph)
    assert gm.get_parameter("0.weight").shape == (4, 1, 3, 3)


def test_training_in_between_is_no_change() -> None:
    gm, x = network(), images(4)
    graph = fxwidth.analyze(gm)
    optimizer = torch.optim.Adam(gm.parameters())
    gm.train()
    gm(x).square().mean().backward()
    optimizer.step()
    gm.load_state_dict(gm.state_dict())
    gm.recompile()
    gm.eval()
    assert graph.outdated is None
    # And the plan is that of the values as they are.
    plans = [fxwidth.plan(one, params=0.5, data=[x]) for one in (graph, fxwidth.analyze(gm))]
    assert plans[0] == plans[1]
    assert plans[0].notes == plans[1].notes


def test_a_refused_resize_leaves_it_up_to_date() -> None:
    gm = network()
    graph = fxwidth.analyze(gm)
    with pytest.raises(FxwidthError):
        fxwidth.resize(gm, {"0": 4, "5": 2}, selection="magnitude", fold=False)
    fxwidth.plan(graph, params=0.5, data=[images(4)])
    assert graph.outdated is None
