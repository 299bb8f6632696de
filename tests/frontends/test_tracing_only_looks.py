"""What traces, analyses and plans leaves the model as it was, and the graph does to its state what the model does."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

import fxwidth
from fxwidth import FxwidthError
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.frontends.call_signature import arguments_of, call_of
from fxwidth.frontends.export import exported_graph
from fxwidth.frontends.symbolic import graph_with_leaves, symbolic_graph
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.verification.replay_oracle import largest_difference, reference_outputs
from tests.oracles.judges import ROUNDING, halved_exactly, randomise, removals
from tests.oracles.untouched import differences, snapshot, untouched
from tests.zoo.models import SMALL, build
from tests.zoo.networks_of_buffers import (
    BUFFERS,
    HIDDEN,
    OUT,
    WIDTH,
    OwnNorm,
    OwnNormWithoutGradients,
    Restless,
    normed,
)
from tests.zoo.networks_of_odd_forms import FORMS
from tests.zoo.networks_of_values import Counting, WithPart

# By an assignment to `.data`, which no op tells of.
REFUSED = {"new_data"}
by_buffer = pytest.mark.parametrize("name", sorted(BUFFERS.keys() - REFUSED))
FRONT_ENDS: dict[str, Callable[[nn.Module, Any], fx.GraphModule]] = {
    "symbolic": symbolic_graph,
    "symbolic, numbers fixed": lambda model, arguments: symbolic_graph(model, arguments, live_numbers=False),
    "export": lambda model, arguments: exported_graph(model, arguments, torch.device("cpu")),
    "leaves": lambda model, arguments: graph_with_leaves(model, arguments, []),
}


def rows(count: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name: str) -> nn.Module:
    model = randomise(BUFFERS[name]()).double()
    model.plain, model.listed = model.plain.double(), [model.listed[0].double()]
    return model


# -- the model -------------------------------------------------------------------------------------------------------


def assert_untouched_by_front_ends(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Check that each front end leaves a model as it was, in both modes, whether it succeeds; return how often."""
    arguments = arguments_of(model, call_of(args, kwargs))
    succeeded = 0
    for mode in (False, True):
        model.train(mode)
        for name, front_end in FRONT_ENDS.items():
            before = snapshot(model, args, kwargs)
            try:
                front_end(model, arguments)
                succeeded += 1
            except Exception:  # then another front end is asked
                pass
            assert not differences(before, snapshot(model, args, kwargs)), name
    return succeeded


@pytest.mark.parametrize("name", BUFFERS)
def test_front_ends_leave_buffers_as_they_were(name: str) -> None:
    assert assert_untouched_by_front_ends(made(name), (rows(),), {}) >= 2


@pytest.mark.parametrize("name", FORMS)
def test_front_ends_leave_odd_models_as_they_were(name: str) -> None:
    assert assert_untouched_by_front_ends(randomise(FORMS[name][0]()).double(), *FORMS[name][1](4)) >= 2


@pytest.mark.parametrize("make", [Counting, WithPart])
def test_front_ends_leave_models_that_look_at_values_as_they_were(make: type[nn.Module]) -> None:
    assert assert_untouched_by_front_ends(randomise(make()).double(), (rows(),), {}) >= 2


@pytest.mark.parametrize("name", ["seed_resnet", "vit", "rms_transformer"])
def test_front_ends_leave_networks_as_they_were(name: str) -> None:
    assert name in SMALL
    model, x = build(name)
    assert assert_untouched_by_front_ends(model, (x,), {}) >= 6


@pytest.mark.parametrize("norm", [OwnNorm, OwnNormWithoutGradients, Restless])
def test_what_learns_from_a_model_leaves_it_as_it_was(norm: type[OwnNorm], tmp_path: Any) -> None:
    model = randomise(normed(norm)).double()
    x = rows(16)
    data = [(rows(16, seed), torch.zeros(16, OUT)) for seed in range(2)]
    before = snapshot(model)
    gm = fxwidth.trace(model, x)
    wg = fxwidth.analyze(gm)
    fxwidth.plan(wg, params=0.6)
    fxwidth.plan(wg, params=0.6, data=[inputs for inputs, _ in data])
    fxwidth.plan(wg, params=0.8, data=data, loss=F.mse_loss)
    fxwidth.spectrum(wg, data=data)
    fxwidth.report(gm)
    str(wg)
    fxwidth.save(gm, tmp_path / "graph.pt")
    assert not differences(before, snapshot(model))


class Drawing(nn.Module):
    """Draws from every global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x) * (1 + random.random() + np.random.rand())  # noqa: NPY002 - as models do
        return self.down(h) + torch.randn(OUT) if h.sum() < 1e9 else h


def test_random_states_are_left_as_they_were() -> None:
    model = randomise(Drawing()).double()
    x = rows()
    with untouched(model):
        wg = fxwidth.analyze(fxwidth.trace(model, x))
        fxwidth.spectrum(wg, data=[x])


# -- containers ------------------------------------------------------------------------------------------------------


class Frozen(OrderedDict[str, Any]):
    """Forbids whatever changes it."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("frozen")

    update = pop = popitem = clear = setdefault = __delitem__ = copy = _refuse  # type: ignore[assignment]


class FrozenList(list[Any]):
    """Forbids whatever changes it, but by the methods of its base class."""

    def __setitem__(self, *_: Any) -> None:
        raise TypeError("frozen")

    clear = copy = extend = insert = __setitem__  # type: ignore[assignment]


@dataclass
class Settings:
    """Fields that code writes to."""

    calls: int
    names: list[str]


class Slotted:
    """An object without a dict."""

    __slots__ = ("calls", "unset")

    def __init__(self) -> None:
        self.calls = 0


def _count(value: Any) -> None:
    value.calls += 1


def _note(value: Any) -> None:
    value.more = [1]
    del value.names


# What a model keeps, and what it does to it whenever it is called.
WRITES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "frozen": (lambda: Frozen(a=1, b=2), lambda v: OrderedDict.__setitem__(v, "c", 3)),
    "frozen, not written to": (lambda: Frozen(a=1, b=2), len),
    "order": (lambda: OrderedDict(a=1, b=2), lambda v: v.move_to_end("a")),
    "default": (lambda: defaultdict(list, a=[1]), lambda v: v["b"].append(2)),
    "nested": (lambda: {"a": [{"b": {1}}]}, lambda v: v["a"][0]["b"].add(2)),
    "in a tuple": (lambda: ([1], 2), lambda v: v[0].append(2)),
    "frozen list": (lambda: FrozenList([1, 2]), lambda v: v.append(3)),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda v: v.append(3)),
    "set": (lambda: {1, 2}, lambda v: v.discard(1)),
    "namespace": (lambda: SimpleNamespace(calls=0, inner=SimpleNamespace(calls=0)), lambda v: _count(v.inner)),
    "dataclass": (lambda: Settings(0, ["a"]), _count),
    "attributes come and go": (lambda: Settings(0, ["a"]), _note),
    "slots": (Slotted, _count),
}


class Keeping(nn.Module):
    """Writes to what it keeps, in a form that symbolic tracing can follow, or cannot."""

    total: list[int] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, kept: Any, write: Callable[[Any], Any], looks: bool) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(WIDTH, HIDDEN), nn.Dropout(0.1), nn.Linear(HIDDEN, OUT)
        self.config, self.write, self.looks = kept, write, looks

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.config)
        self.total.append(1)
        self.drop.p = 0.2
        h = self.drop(self.up(x))
        if self.looks:
            assert h.sum() < 1e9
        return self.down(h)


@pytest.mark.parametrize(
    ("name", "looks"),
    [
        *((name, False) for name in WRITES),
        # An export is watched as the other ways are.
        *(pytest.param(name, True, marks=() if name in ("frozen", "slots") else pytest.mark.slow) for name in WRITES),
    ],
)
def test_containers_are_put_back_as_they_were(name: str, looks: bool) -> None:
    make, write = WRITES[name]
    model = Keeping(make(), write, looks).double()
    x = rows()
    with untouched(model):
        wg = fxwidth.analyze(fxwidth.trace(model, x))
        fxwidth.spectrum(wg, data=[x])


class Writing(nn.Module):
    """Writes to a plain tensor what it knows without its input."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(1.0)
        OUTSIDE.mul_(2.0)
        return x * self.total.sum()


OUTSIDE = torch.ones(2)


def test_plain_tensors_that_a_called_part_writes_to_keep_their_values() -> None:
    root = nn.ModuleDict({"up": nn.Linear(WIDTH, HIDDEN), "part": Writing(), "down": nn.Linear(HIDDEN, OUT)})
    graph = fx.Graph()
    value = graph.placeholder("x")
    for name in root:
        value = graph.call_module(name, (value,))
    graph.output(value)
    gm, x = fx.GraphModule(root, graph), rows().float()
    with untouched(gm.part, OUTSIDE):
        wg = fxwidth.analyze(gm, x)
        fxwidth.cost_polynomial(wg, "activation_memory")
        fxwidth.plan(wg, params=0.7, data=[x])
        fxwidth.spectrum(wg, data=[x])
    assert OUTSIDE.tolist() == [1, 1]
    assert gm.part.total.tolist() == [0, 0, 0]


# -- the graph -------------------------------------------------------------------------------------------------------


@by_buffer
def test_the_graph_reads_and_writes_buffers_as_the_model_does(name: str) -> None:
    model = made(name).eval()
    twin = copy.deepcopy(model)
    gm = fxwidth.trace(model, rows())
    for mode in (False, True):
        gm.train(mode)
        twin.train(mode)
        for count in (5, 8):
            assert largest_difference([gm(rows(count))], [twin(rows(count))]) < ROUNDING
    for path, tensor in twin.named_buffers():
        assert torch.equal(dict(model.named_buffers())[path], tensor), path
    # And what others write to them counts.
    for one in (model, twin):
        with torch.no_grad():
            for tensor in (*one.buffers(), one.plain, one.listed[0], one.fixed):
                tensor.mul_(0.7).add_(0.4)  # ones too become others
    assert largest_difference([gm(rows())], [twin(rows())]) < ROUNDING


@by_buffer
def test_a_state_dict_of_the_model_fits_the_graph(name: str) -> None:
    model = made(name).eval()
    gm = fxwidth.trace(model, rows())
    state = {path: torch.rand_like(tensor) for path, tensor in model.state_dict().items()}
    gm.load_state_dict(state)
    assert all(torch.equal(tensor, state[path]) for path, tensor in model.state_dict().items())
    names = {path for path, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert names <= {path for path, _ in [*gm.named_parameters(), *gm.named_buffers()]}


# They branch on values, so that everything is pinned.
BRANCHING = {"once", "chosen"}


@by_buffer
def test_halved_models_with_buffers_match_the_replay_oracle(name: str) -> None:
    gm, twin = (fxwidth.trace(made(name).eval(), rows(count)) for count in (5, 8))
    wg, other = fxwidth.analyze(gm), fxwidth.analyze(twin)
    kept = removals(wg.free, 0.5)
    by_group = {group.name: kept[group.factor] for group in wg.free}
    expected = {5: replayed(wg, by_group, 5), 8: replayed(other, by_group, 8)}
    start = {path: tensor.clone() for path, tensor in twin.state_dict().items()}
    assert by_group or name in BRANCHING, str(wg)
    halved_exactly(gm, by_group)
    fresh = {path: tensor.clone() for path, tensor in gm.named_buffers()}
    for count, wanted in expected.items():
        with torch.no_grad():
            for path, tensor in gm.named_buffers():
                tensor.copy_(fresh[path])
        assert largest_difference(deep_tensors(gm(rows(count))), wanted) < ROUNDING
    assert all(torch.equal(tensor, start[path]) for path, tensor in twin.state_dict().items())


def replayed(wg: WidthGraph, kept: dict[str, Any], count: int) -> list[Tensor]:
    maps = IndexMaps(wg.analysis.space, {wg[group].factor: channels for group, channels in kept.items()})
    return reference_outputs(wg.analysis, maps, [rows(count)])


@pytest.mark.parametrize("norm", [OwnNorm, OwnNormWithoutGradients])
def test_norms_of_ones_own_are_trained_as_the_model_is(norm: type[OwnNorm]) -> None:
    model = randomise(normed(norm)).double().train()
    twin = copy.deepcopy(model)
    assert_trained_alike(fxwidth.trace(model, rows(16)), twin)


@pytest.mark.parametrize("norm", [OwnNorm, OwnNormWithoutGradients])
def test_norms_of_ones_own_are_trained_alike_after_a_resize(norm: type[OwnNorm]) -> None:
    """Channels are taken out of a copy of the model by hand."""
    model = randomise(normed(norm)).double().train()
    twin = copy.deepcopy(model)
    gm = fxwidth.trace(model, rows(16))
    kept = np.array([1, 2, 5, 7])
    halved_exactly(gm, {fxwidth.analyze(gm).free[0].name: kept})
    for path in ("0.weight", "0.bias", "1.mean", "1.var", "1.gain", "3.weight"):
        part, _, attribute = path.rpartition(".")
        holder = twin.get_submodule(part)
        tensor = getattr(holder, attribute)
        tensor.data = tensor.data[:, kept] if path == "3.weight" else tensor.data[kept]
    assert_trained_alike(gm, twin)


def assert_trained_alike(gm: nn.Module, model: nn.Module) -> None:
    optimizers = [torch.optim.SGD(part.parameters(), 0.01) for part in (gm, model)]
    for step in range(50):
        for part, optimizer in zip((gm, model), optimizers, strict=True):
            optimizer.zero_grad()
            part(rows(16, step)).square().mean().backward()
            optimizer.step()
    own = dict(gm.state_dict())
    for path, tensor in model.state_dict().items():
        assert largest_difference([own[path]], [tensor]) < 1e-7, path
    assert int(own["1.steps"]) == 50


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_op_tells_of_is_refused(name: str) -> None:
    model = made(name)
    with (
        untouched(model),
        pytest.raises(FxwidthError, match=r"sets \.data of a tensor, which a graph does not"),
    ):
        fxwidth.trace(model, rows())


# -- names -----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Has a tensor under two names, and tensors that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.spare = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False), nn.Linear(3, 3)
        self.down.weight = nn.Parameter(self.up.weight.detach().clone())
        self.inner = nn.ParameterDict({"again": self.up.weight})
        self.register_buffer("unused", torch.ones(2))
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            torch.relu(F.linear(x, self.inner["again"])), self.down.weight.t()[:WIDTH, :HIDDEN].contiguous()
        )


def test_all_names_are_there() -> None:
    model = randomise(Tied()).double()
    model.down.weight = nn.Parameter(torch.randn(HIDDEN, WIDTH, dtype=torch.float64))
    gm = fxwidth.trace(model, rows())
    assert gm.state_dict().keys() == model.state_dict().keys()
    assert {name for name, _ in model.named_buffers()} <= {name for name, _ in gm.named_buffers()}
    assert gm.get_parameter("up.weight") is gm.get_parameter("inner.again") is model.up.weight
    assert gm.get_parameter("spare.weight") is model.spare.weight
    wg = fxwidth.analyze(gm)
    assert wg["spare"].pinned == "the graph never uses this parameter"
    fxwidth.resize(gm, {wg.free[0].name: 4})
    assert gm.get_parameter("up.weight") is gm.get_parameter("inner.again")
    assert gm.get_parameter("spare.weight") is model.spare.weight


def test_frozen_batch_norms_keep_their_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model = randomise(model).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gm = fxwidth.trace(model, x)
    state = {name: torch.rand_like(tensor) for name, tensor in model.state_dict().items()}
    gm.load_state_dict(state)
    assert torch.equal(gm(x), model(x))
    fxwidth.resize(gm, {"0": 5})
    assert gm.get_buffer("1.running_var").shape == (5,)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_modules_of_torch_script_are_refused() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(WIDTH, HIDDEN)), nn.Linear(HIDDEN, OUT))
    with pytest.raises(
        FxwidthError, match=r"'0' of the model is a module of TorchScript \(Linear\).*pass the model with"
    ):
        fxwidth.trace(model, rows().float())


def test_a_graph_is_taken_as_it_is() -> None:
    graph = fx.symbolic_trace(normed(OwnNormWithoutGradients)[::2].double())
    before = snapshot(graph)
    gm = fxwidth.trace(graph, rows())
    assert gm is graph
    # But for what it carries from now on: its notes, and the hook by which copies carry them too.
    own = (".meta", "._fxwidth_notes", "._deepcopy_hooks")
    changed = [line for line in differences(before, snapshot(graph)) if not any(name in line for name in own)]
    assert not changed
