"""What is saved and loaded, pickled or copied is the same graph: node by node, in what it returns, and in its state."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxwidth
from fxwidth import FxwidthError
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.serialization import graph_data, graph_pickling
from tests.zoo import networks_of_buffers, networks_of_calls, networks_of_modes
from tests.zoo.networks import CASES
from tests.zoo.networks_of_odd_forms import FORMS

Network = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _networks() -> Iterator[tuple[str, Callable[[], Network]]]:
    front_ends = list(networks_of_modes.FRONT_ENDS.items())
    for i, (name, layer) in enumerate(networks_of_modes.LAYERS.items()):
        front_end, around = front_ends[i % len(front_ends)]
        x = torch.randn(4, networks_of_modes.WIDTH)
        yield f"{name}, {front_end}", lambda layer=layer, around=around, x=x: (around(layer()), (x,), {})
    for name, (make, call) in FORMS.items():
        yield name, lambda make=make, call=call: (make(), *call(3))
    for name, make in list(networks_of_buffers.BUFFERS.items())[::3]:
        yield f"buffer {name}", lambda make=make: (make(), (torch.randn(3, networks_of_buffers.WIDTH),), {})
    for name, case in networks_of_calls.CASES.items():
        if isinstance(case.args, tuple):
            yield f"call of {name}", lambda case=case: (case.build(False), case.args, case.kwargs or {})
    for name, case in list(CASES.items())[::6]:
        yield name, lambda case=case: (case.build(), tuple(case.inputs()), {})


NETWORKS = dict(_networks())
# Their class is made by torch for each module, or they have functions that are local.
NOT_PICKLED = {"a parametrisation", "hooks"}


def traced(name: str) -> tuple[fx.GraphModule, Callable[[fx.GraphModule], Any]]:
    torch.manual_seed(0)
    model, args, kwargs = NETWORKS[name]()
    args, kwargs = pytree.tree_map(_double, (args, kwargs))
    gm = fxwidth.trace(model.double(), args, kwargs or None)
    return gm, lambda module: module(*copy.deepcopy(args), **copy.deepcopy(kwargs))


def through_torch(gm: fx.GraphModule) -> fx.GraphModule:
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_file(gm: fx.GraphModule, folder: Path) -> fx.GraphModule:
    fxwidth.save(gm, folder / "a.pt")
    return fxwidth.load(folder / "a.pt", trusted=True)


def copies(gm: fx.GraphModule, folder: Path, name: str) -> Iterator[tuple[str, fx.GraphModule]]:
    yield "deepcopy", copy.deepcopy(gm)
    yield "deepcopy twice", copy.deepcopy(copy.deepcopy(gm))
    if name not in NOT_PICKLED:
        yield "save and load", through_file(gm, folder)
        yield "pickle", pickle.loads(pickle.dumps(gm))
        yield "torch.save", through_torch(copy.deepcopy(gm))


def described(module: nn.Module) -> list[Any]:
    """Return the nodes of all graphs of a module, and its state: names, order, what is saved, attributes of layers."""
    found: list[Any] = []
    for path, part in module.named_modules():
        found.append((path, type(part).__name__, part.training, sorted(part._non_persistent_buffers_set)))
        found.append([*part._parameters, *part._buffers, *part._modules])
        if isinstance(part, fx.GraphModule):
            found.append(part.code)
            found += [(n.op, n.target, repr(n.args), repr(n.kwargs), n.name, shape_of(n)) for n in part.graph.nodes]
        else:
            found.append(part.extra_repr())
    return found


def shape_of(node: fx.Node) -> Any:
    """Return the recorded shape of a node; that of a part may be of symbols, which no file holds."""
    known = node.meta.get("tensor_meta")
    return known if known is not None and all(type(size) is int for size in known.shape) else None


def tensors(module: nn.Module) -> dict[str, Tensor]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def runs(gm: fx.GraphModule, call: Callable[[fx.GraphModule], Any]) -> Iterator[dict[str, Tensor]]:
    """Yield what two calls in each mode return, and the state behind each; every call draws other numbers."""
    for i, mode in enumerate([False, False, True, True]):
        gm.train(mode)
        torch.manual_seed(i)
        random.seed(i)
        with torch.no_grad():
            results = deep_tensors(call(gm))
        yield {f"result {k}": result.clone() for k, result in enumerate(results)} | tensors(gm)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def assert_same(gm: fx.GraphModule, call: Callable[[fx.GraphModule], Any], others: dict[str, fx.GraphModule]) -> None:
    told = described(gm)
    for way, other in others.items():
        assert described(other) == told, way
        assert list(other.state_dict()) == list(gm.state_dict()), way
    expected = list(runs(gm, call))
    for way, other in others.items():
        for i, (found, wanted) in enumerate(zip(runs(other, call), expected, strict=True)):
            assert found.keys() == wanted.keys(), way
            assert not [key for key in wanted if not same(found[key], wanted[key])], f"{way}, call {i}"


@pytest.mark.filterwarnings("ignore:The graph of")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_is_the_same_graph(name: str, tmp_path: Path) -> None:
    gm, call = traced(name)
    assert_same(gm, call, dict(copies(gm, tmp_path, name)))


STOCK = {"_reduced": fx.GraphModule.__reduce__, "_deepcopied": fx.GraphModule.__deepcopy__}


@pytest.mark.parametrize("method", STOCK)
@pytest.mark.parametrize("name", ["constant noise, leaves", "dropout by number, export", "buffer clamped"])
def test_without_our_methods_a_copy_would_be_another(name: str, method: str, tmp_path: Path) -> None:
    """Planted fault: torch's own pickling and copying."""
    with patch.object(graph_pickling, method, STOCK[method]):
        gm, call = traced(name)
        with pytest.raises((AssertionError, fx.proxy.TraceError)):
            assert_same(gm, call, dict(copies(gm, tmp_path, name)))


class Local(nn.Module):
    """Two layers, to be traced with something between them that pickle cannot write."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def with_local_function() -> fx.GraphModule:
    gm = fxwidth.trace(Local(), torch.randn(2, 6))
    node = next(iter(gm.graph.find_nodes(op="call_function", target=torch.relu)))
    node.target = lambda x: x * 2
    gm.recompile()
    return gm


def with_local_hook() -> fx.GraphModule:
    model = Local()
    model.up.register_forward_hook(lambda part, args, result: result * 2)
    return fxwidth.trace(model, torch.randn(2, 6))


def with_local_class() -> fx.GraphModule:
    class Doubled(nn.Linear):
        pass

    model = Local()
    model.up = Doubled(6, 8)
    gm = fxwidth.trace(model, torch.randn(2, 6))
    gm.add_module("spare", model.up)
    return gm


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (with_local_function, r"what the node 'relu' calls, <function with_local_function.*>,"),
        (with_local_hook, r"the attribute '_forward_hooks' of 'up'"),
        (with_local_class, r"the class with_local_class\.<locals>\.Doubled of 'spare'"),
    ],
)
def test_what_pickle_cannot_write_is_named(make: Callable[[], fx.GraphModule], told: str, tmp_path: Path) -> None:
    gm = make()
    with pytest.raises(FxwidthError, match=told + r" cannot be pickled; define it at the top of a module"):
        fxwidth.save(gm, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
    copied, x = copy.deepcopy(gm), torch.randn(3, 6)
    assert torch.equal(copied(x), gm(x))


@torch.library.custom_op("fxwidth_test_copies::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_that_is_not_there_is_named() -> None:
    gm = with_local_function()
    node = next(node for node in gm.graph.nodes if node.name == "relu")
    node.target = torch.ops.fxwidth_test_copies.twice.default
    gm.recompile()
    data = graph_data.data_of(gm.graph)
    assert graph_data.graph_of(data).find_nodes(op="call_function", target=node.target)
    lost = [
        replace(entry, target=graph_data.Named("torch.ops.fxwidth_test_copies.lost.default"))
        if entry.name == "relu"
        else entry
        for entry in data.nodes
    ]
    with pytest.raises(FxwidthError, match=r"calls torch\.ops\.fxwidth_test_copies\.lost\.default, .* import"):
        graph_data.graph_of(replace(data, nodes=tuple(lost)))


class Keeping(Local):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[Tensor]] = {}
        self.up.register_forward_hook(self.keep)
        self.up.register_forward_hook(keep_last)

    def keep(self, part: nn.Module, args: Any, result: Tensor) -> None:
        self.kept["up"] = [result]


def keep_last(part: nn.Module, args: Any, result: Tensor) -> None:
    part.last = result


def test_a_copy_leaves_out_how_tensors_were_computed() -> None:
    """Hooks have stored what a layer has computed, in an attribute of it, and in the model that they belong to."""
    model = Keeping()
    gm = fxwidth.trace(model, torch.randn(2, 6))
    gm(torch.randn(2, 6))
    assert not model.up.last.is_leaf
    assert not model.kept["up"][0].is_leaf
    copied = copy.deepcopy(gm)
    assert copied.up.last.is_leaf
    assert torch.equal(copied.up.last, model.up.last)
    x = torch.randn(3, 6)
    assert torch.equal(copied(x), gm(x))
    assert copied.up.last is not gm.up.last
    copied = copy.deepcopy(gm)
    with torch.no_grad():
        copied.up.last.zero_()
    assert model.up.last.all()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm)), through_torch])
def test_a_graph_that_is_compiled_is_copied_as_it_is(way: Callable[[fx.GraphModule], fx.GraphModule]) -> None:
    gm, x = fxwidth.trace(Local(), torch.randn(2, 6)), torch.randn(3, 6)
    gm.compile(backend="eager")
    expected = gm(x)
    copied = way(gm)
    torch.testing.assert_close(copied(x), expected)
    with torch.no_grad():
        copied.down.weight.zero_()
    # What it was compiled to is of the weights that it had.
    torch.testing.assert_close(copied(x), copied.down.bias.expand(3, 3))
    torch.testing.assert_close(gm(x), expected)


# -- how code is written -----------------------------------------------------------------------------------------------


@fx.wrap
def halved(x: Tensor) -> Tensor:
    """Return half of something; a node for every tracer."""
    return x / 2


class Annotated(Local):
    def forward(self, x: Tensor) -> Tensor:
        return halved(super().forward(x))


class OfDict(Local):
    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": super().forward(inputs["x"])}


class Negated(Local):
    def forward(self, input: Tensor, max: int = 2) -> Tensor:  # noqa: A002 - the names of builtins
        return super().forward(input) * max


def with_changed_code() -> fx.Graph:
    graph = fx.symbolic_trace(Local()).graph
    graph.on_generate_code(lambda _: after_the_signature)
    return graph


def after_the_signature(body: list[str]) -> list[str]:
    return ["print('called')\n", *body]


WRITTEN: dict[str, Callable[[], fx.Graph]] = {
    "usual": lambda: fx.symbolic_trace(Local()).graph,
    "a function that is wrapped": lambda: fx.symbolic_trace(Annotated()).graph,
    "inputs in a container": lambda: fx.symbolic_trace(OfDict(), {"inputs": {"x": fx.PH}}).graph,
    "exported, from a container": lambda: (
        torch.export.export(OfDict(), ({"x": torch.randn(2, 6)},)).module(check_guards=False).graph
    ),
    "names of builtins": lambda: fx.symbolic_trace(Negated()).graph,
    "exported, names of builtins": lambda: torch.export.export(Negated(), (torch.randn(2, 6),)).graph,
    "code that is changed": with_changed_code,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_graph_generates_the_code_that_it_did_by_the_same_names(name: str) -> None:
    graph = WRITTEN[name]()
    data = pickle.loads(pickle.dumps(graph_data.data_of(graph)))
    copied = graph_data.graph_of(data)
    assert copied.python_code("self").src == graph.python_code("self").src
    assert [node.name for node in copied.nodes] == [node.name for node in graph.nodes]


def test_it_is_of_its_own() -> None:
    """What is done to a copy is not done to what it was made of, and its nodes can be added to."""
    gm, call = traced("noise, export")
    copied = pickle.loads(pickle.dumps(gm))
    before = described(gm)
    last = copied.graph.find_nodes(op="output")[0]
    names = {node.name for node in copied.graph.nodes}
    with copied.graph.inserting_before(last):
        for _ in range(3):
            node = copied.graph.call_function(torch.ops.aten.relu.default, (last.args[0],))
            assert node.name not in names
            names.add(node.name)
    copied.graph.lint()
    copied.recompile()
    call(copied)
    assert described(gm) == before
