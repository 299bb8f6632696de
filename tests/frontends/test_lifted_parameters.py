"""Graphs whose parameters are inputs: they are put back in, by what is fed and by name, and all else stays an input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import fxwidth
from fxwidth import FxwidthError
from fxwidth.frontends.lifted_parameters import _path
from tests.compilation.networks import evaluated, images


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def captured(model: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Return what dynamo makes of a model, and what it feeds that with."""
    found: list[Any] = []

    def backend(module: fx.GraphModule, given: list[Any]) -> Any:
        found.append((module, tuple(given)))
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    ((module, given),) = found
    return module, given


def test_a_graph_of_dynamo_is_resized_as_the_model() -> None:
    model, x = evaluated(), images()
    module, given = captured(model, x)
    gm = fxwidth.trace(module, given)
    assert [node.target for node in gm.graph.find_nodes(op="placeholder")] == ["L_args_0_"]
    assert gm.state_dict().keys() == {name for name in model.state_dict() if "num_batches" not in name}
    with torch.no_grad():
        assert torch.equal(gm(x)[0], model(x))
    own, other = fxwidth.analyze(gm), fxwidth.analyze(fxwidth.trace(copy.deepcopy(model), x))
    assert [(one.name, one.width, bool(one.pinned)) for one in own.groups] == [
        (one.name, one.width, bool(one.pinned)) for one in other.groups
    ]
    data = [images(500)]
    evolved = fxwidth.evolve(module, given, params=0.5, data=data)
    wanted = fxwidth.evolve(copy.deepcopy(model), x, params=0.5, data=data)
    for batch in (4, 3):
        x = images(batch)
        torch.testing.assert_close(evolved(x)[0], wanted(x), rtol=1e-9, atol=1e-9)


def test_the_model_and_the_graph_stay_as_they_were() -> None:
    model, x = evaluated(), images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module, given = captured(model, x)
    code = module.code
    gm = fxwidth.evolve(module, given, params=0.4, selection="magnitude", fold=False)
    assert module.code == code
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert own.isdisjoint(map(id, (*gm.parameters(), *gm.buffers())))
    assert {parameter.requires_grad for parameter in gm.parameters()} == {True}


def made(model: nn.Module, x: Tensor, buffers: Any = nn.Buffer) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Return a graph of make_fx, which takes parameters and buffers in a dict."""
    tensors = dict(model.named_parameters()) | {name: buffers(one) for name, one in model.named_buffers()}
    given = (tensors, x)
    return make_fx(lambda weights, x: {"y": functional_call(model, weights, (x,))})(*given), given


def test_a_graph_of_make_fx_takes_what_is_left_and_returns_what_it_did() -> None:
    model, x = evaluated(), images()
    module, given = made(model, x)
    gm = fxwidth.evolve(module, given, params=0.5)
    assert sum(p.numel() for p in gm.parameters()) <= 0.5 * sum(p.numel() for p in model.parameters())
    assert gm(x).keys() == {"y"}
    assert gm(images(7))["y"].shape == (7, 5)  # the graph had the batch as a number
    parameters = [name for name, _ in gm.named_parameters()]
    assert all(name.startswith("p_") for name in parameters), parameters


def test_buffers_that_nothing_tells_stay_inputs_and_pin_what_meets_them() -> None:
    model, x = evaluated(), images()
    module, given = made(model, x, buffers=lambda tensor: tensor)
    gm = fxwidth.trace(module, given)
    left = len(gm.graph.find_nodes(op="placeholder"))
    assert left == 1 + len(list(model.buffers()))
    assert not fxwidth.analyze(gm).free
    buffers = list(model.buffers())
    with torch.no_grad():
        torch.testing.assert_close(gm(*buffers, x)["y"], model(x))


def test_a_parameter_that_is_fed_twice_is_one() -> None:
    weight, x = nn.Parameter(torch.randn(6, 6)), torch.randn(3, 6)

    def forward(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return (x @ a).relu() @ b

    gm = fxwidth.trace(make_fx(forward)(weight, weight, x), (weight, weight, x))
    assert len(list(gm.parameters())) == 1
    assert torch.equal(gm(x), forward(weight, weight, x))


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("L_self_modules_layer1_modules_0_modules_conv1_parameters_weight_", "layer1.0.conv1.weight"),
        ("l_self_modules_layer1_modules_0_modules_bn1_buffers_running_mean_", "layer1.0.bn1.running_mean"),
        ("L_fn_modules_0_parameters_weight_", "0.weight"),
        ("L__self___modules_conv1_parameters_weight_", "conv1.weight"),
        ("L_self_parameters_class_token_", "class_token"),
        ("L_self_modules_block_modules_self_attn_parameters_in_proj_weight_", "block.self_attn.in_proj_weight"),
        ("primals_1", "p_primals_1"),
        ("p_conv1_weight", "p_conv1_weight"),
        ("arg0_1", "p_arg0_1"),
    ],
)
def test_names(target: str, path: str) -> None:
    assert _path(target) == path


def test_names_that_graphs_have_for_something_else() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph, self.code = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.code(self.graph(x).relu())

    model, x = Odd(), torch.randn(3, 4)
    gm = fxwidth.trace(*captured(model, x))
    assert {name for name, _ in gm.named_parameters()} == {
        "p_graph.weight", "p_graph.bias", "p_code.weight", "p_code.bias",
    }  # fmt: skip
    assert torch.equal(gm(x)[0], model(x))


def test_a_graph_in_which_nothing_is_a_parameter() -> None:
    module, given = captured(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4))
    plain = tuple(value.detach() for value in given)
    gm = fxwidth.trace(module, plain)  # as any function of tensors
    told = r"nothing in the graph is a parameter.*\(L_.*\).*nn.Parameters themselves.*compile_backend"
    with pytest.raises(FxwidthError, match=told):
        fxwidth.analyze(gm)
    with pytest.raises(FxwidthError, match=told):
        fxwidth.evolve(module, plain, params=0.5)
    with pytest.raises(FxwidthError, match=told):
        fxwidth.analyze(module, given)  # the graph holds none, whatever it is fed


def test_a_graph_of_one_input_without_parameters_is_traced() -> None:
    gm = fxwidth.trace(fx.symbolic_trace(nn.ReLU()), torch.randn(2, 3))
    assert torch.equal(gm(-torch.ones(2, 3)), torch.zeros(2, 3))


def test_an_optimizer_of_the_model_and_fake_parameters_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    module, given = captured(model, torch.randn(3, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FxwidthError, match=r"made for another model, such as a copy. Make it for gm.parameters\(\)"):
        fxwidth.evolve(module, given, params=0.5, optimizer=optimizer)
    mode = torch._subclasses.FakeTensorMode()
    with pytest.raises(FxwidthError, match=r"is fed a fake tensor for the parameter '0.weight'"):
        fxwidth.trace(module, tuple(mode.from_tensor(value) for value in given))
