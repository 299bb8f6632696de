"""A group at width one stays a group: it has its name and its sites, and grows again to what it was."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.analysis.known_axes import KnownAxes, KnownCall
from fxwidth.analysis.known_axes_replay import OtherGraphError, follow_axes
from fxwidth.analysis.op_signatures import Signature, prescribed_signatures
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import LOST
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.options import ResizeOptions
from fxwidth.recording.graph_meta import AXES, notes_of
from fxwidth.recording.tape import tensors_in
from fxwidth.resizing.resize import resize_analyzed
from fxwidth.rewriting.transaction import Transaction
from fxwidth.tracing.analyze import analyze_module
from fxwidth.verification.replay_oracle import largest_difference
from tests.checkpoint.test_saving import Convolutions, Stream
from tests.fuzz.networks import RandomNetwork, example_input, seeded_program
from tests.oracles.judges import ROUNDING, assert_replays, at_batch_of, randomise, traced
from tests.resizing.test_optimizer_state import MAKERS
from tests.zoo.models import SMALL, RMSTransformer, build
from tests.zoo.networks import CASES
from tests.zoo.networks_of_modes import LAYERS, WIDTH, Around

SEEDS = range(20)
Told = dict[str, tuple[frozenset[tuple[str, int, str]], bool, bool]]


def told(width_graph: WidthGraph) -> Told:
    """Return what an analysis tells of groups but for their widths: names, sites, and which are free or mixed."""
    return {
        group.name: (
            frozenset((site.parameter, site.dim, site.role) for site in group.sites),
            group.pinned is None,
            group.mixed is None,
        )
        for group in width_graph.groups
    }


def signatures(width_graph: WidthGraph) -> list[Signature]:
    """Return all that a graph does, literals included, but for the eps of norms, which follow what they see."""
    analysis = width_graph.analysis
    found = prescribed_signatures(analysis.calls, IndexMaps(analysis.space, {}))
    return [(name, *((results[0],) if "norm" in name else results)) for name, *results in found]


def outputs(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(module(*inputs))


def longer(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat([x, x[:1]]) for x in inputs]


def check_narrowed(module: fx.GraphModule, inputs: Sequence[Tensor], names: Sequence[str]) -> None:
    """Bring groups to their least widths and back: all that is told of the graph, and all that it does, is the same."""
    before = WidthGraph(analyze_module(module, tuple(inputs)))
    sites, done = told(before), signatures(before)
    exact = {name for name in names if before[name].inexact_growth is None}
    widths = {name: before[name].width for name in names}
    resize_analyzed(before, {name: before[name].least.width for name in names}, ResizeOptions(fold=False), blind=True)
    narrow = fxwidth.analyze(module)
    assert told(narrow) == sites
    assert {name for name in names if narrow[name].width == 1} == {n for n in names if before[n].least.width == 1}
    # What could grow exactly before can do so now.
    assert {name for name in names if narrow[name].inexact_growth is None} == exact
    expected = outputs(module, inputs)
    resize_analyzed(narrow, {name: widths[name] for name in exact})
    assert largest_difference(outputs(module, inputs), expected) < ROUNDING
    fxwidth.resize(module, {name: widths[name] for name in names}, exact=False)
    after = fxwidth.analyze(module)
    assert told(after) == sites
    assert signatures(after) == done
    assert notes_of(module).get(AXES) is None


def each_and_all(make: Callable[[], fx.GraphModule], inputs: Sequence[Tensor]) -> None:
    free = WidthGraph(analyze_module(make(), tuple(inputs))).free
    for group in free:
        check_narrowed(make(), inputs, [group.name])
    check_narrowed(make(), inputs, [group.name for group in free])


def hard_case(name: str) -> tuple[Callable[[], fx.GraphModule], list[Tensor]]:
    torch.manual_seed(1)
    inputs = [x.double() if x.is_floating_point() else x for x in CASES[name].inputs()]

    def make() -> fx.GraphModule:
        torch.manual_seed(0)
        return traced(randomise(CASES[name].build().eval()).double())

    return make, inputs


# All its widths at one: its own code divides the width by the number of heads and raises that to a negative power.
REFUSED_TOGETHER = "FusedAttention"


@pytest.mark.parametrize("name", CASES)
def test_hard_cases(name: str) -> None:
    make, inputs = hard_case(name)
    if name == REFUSED_TOGETHER:
        with pytest.raises(FxwidthError, match="negative power"):
            each_and_all(make, inputs)
    else:
        each_and_all(make, inputs)


@pytest.mark.parametrize("seed", [*SEEDS[::2], *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[1::2])])
def test_random_networks(seed: int) -> None:
    def make() -> fx.GraphModule:
        torch.manual_seed(0)
        return traced(randomise(RandomNetwork(seeded_program(seed)).double().eval()))

    each_and_all(make, [example_input()])


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_whole_models(name: str) -> None:
    model, x = build(name)
    module = fxwidth.trace(model, x)
    check_narrowed(module, [x], [group.name for group in fxwidth.analyze(module).free])


@pytest.mark.parametrize("name", ["SelfAttention", "Res2Net", "ShuffledGroups", "GroupedQueryAttention", "Recurrent"])
def test_the_tape_of_narrow_groups_replays(name: str) -> None:
    make, inputs = hard_case(name)
    module = make()
    groups = analyze_module(module, tuple(inputs))
    free = WidthGraph(groups).free
    narrow = [group for group in free if group.least.width == 1][::2]
    resize_analyzed(WidthGraph(groups), {group.name: 1 for group in narrow}, ResizeOptions(fold=False), blind=True)
    assert_replays(fxwidth.analyze(module).analysis, at_batch_of(groups, inputs))


class Ones(nn.Module):
    """Dims of size one of every kind beside channels: positions, views, sums, gates, expansion, squeezing."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze, self.excite, self.gate = nn.Linear(6, 4), nn.Linear(4, 6), nn.Conv2d(6, 1, 1)
        self.scale, self.shift = nn.Parameter(torch.rand(1, 6, 1, 1)), nn.Parameter(torch.rand(6, 1, 1))
        self.heads, self.out, self.drop = nn.Linear(6, 20), nn.Linear(20, 3), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x)))) * self.scale + self.shift
        seen = x.mean((2, 3), keepdim=True)
        batch, channels = seen.shape[:2]
        seen = torch.relu(self.squeeze(seen.view(batch, channels)))
        x = x * torch.sigmoid(self.excite(seen)).view(batch, channels, 1, 1)
        x = (x * torch.sigmoid(self.gate(x))).mean((2, 3)).unsqueeze(1).expand(-1, 2, -1)[:, :1].squeeze(1)
        heads = self.heads(self.drop(x)).view(batch, 1, 5, 4)
        weights = torch.softmax(heads.sum(-1, keepdim=True) * torch.ones(1, 1, 5, 1, dtype=x.dtype), 2)
        return self.out(torch.tanh(weights * heads).flatten(1))


def test_dims_of_size_one_beside_channels() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)

    def make() -> fx.GraphModule:
        torch.manual_seed(0)
        return fxwidth.trace(randomise(Ones()).double().eval(), x)

    each_and_all(make, [x])
    module = make()
    sites = told(fxwidth.analyze(module))
    # The gate has one channel of its own, which is broadcast: it is no group, and none becomes one beside it.
    assert "gate" not in sites
    fxwidth.resize(module, {"shift": 1, "squeeze": 1})
    graph = fxwidth.analyze(module)
    assert told(graph) == sites
    own, read, *kernel = graph.analysis.parameters["gate.weight"].origins
    assert (own, kernel) == (None, [None, None])
    assert read is not None


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dims of size one": (Ones, (4, 3, 5, 5)),
    "convolutions": (Convolutions, (5, 3, 6, 6)),
    "layer norm and attention": (lambda: Stream(nn.LayerNorm), (5, 4, 6)),
    "attention in the open": (RMSTransformer, (5, 4, 10)),
}


def network(name: str) -> tuple[fx.GraphModule, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    return fxwidth.trace(randomise(make()).double().eval(), x), x


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_many_times(name: str) -> None:
    module, x = network(name)
    graph = fxwidth.analyze(module)
    sites = told(graph)
    free = [group.name for group in graph.free if group.least.width == 1 and group.inexact_growth is None]
    assert len(free) >= 2
    for step, width in enumerate((1, 4, 1, 3)):
        expected = outputs(module, [x])
        # One at a time in turns, so that some are narrow while others change.
        for group in free if step % 2 else free[::-1]:
            before = outputs(module, [x])
            fxwidth.resize(module, {group: width})
            after = fxwidth.analyze(module)
            assert told(after) == sites
            assert after[group].width == width
            if width > 1:
                assert largest_difference(outputs(module, [x]), before) < ROUNDING
        if width > 1:
            assert largest_difference(outputs(module, [x]), expected) < ROUNDING
        many = outputs(module, longer([x]))
        assert largest_difference([y[: len(x)] for y in many], outputs(module, [x])) < ROUNDING
        module.train()
        sum(y.square().mean() for y in tensors_in(module(x))).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
        module.eval()


@pytest.mark.parametrize("layer", ["drop path", "noise"])
def test_parts_that_act_in_training_alone(layer: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    module = fxwidth.trace(Around(LAYERS[layer]()).double().eval(), x)
    graph = fxwidth.analyze(module)
    assert any(graph.analysis.training_calls.values())
    check_narrowed(module, [x], [group.name for group in graph.free])
    fxwidth.resize(module, {group.name: 1 for group in graph.free})
    assert any(fxwidth.analyze(module).analysis.training_calls.values())
    assert module.train()(x).isfinite().all()


def test_the_model_goes_along() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    module = fxwidth.trace(model, x)
    for width in (1, 4):
        fxwidth.resize(module, {"0": width})
        assert fxwidth.report(module).resizes[-1]["original"] == "resized"
        assert torch.equal(model(x), module(x))


def test_others_are_resized_beside_narrow_groups() -> None:
    module, x = network("convolutions")
    sites = told(fxwidth.analyze(module))
    fxwidth.resize(module, {"a": 1}, data=[x])
    free = [group.name for group in fxwidth.analyze(module).free]
    others = [name for name in free if name != "a"]
    fxwidth.resize(module, {name: fxwidth.analyze(module)[name].width // 2 for name in others}, data=[x])
    assert told(fxwidth.analyze(module)) == sites
    before = outputs(module, [x])
    graph = fxwidth.analyze(module)
    exact = [name for name in free if graph[name].inexact_growth is None]
    assert "a" in exact
    fxwidth.resize(module, {name: graph[name].width + 3 for name in exact})
    assert told(fxwidth.analyze(module)) == sites
    assert largest_difference(outputs(module, [x]), before) < ROUNDING


def test_new_channels_learn() -> None:
    """What grows beside a group of width one gets directions of its own, not zeros that no gradient reaches."""
    torch.manual_seed(0)
    module = fxwidth.trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    fxwidth.resize(module, {"0": 1})
    fxwidth.resize(module, {"2": 8})
    assert bool((module.get_parameter("2.weight")[5:] != 0).all())


def test_plans_know_narrow_groups() -> None:
    module = fxwidth.trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), torch.randn(3, 4))
    fxwidth.evolve(module, params=15)
    assert fxwidth.analyze(module)["0"].width == 1
    graph = fxwidth.analyze(module)
    assert fxwidth.plan(graph, params=15) == {}
    assert fxwidth.plan(graph, grow_energy=0.0, grow_step=2) == {"0": 3}
    assert "share 1 channels" in graph.explain("0", "2.weight:1")
    assert "is free: its width of 1 can change" in graph.why_pinned("0")


# -- through files, copies and optimizers ------------------------------------------------------------------------------


def _saved(module: fx.GraphModule, folder: Path) -> fx.GraphModule:
    fxwidth.save(module, folder / "net.pt")
    return fxwidth.load(folder / "net.pt", trusted=True)


def _saved_tensors(module: fx.GraphModule, folder: Path) -> fx.GraphModule:
    fxwidth.save(module, folder / "net.safetensors")
    fresh, x = network("attention in the open")
    del fresh
    torch.manual_seed(0)
    return fxwidth.load(folder / "net.safetensors", RMSTransformer().double().eval(), x)


COPIES: dict[str, Callable[[fx.GraphModule, Path], fx.GraphModule]] = {
    "saved": _saved,
    "saved as tensors": _saved_tensors,
    "pickled": lambda module, _: pickle.loads(pickle.dumps(module)),
    "copied": lambda module, _: copy.deepcopy(module),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_know_their_narrow_groups(how: str, tmp_path: Path) -> None:
    module, x = network("attention in the open")
    graph = fxwidth.analyze(module)
    free = [group.name for group in graph.free if group.least.width == 1]
    fxwidth.resize(module, dict.fromkeys(free, 1))
    other = COPIES[how](module, tmp_path)
    assert largest_difference(outputs(other, [x]), outputs(module, [x])) == 0.0
    assert told(fxwidth.analyze(other)) == told(graph)
    plan = {name: 3 for name in free if fxwidth.analyze(other)[name].inexact_growth is None}
    for one in (other, module):
        fxwidth.resize(one, plan)
    assert told(fxwidth.analyze(other)) == told(graph)
    assert largest_difference(outputs(other, [x]), outputs(module, [x])) == 0.0


@pytest.mark.parametrize("kind", MAKERS)
def test_optimizers_go_through_width_one(kind: str) -> None:
    module, x = layers()
    optimizer = MAKERS[kind](list(module.parameters()))

    def step() -> None:
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()

    step()
    shapes = {key: [tuple(v.shape) for v in own.values()] for key, own in _states(module, optimizer).items()}
    for width in (1, 4, 1, 6):
        expected = outputs(module, [x])
        fxwidth.resize(module, {"0": width}, optimizer=optimizer)
        if width > 1:
            assert largest_difference(outputs(module, [x]), expected) < ROUNDING
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        step()
        assert any(bool((parameter != before[name]).any()) for name, parameter in module.named_parameters())
        assert all(parameter.isfinite().all() for parameter in module.parameters())
    now = {key: [tuple(v.shape) for v in own.values()] for key, own in _states(module, optimizer).items()}
    assert now == shapes


def _states(module: fx.GraphModule, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
        for name, parameter in module.named_parameters()
    }


def test_a_transaction_takes_the_record_back() -> None:
    module, _ = layers()
    fxwidth.resize(module, {"0": 1})
    known = notes_of(module)[AXES]
    transaction = Transaction(module)

    def resize_and_fail() -> None:
        resize_analyzed(fxwidth.analyze(module), {"0": 4}, transaction=transaction)
        assert notes_of(module).get(AXES) is None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transaction.run(resize_and_fail)
    assert notes_of(module)[AXES] is known
    graph = fxwidth.analyze(module)
    assert (graph["0"].width, graph["0"].pinned) == (1, None)


# -- graphs that are others since --------------------------------------------------------------------------------------


def _more(module: fx.GraphModule) -> None:
    output = next(iter(module.graph.find_nodes(op="output")))
    with module.graph.inserting_before(output):
        output.args = (module.graph.call_function(torch.tanh, (output.args[0],)),)
    module.recompile()


def _fewer(module: fx.GraphModule) -> None:
    node = next(node for node in module.graph.nodes if node.target == "1")
    node.replace_all_uses_with(node.all_input_nodes[0])
    module.graph.erase_node(node)
    module.recompile()


def _wider(module: fx.GraphModule) -> None:
    module.get_submodule("0").weight = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
    module.get_submodule("0").bias = nn.Parameter(torch.randn(2, dtype=torch.float64))
    module.get_submodule("2").weight = nn.Parameter(torch.randn(5, 2, dtype=torch.float64))


def layers() -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    parts = (nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(3, 4, dtype=torch.float64)
    return fxwidth.trace(nn.Sequential(*parts).double(), x), x


@pytest.mark.parametrize("change", [_more, _fewer, _wider])
def test_what_changed_by_hand_is_told(change: Callable[[fx.GraphModule], None]) -> None:
    module, x = layers()
    fxwidth.resize(module, {"0": 1})
    change(module)
    graph = fxwidth.analyze(module)
    (lost,) = [group for group in graph.groups if group.is_lost]
    assert lost.name.rstrip("'") == "0"
    assert str(lost.pinned).startswith(LOST)
    assert "to free it: Change the graph back" in graph.why_pinned(lost)
    with pytest.raises(FxwidthError, match="must keep its width 1"):
        fxwidth.resize(module, {lost.name: 4})
    # The others go on, and what is lost is not forgotten.
    fxwidth.resize(module, {"2": 1})
    again = fxwidth.analyze(module)
    assert again["2"].pinned is None
    assert [group.name for group in again.groups if group.is_lost] == [lost.name]
    fxwidth.resize(module, {"2": 3})
    assert [group.name for group in fxwidth.analyze(module).groups if group.is_lost] == [lost.name]
    assert module(x).isfinite().all()


def test_inputs_of_other_shapes() -> None:
    module, x = network("convolutions")
    fxwidth.resize(module, {"a": 1})
    wide = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert fxwidth.analyze(module, wide)["a"].is_lost
    # Another batch is no other shape.
    graph = fxwidth.analyze(module, longer([x])[0])
    assert not graph["a"].is_lost
    assert graph["a"].pinned is None


def _record(module: fx.GraphModule) -> KnownAxes:
    known: KnownAxes = notes_of(module)[AXES]
    return known


def _call(known: KnownAxes, kind: str) -> int:
    return next(place for place, call in enumerate(known.calls) if call.kind == kind)


def _with(known: KnownAxes, place: int, call: KnownCall) -> KnownAxes:
    return dataclasses.replace(known, calls=(*known.calls[:place], call, *known.calls[place + 1 :]))


def test_an_op_is_held_to_its_record() -> None:
    """Planted faults: the record is of an op of another kind, of other operands, or of other results."""
    module, x = layers()
    fxwidth.resize(module, {"0": 1})
    known = _record(module)
    assert follow_axes(known, module, [x]).parameters.keys() == fxwidth.analyze(module).analysis.parameters.keys()
    place = _call(known, "relu")
    call = known.calls[place]
    ((batch, channels),) = call.inputs
    faults = {
        "relu at node _1 where tanh was": dataclasses.replace(call, kind="tanh"),
        "works with something else": dataclasses.replace(call, inputs=((batch, ((1,),)),)),
        "called with other numbers": dataclasses.replace(call, literals=(*call.literals, 1)),
        "results of other shapes": dataclasses.replace(call, outputs=((batch, ((2,),)),)),
        "another number of operands": dataclasses.replace(call, inputs=((batch, channels),) * 2),
    }
    for told_of, fault in faults.items():
        with pytest.raises(OtherGraphError, match=told_of):
            follow_axes(_with(known, place, fault), module, [x])
    with pytest.raises(OtherGraphError, match="there is no relu where one was"):
        follow_axes(dataclasses.replace(known, calls=(*known.calls, call)), module, [x])
