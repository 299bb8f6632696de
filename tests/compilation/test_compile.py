"""A compiled graph is the graph as it is at present, whatever has been resized since, and never falls back to eager."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from tests.compilation.networks import Normed, convolutional, images


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def traced(model: nn.Module | None = None, x: Tensor | None = None) -> fx.GraphModule:
    model = convolutional() if model is None else model
    return fxwidth.trace(model.double(), images() if x is None else x)


def stepped(gm: fx.GraphModule, call: Any, x: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = call(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def evolving(compiles: bool, rounds: int) -> tuple[list[Tensor], fx.GraphModule, Any]:
    """Train with a resize at each step, eagerly or compiled."""
    torch.manual_seed(0)
    gm = traced()
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    evolver = fxwidth.Evolver(gm, optimizer, every=1, params=0.5, rounds=2, stop=rounds, breath=1.5)
    call = fxwidth.compile(gm, backend="aot_eager") if compiles else gm
    losses = []
    for _ in range(rounds + 1):
        x = images()
        losses.append(stepped(gm, call, x, optimizer))
        evolver.step(x)
    return losses, gm, call


def test_training_that_evolves_is_that_of_the_graph_itself() -> None:
    eager, gm, _ = evolving(False, 4)
    losses, other, compiled = evolving(True, 4)
    assert len({tuple(p.shape for p in one.parameters()) for one in (gm, other)}) == 1
    torch.testing.assert_close(losses, eager, rtol=1e-10, atol=1e-12)
    for own, same in zip(other.state_dict().values(), gm.state_dict().values(), strict=True):
        torch.testing.assert_close(own, same, rtol=1e-8, atol=1e-10)
    assert compiled.graphs == compiled.networks > 2


def test_widths_that_come_back_are_run_by_the_code_that_is_there() -> None:
    gm = traced()
    optimizer = torch.optim.AdamW(gm.parameters())
    compiled = fxwidth.compile(gm, backend="aot_eager")
    for width in (8, 6, 4, 8, 6, 4, 8, 6, 4):
        gm = fxwidth.resize(gm, {"0": width}, optimizer=optimizer)
        x = images()
        torch.testing.assert_close(compiled(x), copy.deepcopy(gm)(x), rtol=1e-12, atol=1e-12)
        stepped(gm, compiled, x, optimizer)
    assert (compiled.networks, compiled.graphs) == (3, 3)
    assert repr(compiled) == "<CompiledGraph of 3 networks in 3 graphs by 'aot_eager'>"


@pytest.fixture
def few_versions() -> Iterator[int]:
    """Have torch keep two versions of a function."""
    with torch._dynamo.config.patch(recompile_limit=2):
        yield 2


def test_more_networks_than_torch_keeps_versions_of_a_function(few_versions: int) -> None:
    gm = fxwidth.trace(nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 2)), torch.randn(2, 4))
    compiled = fxwidth.compile(gm, backend="eager")
    many = few_versions + 3
    for width in range(40, 40 - many, -1):
        gm = fxwidth.resize(gm, {"0": width}, selection="magnitude", fold=False)
        assert torch.equal(compiled(torch.ones(2, 4)), gm(torch.ones(2, 4)))
    assert (compiled.networks, compiled.graphs) == (many, many)


def test_more_kinds_of_inputs_than_torch_keeps_versions_of(few_versions: int) -> None:
    gm = fxwidth.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    compiled = fxwidth.compile(gm, backend="eager", dynamic=False)
    for batch in range(1, few_versions + 4):
        x = torch.randn(batch, 4)
        assert torch.equal(compiled(x), gm(x))
    assert compiled.networks == 1


def test_code_of_networks_used_long_ago_is_let_go() -> None:
    gm = fxwidth.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    compiled = fxwidth.compile(gm, backend="eager", cache_size=2)
    x = torch.ones(2, 4)
    compiled(x)
    first = weakref.ref(next(iter(compiled._known.values())).function)
    for width in (7, 6):
        gm = fxwidth.resize(gm, {"0": width})
        compiled(x)
    gc.collect()
    assert first() is None
    fxwidth.resize(gm, {"0": 7})
    compiled(x)
    assert compiled.graphs == 3  # still there
    fxwidth.resize(gm, {"0": 8})
    compiled(x)
    assert (compiled.networks, compiled.graphs) == (3, 4)  # made anew


def test_both_modes_and_another_batch_size() -> None:
    gm = traced()
    compiled = fxwidth.compile(gm, backend="aot_eager")
    for width in (8, 5):
        gm = fxwidth.resize(gm, {"0": width})
        for mode, batch in ((True, 4), (False, 4), (False, 3), (True, 6)):
            gm.train(mode)
            x = images(batch)
            copied = copy.deepcopy(gm)
            with torch.set_grad_enabled(mode):
                torch.testing.assert_close(compiled(x), copied(x), rtol=1e-12, atol=1e-12)
            for own, other in zip(gm.buffers(), copied.buffers(), strict=True):
                torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_an_eps_that_follows_the_width_is_that_of_now(few_versions: int) -> None:
    torch.manual_seed(0)
    gm = traced(Normed(), torch.randn(4, 6, dtype=torch.float64))
    compiled = fxwidth.compile(gm, backend="eager")
    eps = set()
    for width in (12, 8, 12, 8, 12, 8, 12, 8):
        gm = fxwidth.resize(gm, {"embed": width}, exact=False)
        gm.get_submodule("norm").eps *= 1.01  # as where it follows data
        eps.add(gm.get_submodule("norm").eps)
        x = 1e-2 * torch.randn(4, 6, dtype=torch.float64)
        assert torch.equal(compiled(x), gm(x))
    assert len(eps) > 2 * few_versions
    assert compiled.networks == 2


def test_new_values_and_new_parameters_are_seen() -> None:
    gm = traced()
    compiled = fxwidth.compile(gm, backend="aot_eager")
    x = images()
    compiled(x)
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.mul_(1.5)
    first = gm.get_submodule("0")
    first.weight = nn.Parameter(torch.randn_like(first.weight))
    torch.testing.assert_close(compiled(x), copy.deepcopy(gm)(x), rtol=1e-12, atol=1e-12)
    assert compiled.graphs == 1


def test_hooks_of_modules_run_and_those_of_the_graph_are_refused() -> None:
    gm = traced()
    compiled = fxwidth.compile(gm, backend="eager")
    x = images()
    before = compiled(x)
    handle = gm.get_submodule("8").register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(compiled(x), 2 * before)
    handle.remove()
    handle = gm.get_submodule("8").register_forward_hook(lambda module, inputs, output: 3 * output)
    torch.testing.assert_close(compiled(x), 3 * before)
    handle.remove()
    torch.testing.assert_close(compiled(x), before)
    handle = gm.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(FxwidthError, match=r"the graph has a hook of its own .*<lambda>, in forward_hooks"):
        compiled(x)
    handle.remove()
    torch.testing.assert_close(compiled(x), before)


def test_dropout_of_another_p_and_a_layer_that_is_replaced_are_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(1.0), nn.Linear(8, 2))
    gm = fxwidth.trace(model, torch.randn(2, 4))
    compiled = fxwidth.compile(gm, backend="eager")
    x = torch.ones(2, 4)
    assert torch.equal(compiled(x), gm.get_submodule("2").bias.expand(2, 2))
    gm.get_submodule("1").p = 0.0
    assert torch.equal(compiled(x), gm(x))
    gm.add_module("2", nn.Linear(8, 2, bias=False))
    assert torch.equal(compiled(x), gm(x))


def test_a_graph_with_structured_inputs_and_outputs() -> None:
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, pair: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
            hidden = self.a(pair["x"] + pair["y"]).relu()
            return {"hidden": hidden.sum(1), "out": scale * self.b(hidden)}

    pair = {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}
    gm = fxwidth.trace(Structured(), (pair,))
    compiled = fxwidth.compile(gm, backend="eager")
    gm = fxwidth.resize(gm, {"a": 5})
    found, wanted = compiled(pair), gm(pair)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert compiled.graphs == 1


def breaking(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x.relu()


fx.wrap("breaking")


def test_a_graph_that_cannot_be_compiled_as_a_whole_is_told() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return breaking(self.a(x))

    gm, x = fx.symbolic_trace(Net()), torch.ones(2, 4)
    with torch.no_grad(), pytest.raises(FxwidthError, match=r"cannot take the graph as a whole.*fullgraph=False"):
        fxwidth.compile(gm, backend="eager")(x)
    with torch.no_grad():
        assert torch.equal(fxwidth.compile(gm, backend="eager", fullgraph=False)(x), gm(x))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda gm: fxwidth.compile(nn.Linear(2, 2)), "GraphModule, but received Linear; call fxwidth.trace"),
        (lambda gm: fxwidth.compile(torch.compile(gm)), "received a compiled module"),
        (lambda gm: fxwidth.compile(3), "received int"),
        (lambda gm: fxwidth.compile(gm, backend="inductr"), "backend='inductr' is no backend of torch.compile; "),
        (lambda gm: fxwidth.compile(gm, backend=3), "backend=3 must be the name of a backend"),
        (lambda gm: fxwidth.compile(gm, cache_size=0), "cache_size=0 must be an integer of at least 1"),
        (lambda gm: fxwidth.compile(gm, mode="nope"), "does not take mode='nope': Unrecognized mode=nope"),
        (lambda gm: fxwidth.compile(gm, options={"nope": 1}), "does not take options={'nope': 1}: Unexpected optimiz"),
        (lambda gm: fxwidth.compile(gm, align=8), "align= is no option of torch.compile; .*give align= to the Evolver"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(make: Any, told: str) -> None:
    gm = fxwidth.trace(nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4))
    with pytest.raises(FxwidthError, match=told):
        make(gm)


def test_a_forward_put_over_that_of_the_graph_is_refused() -> None:
    gm = fxwidth.trace(nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4))
    compiled = fxwidth.compile(gm, backend="eager")
    gm.forward = lambda x: x
    with pytest.raises(FxwidthError, match="a forward put over its own"):
        compiled(torch.ones(2, 4))


def test_modes_and_options_reach_the_backend() -> None:
    seen = []

    def backend(module: fx.GraphModule, inputs: Any, **given: Any) -> Any:
        seen.append(given)
        return module.forward

    gm = fxwidth.trace(nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4))
    fxwidth.compile(gm, backend=backend)(torch.ones(2, 4))
    fxwidth.compile(gm, backend=backend, options={"a": 1})(torch.ones(2, 4))
    assert seen == [{}, {"options": {"a": 1}}]


@pytest.mark.slow
def test_inductor() -> None:
    gm = traced()
    optimizer = torch.optim.AdamW(gm.parameters())
    for options in ({}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue-fusion": False}}):
        compiled = fxwidth.compile(gm, **options)
        for width in (8, 6, 8):
            gm = fxwidth.resize(gm, {"0": width}, optimizer=optimizer)
            x = images()
            torch.testing.assert_close(compiled(x), copy.deepcopy(gm)(x), rtol=1e-9, atol=1e-9)
            stepped(gm, compiled, x, optimizer)
        assert (compiled.networks, compiled.graphs) == (2, 2)
