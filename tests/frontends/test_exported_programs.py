"""An ExportedProgram is taken and given back: what it holds, takes and returns is as it was, at the new widths."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

import fxwidth
from fxwidth import FxwidthError
from fxwidth.frontends.program_differences import refuse_lost

# torch 2.11 warns of how it reads its own files.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")


class Convolutions(nn.Module):
    """Buffers of both kinds, constants of both kinds, an argument by name, and a dict that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 6, 3, padding=1)
        self.head, self.other = nn.Linear(6, 5), nn.Linear(6, 5)
        self.other.weight = self.head.weight
        self.register_buffer("scale", 1 + torch.rand(8, 1, 1))
        self.register_buffer("shift", torch.rand(8, 1, 1), persistent=False)
        self.constant = torch.rand(5, dtype=torch.float64)

    def forward(self, x: Tensor, *, extra: Tensor | None = None) -> dict[str, Any]:
        h = self.norm(self.stem(x)).relu() * self.scale + self.shift
        h = self.body(h).relu().mean((2, 3))
        first = self.head(h) + self.constant
        if extra is not None:
            first = first + extra
        return {"first": first, "rest": (self.other(h) + torch.tensor([1.0, 2, 3, 4, 5]).double(), 2 * h[:, :1])}


class Counting(nn.Module):
    """A buffer of a width that is written in each call, beside the running mean of a batch norm."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        self.seen.mul_(0.5).add_(h.detach().mean(0))
        return self.last(h + self.seen)


class Attending(nn.Module):
    """Attention of several heads over sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = (nn.Linear(*sizes) for sizes in ((8, 24), (8, 8), (8, 16), (16, 8)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        h = tokens + self.out(h.transpose(1, 2).flatten(2))
        h = h + self.down(self.up(h).relu())
        return self.head(h), h.mean(1)


class Twice(nn.Module):
    """A second input of twice the batch, and a number among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, pair: list[Tensor], factor: int) -> list[Tensor]:
        one, two = pair
        return [factor * self.last(self.first(torch.cat([one, two])).relu())]


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    sizes: Any
    is_training: bool = False


BATCH, LENGTH = Dim("batch", min=2, max=64), Dim("length", min=2, max=32)
double = torch.float64


def image(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(batch, 3, 8, 8, dtype=double),), {"extra": torch.randn(batch, 1, dtype=double)}


def rows(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(batch, 4, dtype=double),), {}


def tokens(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(batch, batch + 1, 8, dtype=double), torch.rand(batch, batch + 1) < 0.8), {}


def pair(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ([torch.randn(batch, 4, dtype=double), torch.randn(2 * batch, 4, dtype=double)], 3), {}


CASES = {
    "evaluating": Case(Convolutions, image, {"x": {0: BATCH}, "extra": {0: BATCH}}),
    "training": Case(Convolutions, image, {"x": {0: BATCH}, "extra": {0: BATCH}}, is_training=True),
    "counting": Case(Counting, rows, ({0: Dim.AUTO},), is_training=True),
    "attending": Case(Attending, tokens, ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH})),
    "twice": Case(Twice, pair, ([{0: BATCH}, {0: 2 * BATCH}], None)),
}
FORMS: dict[str, Callable[[ExportedProgram], ExportedProgram]] = {
    "training IR": lambda program: program,
    "inference IR": lambda program: program.run_decompositions(),
}
# One of each kind; the others take as long and are alike.
QUICK = {("evaluating", "training IR"), ("training", "inference IR"), ("twice", "training IR")}
every = pytest.mark.parametrize(
    ("case", "form"),
    [
        pytest.param(case, form, marks=() if (case, form) in QUICK else pytest.mark.slow)
        for case in CASES
        for form in FORMS
    ],
)


def program_of(case: str, form: str) -> ExportedProgram:
    torch.manual_seed(0)
    told = CASES[case]
    model = told.make().double().train(told.is_training)
    args, kwargs = told.inputs(4)
    return FORMS[form](torch.export.export(model, args, kwargs, dynamic_shapes=told.sizes))


def run(program: ExportedProgram, case: str, batch: int, calls: int = 2) -> list[Tensor]:
    """Return what some calls of a program return, and what it has written to its buffers then."""
    torch.manual_seed(batch)
    # A module of a program writes to the buffers of the program.
    module = copy.deepcopy(program.module())
    found: list[Tensor] = []
    for _ in range(calls):
        args, kwargs = CASES[case].inputs(batch)
        found += pytree.tree_leaves(module(*args, **kwargs))
    return [one.detach() for one in found]


def contents(program: ExportedProgram) -> Any:
    """Return all that a program is, as it can be compared."""
    tensors = {**program.state_dict, **program.constants}
    nodes = [(str(node), node.target, str(node.args), str(node.meta.get("val"))) for node in program.graph.nodes]
    fakes = [value for node in program.graph.nodes if isinstance(value := node.meta.get("val"), FakeTensor)]
    conditions = str(fakes[0].fake_mode.shape_env.guards) if fakes[0].fake_mode.shape_env else ""
    kept = {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors.items()}
    return nodes, conditions, str(program.graph_signature), str(program.range_constraints), program._guards_code, kept


def same(one: Any, other: Any) -> bool:
    kept, others = one[-1], other[-1]
    return one[:-1] == other[:-1] and all(
        kept[name][0] == others[name][0] and torch.equal(kept[name][1], others[name][1]) for name in kept | others
    )


def kinds(program: ExportedProgram) -> tuple[Any, ...]:
    """Return what a program takes, holds and returns, but for sizes and names of nodes."""
    signature = program.graph_signature
    inputs = {
        (spec.kind, spec.target, spec.persistent, spec.arg.name if spec.kind == InputKind.USER_INPUT else "")
        for spec in signature.input_specs
    }
    outputs = sorted((spec.kind.name, str(spec.target)) for spec in signature.output_specs if spec.target)
    returned = sum(spec.kind == OutputKind.USER_OUTPUT for spec in signature.output_specs)
    ranges = sorted(map(str, program.range_constraints.values()))
    calls = [(entry.fqn, entry.signature is None) for entry in program.module_call_graph]
    return inputs, outputs, returned, ranges, calls, program.call_spec, program.dialect, list(program.state_dict)


@every
def test_a_grown_program_does_what_it_did(case: str, form: str) -> None:
    program = program_of(case, form)
    before = contents(program)
    gm = fxwidth.trace(program)
    groups = [group for group in fxwidth.analyze(gm).groups if group.pinned is None]
    assert groups
    grown = {group.name: group.width + 2 for group in groups[:1]}
    fxwidth.resize(gm, grown)
    after = fxwidth.write_back(gm, program)
    assert same(before, contents(program))
    assert kinds(after) == kinds(program)
    assert sum(p.numel() for p in after.parameters()) > sum(p.numel() for p in program.parameters())
    for batch in (4, 7):
        for old, new in zip(run(program, case, batch), run(after, case, batch), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-10)


@every
def test_a_shrunken_program_is_the_graph_and_survives_its_file(case: str, form: str) -> None:
    program = program_of(case, form)
    before = contents(program)
    after = fxwidth.evolve(program, ratio=0.5)
    assert same(before, contents(program))
    assert kinds(after) == kinds(program)
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in program.parameters())
    gm = fxwidth.trace(program)
    fxwidth.resize(gm, fxwidth.plan(fxwidth.analyze(gm), ratio=0.5))
    for name, parameter in gm.named_parameters():
        assert torch.equal(after.state_dict[name], parameter)
    buffer = io.BytesIO()
    torch.export.save(after, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer)
    assert kinds(again)[:4] == kinds(after)[:4]
    torch.manual_seed(7)
    for old, new in zip(run(after, case, 7), run(again, case, 7), strict=True):
        assert torch.equal(old, new)
    torch.manual_seed(7)
    args, kwargs = CASES[case].inputs(7)
    own = pytree.tree_leaves(gm(*args, **kwargs))
    for one, other in zip(own, run(after, case, 7, calls=1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class InPairs(TwoLayers):
    """A size of the input that must be even, which the graph itself asks for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(x.shape[0] // 2, 6)


class Passed(nn.Module):
    """Weights that are arguments."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight).relu()


X = torch.randn(4, 4)


def small(model: nn.Module | None = None, sizes: Any = ({0: Dim.AUTO},), **options: Any) -> ExportedProgram:
    return torch.export.export(model or TwoLayers(), (X,), dynamic_shapes=sizes, **options)


def test_conditions_of_the_graph_stay_those_that_they_were() -> None:
    program = small(InPairs())
    after = fxwidth.evolve(program, ratio=0.5)
    assert after.module()(torch.randn(6, 4)).shape == (3, 6)
    with pytest.raises(AssertionError, match="Guard failed"):
        after.module()(torch.randn(5, 4))


@pytest.mark.parametrize("sizes", [None, ({0: Dim("batch", min=1, max=9)},)], ids=["fixed", "of one"])
def test_without_example_inputs_those_of_its_sizes_are_made(sizes: Any) -> None:
    buffer = io.BytesIO()
    program = small(sizes=sizes)
    program._example_inputs = None
    torch.export.save(program, buffer)
    buffer.seek(0)
    read = torch.export.load(buffer)
    after = fxwidth.evolve(read, params=0.5)
    assert kinds(after) == kinds(read)
    assert after.example_inputs is None
    assert after.module()(X).shape == (4, 3)


def test_its_own_examples_are_taken_or_others_and_it_is_reported() -> None:
    program = small()
    assert fxwidth.trace(program, torch.randn(5, 4))(torch.randn(3, 4)).shape == (3, 3)
    after = fxwidth.evolve(program, params=0.5)
    assert after.example_inputs is program.example_inputs
    assert fxwidth.report(after).resizes[-1]["widths"].keys() == {"first"}
    again = fxwidth.evolve(after, params=0.5)
    assert again.state_dict["first.weight"].shape < after.state_dict["first.weight"].shape


def test_a_program_stays_when_its_graph_is_resized_and_trained_on() -> None:
    program = small()
    program.graph_module.meta["by the user"] = 3
    gm = fxwidth.resize(fxwidth.trace(program), {"first": 6})
    after = fxwidth.write_back(gm, program)
    assert after.graph_module.meta["by the user"] == 3
    before = after.module()(X).detach()
    fxwidth.resize(gm, {"first": 3})
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.zero_()
    assert torch.equal(after.module()(X), before)


def test_a_copy_unflattens_to_the_modules_that_it_had() -> None:
    after = fxwidth.evolve(small(), ratio=0.5)
    parts = torch.export.unflatten(after)
    assert parts.get_submodule("first").weight.shape == (4, 4)
    torch.testing.assert_close(parts(X), after.module()(X))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing is a parameter": (
        lambda: fxwidth.trace(torch.export.export(Passed(), (X, torch.randn(4, 4)))),
        r"nothing in the ExportedProgram is a parameter: it has 0 buffers, 0 constants and 2 inputs\. Export a module",
    ),
    "calls of parts are kept": (
        lambda: fxwidth.evolve(small(preserve_module_call_signature=("first",)), params=0.5),
        r"keeps the calls of 'first' for unflattening.*export without preserve_module_call_signature",
    ),
    "an optimizer": (
        lambda: fxwidth.evolve(small(), params=0.5, optimizer=torch.optim.SGD(TwoLayers().parameters(), 0.1)),  # type: ignore[call-overload]
        r"optimizer= trains the parameters of a module.*fxwidth\.trace\(program\)",
    ),
    "a module": (
        lambda: fxwidth.evolve(small(), params=0.5, output="module"),  # type: ignore[call-overload]
        r'output="module" is for models of a class of their own',
    ),
    "another graph": (
        lambda: fxwidth.write_back(fxwidth.trace(nn.Sequential(nn.Linear(4, 3)), X), small()),
        r"torch\.export would lose something of the ExportedProgram: \('PARAMETER', 'first\.bias', None\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_with_the_reason(name: str) -> None:
    work, message = REFUSED[name]
    with pytest.raises(FxwidthError, match=message):
        work()


def at_most(largest: int) -> ExportedProgram:
    return small(sizes=({0: Dim("batch", min=2, max=largest)},))


LOST: dict[str, tuple[Callable[[], ExportedProgram], str]] = {
    "the largest size": (lambda: at_most(5), r"the sizes of its inputs were .*9.* and would be .*5"),
    "all other sizes": (lambda: small(sizes=None), "the sizes of its inputs were"),
    "odd sizes": (lambda: small(InPairs()), r"inputs of shapes \[\[5, 4\]\], which it took, would be refused: .*size"),
    "the dialect": (lambda: at_most(9).run_decompositions(), "it was of the dialect TRAINING and would be of ATEN"),
    "a parameter": (lambda: small(nn.Linear(4, 3)), "'first.bias', None.* is no longer held as such"),
}


@pytest.mark.parametrize("name", LOST)
def test_each_thing_that_would_be_lost_is_seen(name: str) -> None:
    make, message = LOST[name]
    before = small() if name == "odd sizes" else at_most(9)
    refuse_lost(before, before)
    with pytest.raises(FxwidthError, match=message):
        refuse_lost(before, make())


@pytest.mark.parametrize("data", [None, 3])
def test_numbers_that_are_sizes_of_the_batch_stay_no_such(data: int | None) -> None:
    """Decomposed, a layer on tokens is a view of as many rows as the example has; noise and data have others."""
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double().eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    program = torch.export.export(model, (x,)).run_decompositions()
    options = {} if data is None else {"data": [x.repeat(data, 1, 1)]}
    small = fxwidth.evolve(program, params=0.6, **options)
    assert sum(one.numel() for one in small.parameters()) < 0.6 * sum(one.numel() for one in model.parameters())
    direct = fxwidth.evolve(fxwidth.trace(model, x), params=0.6, **options)
    assert small.module()(x).shape == (2, 5, 3)
    if data is not None:
        torch.testing.assert_close(small.module()(x), direct(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("call", [lambda one: fxwidth.resize(one, {"up": 3}), fxwidth.untie_copies])
def test_what_takes_graphs_alone_says_so(call: Callable[[Any], Any]) -> None:
    with pytest.raises(FxwidthError, match=r"GraphModule is needed, but received ExportedProgram; call fxwidth\.trace"):
        call(small())
