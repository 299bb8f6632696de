"""Assignments with an operator write to tensors: whoever shares these sees it, in the graph as in the model."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.frontends.in_place import IN_PLACE, written_attribute
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import ROUNDING, randomise

INPUTS, WIDTH, OUT = 6, 8, 3
REALS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
MASKS = ("iand", "ior", "ixor")
Body = Callable[[nn.Module, Tensor, Callable[[Any, Any], Any]], Tensor]


def another_name(_: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    name = h
    h = write(h, 2)
    return name + h.relu()


def list_element(_: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    kept = [h, h.relu()]
    h = write(h, 2)
    return kept[0] + kept[1] + h


def view_before(_: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    part = h[:, 2:]
    h = write(h, 2)
    return h.sin() + part.sum(1, keepdim=True)


def write_to_a_view(_: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    write(h.view(-1, 2, WIDTH // 2), 2)
    return h


def result_is_not_used(_: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    write(h, 2)
    return h * 2


def twice(_: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    name = h
    h = write(h, 2)
    h = write(h, 3)
    return name


def shortcut(net: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    name = h.sin()
    out = net.second(name).exp()
    out = write(out, name.square() + 1)
    return out.sin()


def number(_: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    size = h.shape[1]
    other = size
    other = write(other, 3)
    return h / size + other


def size_of_a_parameter(net: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    size = net.into.weight.shape[1]
    size = write(size, 3)
    return h * size


def made_anew(_: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    new = h.new_ones(h.shape[0], WIDTH)
    return write(new, h.square() + 1)


def of_a_parameter(net: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    table = net.into.bias.expand(h.shape[0], WIDTH).exp()
    table = write(table, h.square() + 1)
    return table.sin()


def of_a_buffer(net: nn.Module, h: Tensor, write: Callable[[Any, Any], Any]) -> Tensor:
    net.buffer = write(net.buffer, 2)
    return h + net.buffer


BODIES: dict[str, Body] = {
    function.__name__: function
    for function in (
        another_name, list_element, view_before, write_to_a_view, result_is_not_used, twice, shortcut, number,
        size_of_a_parameter, made_anew, of_a_parameter, of_a_buffer,
    )
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, body: Body, name: str) -> None:
        super().__init__()
        self.into, self.second, self.out = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUT)
        self.register_buffer("buffer", torch.ones(WIDTH))
        self.body, self.write = body, getattr(operator, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self, self.into(x), self.write))


class Masked(nn.Module):
    """The same for masks."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.into, self.out, self.write = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, OUT), getattr(operator, name)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        mask = h > 0
        shared = mask
        mask = self.write(mask, h < 1)
        return self.out(torch.where(shared, h, -2 * h) + mask)


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what two calls in a row give, the second of which sees what the first has left."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        return [module(x.clone()), module(x.clone()), *(buffer.clone() for buffer in module.buffers())]


def assert_same(module: nn.Module, expected: nn.Module) -> None:
    for count in (5, 7, 1):
        assert largest_difference(run(module, rows(count)), run(expected, rows(count))) < ROUNDING


def check(model: nn.Module) -> fx.GraphModule:
    model = randomise(model).double().eval()
    gm = fxwidth.trace(model, rows())
    for module in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), fxwidth.trace(gm, rows())):
        assert_same(module, model)
    alive = copy.deepcopy(gm)
    alive.graph.eliminate_dead_code()
    alive.recompile()
    assert_same(alive, model)
    free = fxwidth.analyze(gm).free
    fxwidth.resize(gm, {group.name: group.width + 2 for group in free if group.inexact_growth is None})
    assert_same(gm, model)
    return gm


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", [name for name in REALS if name != "imatmul"])
def test_writes_are_seen_by_all_names(name: str, body: str) -> None:
    check(Net(BODIES[body], name))


@pytest.mark.parametrize("name", MASKS)
def test_masks_too(name: str) -> None:
    check(Masked(name))


def test_all_operators_are_there() -> None:
    names = {name for name in dir(operator) if hasattr(operator, name[1:]) or hasattr(operator, f"{name[1:]}_")}
    names = {name for name in names if name.startswith("i") and hasattr(Tensor, f"__{name}__")}
    assert names <= IN_PLACE.keys()
    # Of this one, tensors have none: it makes a new one.
    assert not hasattr(Tensor, "__imatmul__")


@pytest.mark.parametrize(
    "write",
    [
        operator.iadd,
        lambda new, h: new.add_(h),
        lambda new, h: new.view(-1).add_(h.reshape(-1)),
        lambda new, h: new.__setitem__(slice(0, 2), h[:2]),
        lambda new, h: torch.add(h, h, out=new),
        lambda new, h: operator.iadd(new[:2], h[:2]),
        lambda new, h: new.expand(h.shape).add_(h),
    ],
)
def test_memory_made_in_forward_is_made_at_every_call(write: Callable[[Tensor, Tensor], Any]) -> None:
    class Accumulating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, OUT)

        def forward(self, x: Tensor) -> Tensor:
            new = torch.ones(5, WIDTH, dtype=torch.float64)
            write(new, self.into(x))
            return self.out(new)

    model = randomise(Accumulating()).double().eval()
    gm = fxwidth.trace(model, rows())
    assert largest_difference(run(gm, rows()), run(model, rows())) < ROUNDING


def test_inputs_and_data_are_left_as_they_were() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, OUT)

        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return self.out(self.into(x))

    model, x, data = randomise(Writing()).double().eval(), rows(), [rows(32), rows(16)]
    given = [x.clone(), *(batch.clone() for batch in data)]
    gm = fxwidth.trace(model, x)
    wg = fxwidth.analyze(gm)
    fxwidth.plan(wg, params=0.8, data=data)
    fxwidth.plan(wg, params=0.8, data=[(batch, batch[:, :OUT]) for batch in data], loss=nn.functional.mse_loss)
    fxwidth.resize(gm, {"into": 4}, data=data)
    assert all(torch.equal(*pair) for pair in zip(given, [x, *data], strict=True))


def test_what_a_node_writes_to() -> None:
    graph = fx.Graph()
    held, x = graph.get_attr("held"), graph.placeholder("x")
    view = graph.call_method("view", (held, -1))
    assert written_attribute(graph.call_function(IN_PLACE["iadd"], (view, x))) == "held"
    assert written_attribute(graph.call_method("add", (view, x))) is None
    assert written_attribute(graph.call_method("add_", (graph.call_method("clone", (held,)), x))) is None
    assert written_attribute(graph.call_function(torch.add, (x, x), {"out": held})) == "held"


def test_copies_of_channels_go_without_a_trace_behind_shared_writes() -> None:
    """Half of the channels are copies: dropped, by directions too, they change nothing."""
    for body in ("another_name", "list_element", "twice", "of_a_parameter"):
        for act in (torch.sin, lambda h: h):
            model = randomise(Net(lambda net, h, write, b=body, a=act: BODIES[b](net, a(h), write), "iadd")).double()
            with torch.no_grad():
                for tensor in (model.into.weight, model.into.bias):
                    tensor[WIDTH // 2 :] = tensor[: WIDTH // 2].clone()
            gm = fxwidth.trace(model.eval(), rows())
            before = run(gm, rows(7))[0]
            fxwidth.resize(gm, {"into": WIDTH // 2}, data=[rows(64)])
            assert largest_difference([run(gm, rows(7))[0]], [before]) < 1e-7, body
