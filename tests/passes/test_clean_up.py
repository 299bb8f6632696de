"""What is needless goes, and nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.passes import AnalyzeWidths, CleanUp
from tests.passes.networks import ExportedNeedless, Needless, names, settled

CALLS: list[str] = []


def _input(count: int = 5) -> Tensor:
    return torch.randn(count, 6, dtype=torch.float64)


def _answers(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return what a model answers, what it writes to its buffers, and the random numbers that come after it."""
    torch.manual_seed(3)
    return model(x), copy.deepcopy(dict(model.named_buffers())), torch.rand(3)


def _same(one: Any, other: Any) -> bool:
    answers = torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
    return answers and all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())


# By kind: what goes, what goes for inference alone, and what stays.
NODES = {
    Needless: (
        {"same", "never", "unread", "exp"},
        {"drop", "unread_norm", "unread_drop", "dropout"},
        {"first", "norm", "last", "add_"},
    ),
    ExportedNeedless: (
        {"linear_1", "exp", "dropout"},
        {"batch_norm_1", "dropout_1", "dropout_2", "dropout_3"},
        {"linear", "batch_norm", "linear_2", "add_", "rand"},
    ),
}


@pytest.mark.parametrize(
    ("kind", "cleaned_in"),
    [
        (Needless, False), (Needless, True), (ExportedNeedless, False),
        pytest.param(ExportedNeedless, True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_in_both_modes_a_cleaned_graph_does_all_that_it_did(kind: type[nn.Module], cleaned_in: bool) -> None:
    gm = fxwidth.trace(settled(kind()), _input()).train(cleaned_in)
    other, before = copy.deepcopy(gm), set(names(gm))
    assert CleanUp()(gm).modified
    gone, stay = before - set(names(gm)), set(names(gm))
    assert NODES[kind][0] <= gone
    assert NODES[kind][1] | NODES[kind][2] <= stay
    for x in (_input(), _input(9)):
        for mode in (False, True):
            assert _same(_answers(gm.train(mode), x), _answers(other.train(mode), x))
    assert not CleanUp()(gm).modified


@pytest.mark.parametrize("kind", [Needless, pytest.param(ExportedNeedless, marks=pytest.mark.slow)])
def test_for_inference_what_trains_goes_too(kind: type[nn.Module]) -> None:
    gm = fxwidth.trace(settled(kind()), _input())
    other = copy.deepcopy(gm)
    state = list(gm.state_dict())
    assert CleanUp(inference=True)(gm).modified
    assert not (NODES[kind][0] | NODES[kind][1]) & set(names(gm))
    assert NODES[kind][2] <= set(names(gm))
    assert list(gm.state_dict()) == state
    for x in (_input(), _input(9)):
        assert _same(_answers(gm, x), _answers(other, x))


def test_for_inference_a_graph_in_training_is_refused() -> None:
    gm = fxwidth.trace(settled(Needless()), _input()).train()
    with pytest.raises(fxwidth.FxwidthError, match="CleanUp needs that it is in eval mode"):
        CleanUp(inference=True)(gm)
    with pytest.raises(fxwidth.FxwidthError, match="inference='yes' must be True or False"):
        CleanUp(inference="yes")  # type: ignore[arg-type]


def told(x: Tensor) -> Tensor:
    CALLS.append("told")
    return x


def _graph(build: Callable[[fx.Graph, fx.Node], Any]) -> fx.GraphModule:
    """Return a graph of one linear layer, with nodes before it whose results nobody uses."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    build(graph, x)
    graph.output(graph.call_module("layer", (x,)))
    root = nn.Module()
    root.layer, root.plain, root.hooked = nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 6)
    root.hooked.register_forward_hook(lambda *_: CALLS.append("hook"))
    root.back = nn.Linear(6, 6)
    root.back.register_full_backward_hook(lambda *_: None)
    gm = fx.GraphModule(root.double(), graph).eval()
    return AnalyzeWidths(_input())(gm).graph_module


def _no_grad(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_function(torch._C._set_grad_enabled, (False,))
    graph.call_function(torch._C._set_grad_enabled, (True,))


def _autocast(graph: fx.Graph, x: fx.Node) -> None:
    entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, False, None))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))


def _assertion(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_function(torch._assert, (True, "never"))
    graph.call_function(torch.ops.aten._assert_async.msg, (graph.call_method("any", (x,)), "never"))


def _own_function(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_function(told, (x,))


def _in_place(graph: fx.Graph, x: fx.Node) -> None:
    copied = graph.call_method("clone", (x,))
    graph.call_method("add_", (copied, 1))
    graph.call_function(torch.ops.aten.mul_.Tensor, (copied, 2))


def _hooks(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_module("hooked", (x,))
    graph.call_module("back", (x,))


KEPT = {
    _no_grad: 2, _autocast: 2, _assertion: 3, _own_function: 1, _in_place: 3, _hooks: 2,
}  # fmt: skip


@pytest.mark.parametrize("build", KEPT, ids=lambda build: build.__name__)
@pytest.mark.parametrize("inference", [False, True])
def test_what_may_do_something_stays(build: Callable[[fx.Graph, fx.Node], None], inference: bool) -> None:
    gm = _graph(build)
    assert len(gm.graph.nodes) == 3 + KEPT[build]
    assert not CleanUp(inference)(gm).modified
    assert len(gm.graph.nodes) == 3 + KEPT[build]


def _plain(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_function(torch.exp, (graph.call_method("mean", (graph.call_module("layer", (x,)), 1)),))
    graph.call_method("size", (x, 0))


def test_plain_code_without_a_reader_goes() -> None:
    gm = _graph(_plain)
    assert len(gm.graph.nodes) == 7
    assert CleanUp()(gm).modified
    assert len(gm.graph.nodes) == 3


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_an_identity_with_a_hook_stays(kind: str) -> None:
    gm = fxwidth.trace(nn.Sequential(nn.Linear(6, 6), nn.Identity()).double(), _input())
    part = gm.get_submodule("1")
    if kind == "forward":
        part.register_forward_hook(lambda *_: CALLS.append("hook"))
    else:
        part.register_full_backward_hook(lambda *_: None)
    assert not CleanUp()(gm).modified


def test_an_identity_stays_while_all_modules_have_a_hook() -> None:
    gm = fxwidth.trace(nn.Sequential(nn.Linear(6, 6), nn.Identity()).double(), _input())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not CleanUp()(gm).modified
    finally:
        handle.remove()
    assert CleanUp()(gm).modified
