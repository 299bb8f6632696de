"""What an op does, declared in one place: an op declared from outside is treated as its plain twin everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxwidth
from fxwidth.bases.linear_groups import linear_group
from fxwidth.costs.counts import flop_polynomial
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.rules.contraction import product
from fxwidth.rules.family_table import FAMILIES, adds, declare, running_norm, takes_rows
from fxwidth.rules.op_families import Norm, NormKind, Product
from fxwidth.rules.registry import POINTWISE, RULES, pointwise, rule
from fxwidth.rules.unruled import UNRULED
from fxwidth.weights.readers import wiring_of
from fxwidth.weights.shared_readers import reader_sets
from tests.oracles.judges import analysed, assert_replays

aten = torch.ops.aten


@torch.library.custom_op("fxwidth_tests::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


@project.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("fxwidth_tests::add", mutates_args=())
def _add(one: Tensor, two: Tensor) -> Tensor:
    return one * torch.tanh(two)


_add.register_fake(lambda one, two: torch.empty_like(one))

PROJECT = "fxwidth_tests::project"


@pytest.fixture
def declared() -> Iterator[Callable[[str], None]]:
    """A function that declares the op with a formula, for the time of a test."""
    yield lambda formula: product(PROJECT, "x", "weight", formula)
    FAMILIES.pop(PROJECT, None)
    RULES.pop(PROJECT, None)


class Projected(nn.Module):
    """Layers without a bias, by a function; between the second and the third nothing is nonlinear."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        sizes = [(8, 6), (8, 8), (8, 8), (3, 8)]
        self.weights = nn.ParameterList(torch.randn(size, dtype=torch.float64) / 3 for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.weights
        x = torch.relu(self.function(x, a))
        x = self.function(self.function(x, b), c)
        return self.function(torch.relu(x), d)


def _pair() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    own, twin = Projected(torch.ops.fxwidth_tests.project), Projected(functional.linear)
    twin.load_state_dict(own.state_dict())
    return own, twin, torch.randn(5, 6, dtype=torch.float64)


def _told(graph: WidthGraph) -> list[Any]:
    """Return what every part of the library makes of a network's groups."""
    flops = flop_polynomial(graph)
    found: list[Any] = [flops({group.factor: 2 + k for k, group in enumerate(graph.free)})]
    for group in graph.groups:
        linear = linear_group(graph, group)
        places = None if linear is None else [len(basis.places) for basis in linear.bases]
        sites = [(site.parameter, site.dim, site.role) for site in group.sites]
        growth = (group.growth.recipe, bool(group.growth.inexact), sorted(group.growth.fills.items(), key=str))
        found.append((group.name, group.width, group.pinned is None, sites, growth, places))
    readers = [
        (one.foldable, one.first.outputs, one.first.groups, str(one.absorber)) for one in reader_sets(wiring_of(graph))
    ]
    return [*found, readers]


def test_without_a_declaration_it_pins() -> None:
    own, _, x = _pair()
    assert not fxwidth.analyze(fxwidth.trace(own, x)).free


def test_a_product_declared_from_outside_is_as_good_as_a_linear_layer(declared: Any) -> None:
    declared("ik,jk->ij")
    own, twin, x = _pair()
    graphs = [fxwidth.analyze(fxwidth.trace(model, x)) for model in (own, twin)]
    told, expected = map(_told, graphs)
    assert told == expected
    assert any(places for *_, places in told[1:-1])
    assert len(graphs[0].free) == 3
    assert_replays(analysed(own, [x]), [x])


@pytest.mark.parametrize("width", [4, 13])
def test_it_is_resized_as_its_twin(declared: Any, width: int) -> None:
    declared("ik,jk->ij")
    own, twin, x = _pair()
    before = own(x)
    data = [torch.randn(64, 6, dtype=torch.float64)] if width < 8 else None  # growth does not look at any
    for model in (own, twin):
        graph = fxwidth.trace(model, x)
        plan = fxwidth.Plan({group.name: width for group in fxwidth.analyze(graph).free})
        fxwidth.resize(graph, plan, data=data)
    assert torch.allclose(own(x), twin(x), rtol=1e-7, atol=1e-9)
    if width > 8:
        assert torch.allclose(own(x), before, rtol=1e-9, atol=1e-11)


def test_a_wrong_formula_is_seen_by_the_replay(declared: Any) -> None:
    declared("ik,kj->ij")  # as if the weight were not transposed
    own, _, x = _pair()
    own.weights = nn.ParameterList(torch.randn(6, 6, dtype=torch.float64) for _ in range(4))
    with pytest.raises((AssertionError, FxwidthError)):
        assert_replays(analysed(own, [x]), [x])


class Scores(nn.Module):
    """Products of two activations, scaled, by one op or by two."""

    def __init__(self, in_one: bool) -> None:
        super().__init__()
        self.in_one = in_one
        self.q, self.k, self.v = (nn.Linear(6, width, bias=False).double() for width in (8, 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.q(x), self.k(x).transpose(1, 2)
        nothing = x.new_zeros(1, 1, 1)
        scores = torch.baddbmm(nothing, query, key, beta=0, alpha=0.3) if self.in_one else torch.bmm(query, key) * 0.3
        return torch.bmm(torch.softmax(scores, -1), self.v(x))


def test_products_that_add_something_are_resized_as_those_that_do_not() -> None:
    torch.manual_seed(0)
    one, two = Scores(True), Scores(False)
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    for model in (one, two):
        graph = fxwidth.trace(model, x)
        widths = fxwidth.analyze(graph)
        assert linear_group(widths, widths["q"]) is not None
        fxwidth.resize(graph, fxwidth.Plan({"q": 4}), data=[x])
    assert one.q.weight.shape == (4, 6)
    assert torch.allclose(one(x), two(x), rtol=1e-7, atol=1e-9)


def test_an_op_of_another_library_is_not_taken_for_one_of_aten() -> None:
    """Its sum is a product, and its operands have other names than those of `aten.add`."""
    pointwise("fxwidth_tests::add")
    try:
        own = torch.ops.fxwidth_tests.add
        assert adds(aten.add.Tensor)
        assert not adds(own.default)

        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(own(self.a(x), self.b(x)))

        model, x = Gated().double(), torch.randn(5, 6, dtype=torch.float64)
        graph, before = fxwidth.trace(model, x), model(x)
        (group,) = fxwidth.analyze(graph).free
        assert group.inexact_growth is None
        fxwidth.resize(graph, fxwidth.Plan({group.name: 11}))
        assert torch.allclose(graph(x), before, rtol=1e-9, atol=1e-11)
    finally:
        POINTWISE.discard("fxwidth_tests::add")


# -- registration ------------------------------------------------------------------------------------------------------


def test_a_misspelt_op_fails_when_it_is_registered() -> None:
    with pytest.raises(AttributeError):
        rule(aten.softmaxx)
    for name, told in (("mm", "names no op: give the op itself"), ("aten::mmm", "names no op of aten")):
        with pytest.raises(ValueError, match=told):
            rule(name)(lambda c: [])
    assert "mmm" not in RULES


@pytest.mark.parametrize(
    "formula", ["ik,kj", "ik->ij", "ik,kj->i", "ii,ij->j", "ik,kj,jl->il", "ik,kj->ijl", "i1,1j->ij"]
)
def test_what_is_no_sum_of_products_is_refused(formula: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(formula))):
        Product("x", "weight", formula)


def test_an_operand_that_the_op_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fxwidth_tests::project has no argument 'mat2': .*Tensor weight"):
        product(PROJECT, "x", "mat2", "ik,jk->ij")
    with pytest.raises(ValueError, match="has no argument 'input'"):
        declare(Norm(NormKind.BATCH, mean="running_mean"), PROJECT)
    assert PROJECT not in FAMILIES
    assert PROJECT not in RULES


def test_a_second_declaration_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a rule for mm already"):
        product(aten.mm, "self", "mat2", "ik,kj->ij")
    with pytest.raises(ValueError, match="add is declared already"):
        declare(FAMILIES["add"], aten.add)


def test_in_place_forms_and_overloads_share_a_declaration() -> None:
    assert adds(aten.add_.Scalar)
    assert adds(aten.add.Tensor)


@pytest.mark.parametrize(
    ("op", "argument", "expected"),
    [
        (aten.mm.default, "mat2", True),
        (aten.mm.default, "self", False),
        (aten.addmm.default, "mat2", True),
        (aten.bmm.default, "mat2", True),
        # What is added to their results has no entry for each of the outputs.
        (aten.mv.default, "vec", False),
        (aten.dot.default, "tensor", False),
        (aten.convolution.default, "weight", True),
        (aten.convolution.default, "input", False),
        (aten.relu.default, "self", False),
    ],
)
def test_which_operands_are_given_rows(op: Any, argument: str, expected: bool) -> None:
    assert argument in {one.name for one in op._schema.arguments}
    assert takes_rows(op, argument) is expected


# -- kernels that only some builds of torch have -----------------------------------------------------------------------

_KERNELS = re.compile(
    r"(^|_)(cudnn|miopen|mkldnn|mps|nnpack|conv|convolution|conv[123]d|depthwise[23]d|batch_norm|\w*mm|linear)(_|$)"
)


def _is_seen(name: str) -> bool:
    """Tell whether a dispatch mode sees some overload of an op: composite ones are taken apart before."""
    packet = getattr(aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return not all(has_kernel(overload.name(), "CompositeImplicitAutograd") for overload in overloads)


def test_every_kernel_of_a_backend_has_a_rule_or_a_reason() -> None:
    names = {
        schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas() if schema.name[:6] == "aten::"
    }
    kernels = {name for name in names if _KERNELS.search(name) and "backward" not in name and name[-1] != "_"}
    seen = {name for name in kernels if not name.startswith("linalg") and _is_seen(name)}
    assert {"cudnn_convolution", "miopen_batch_norm", "mm"} <= seen
    assert seen - set(RULES) - set(UNRULED) == set()
    assert not set(UNRULED) & (set(RULES) | POINTWISE)
    # A misspelt name would be one that no torch knows; older releases lack some.
    assert all(hasattr(aten, name) for name in UNRULED) or torch.__version__ < "2.14"


def test_batch_norms_of_all_backends_are_one_family() -> None:
    kernels = [name for name in dir(aten) if name.endswith("_batch_norm")] + ["cudnn_batch_norm", "miopen_batch_norm"]
    found = {name: FAMILIES.get(name) for name in kernels if name in RULES}
    assert {"cudnn_batch_norm", "miopen_batch_norm"} <= found.keys()
    assert all(isinstance(norm, Norm) and norm.variance == "running_var" for norm in found.values())
    assert running_norm(aten.miopen_batch_norm.default) == running_norm(aten.cudnn_batch_norm.default)
    assert running_norm(aten._batch_norm_with_update.default) is None


def test_a_kernel_without_a_rule_pins_and_tells_what_to_call() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(5, 2, 1)
            self.kernel = nn.Parameter(torch.randn(5, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(aten.slow_conv_dilated2d(self.a(x), self.kernel, [1, 1]))

    graph = fxwidth.analyze(fxwidth.trace(Direct(), torch.randn(1, 3, 6, 6)))
    assert not graph.free
    told = graph.why_pinned("a")
    assert "no rule for this kernel of one device or build, in slow_conv_dilated2d" in told
    assert "Call the function of torch or torch.nn.functional" in told
