"""Why groups keep their widths, in words that can be pasted into an issue."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.axes import pins
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import constant
from fxwidth.axes.pins import CONSTANT, NO_RULE, REMEDIES, Fixed, Pin, remedy
from fxwidth.axes.unification import unify
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from tests.oracles.judges import analysed, as_one_node
from tests.zoo.networks import CASES


@torch.library.custom_op("fxwidth_tests::halves_swapped", mutates_args=())
def halves_swapped(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, -1)[::-1], -1)


@halves_swapped.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class ManyReasons(nn.Module):
    """One linear layer per reason why its rows must stay."""

    def __init__(self) -> None:
        super().__init__()
        names = ("largest", "places", "looked_up", "unknown", "unaligned", "free")
        self.parts = nn.ModuleDict({name: nn.Linear(6, 24) for name in names})
        self.parts["chosen_reader"] = nn.Linear(3, 5)
        self.parts["declined"] = nn.Linear(6, 4)
        self.norm = nn.GroupNorm(3, 24)
        self.order = [3, 1, 2]

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts
        total = parts["chosen_reader"](torch.topk(parts["largest"](x), 3).values).sum(1)
        total = total + torch.cumsum(parts["places"](x), 1).mean(1) + parts["looked_up"](x)[:, self.order].sum(1)
        total = total + halves_swapped(parts["unknown"](x)).sum(1)
        total = total + self.norm(parts["unaligned"](x)).view(-1, 8, 3).softmax(1).amax((1, 2))
        total = total + torch.slice_scatter(parts["declined"](x), torch.ones(2, 2), 1, 0, 4, 2).sum(1)
        return total + parts["free"](x).sum(1)


@pytest.fixture(scope="module")
def graph() -> WidthGraph:
    return fxwidth.analyze(fxwidth.trace(ManyReasons(), torch.randn(2, 6)))


TOLD = {
    "largest": """\
'parts.largest' keeps its width of 24 (parts.largest.weight dim 0, parts.largest.bias dim 0)
reason: the largest along the dimension are chosen, in topk at node topk
to free it: Nothing: which entries are chosen depends on all that are there.""",
    "largest:1": """\
'parts.largest:1' keeps its width of 6 (parts.largest.weight dim 1)
reason: it must equal a dimension of fixed size, in addmm at node parts_largest, \
which is module 'parts.largest' (Linear)
that dimension: it is dimension 1 of the model's input 'x'
to free it: Nothing inside the model: its callers know this size. \
A layer between the input and the rest has a width of its own.""",
    "chosen_reader:1": """\
'parts.chosen_reader:1' keeps its width of 3 (parts.chosen_reader.weight dim 1)
reason: it must equal a dimension of fixed size, in addmm at node parts_chosen_reader, \
which is module 'parts.chosen_reader' (Linear)
that dimension: the largest along the dimension are chosen, in topk at node topk
to free it: Nothing: which entries are chosen depends on all that are there.""",
    "looked_up": """\
'parts.looked_up' keeps its width of 24 (parts.looked_up.weight dim 0, parts.looked_up.bias dim 0)
reason: the dimension is looked up by index, in index at node getitem
to free it: Nothing, while entries are known by their numbers. Where indices are a regular part of the dimension, \
take it with slices, split or chunk: these follow a resize; constant indices do after fxwidth.untie_copies.""",
    "unknown": """\
'parts.unknown' keeps its width of 24 (parts.unknown.weight dim 0, parts.unknown.bias dim 0)
reason: no rule for this op, in fxwidth_tests::halves_swapped at node halves_swapped_default
to free it: A rule, which says of what axes the op's results are made (documentation, "A rule for an op of your own"):
    @fxwidth.rules.registry.rule('fxwidth_tests::halves_swapped')
    def its_axes(c):
        return [c.axes(...)]  # if the result has the axes of this operand""",
    "declined": """\
'parts.declined' keeps its width of 4 (parts.declined.weight dim 0, parts.declined.bias dim 0)
reason: its rule does not cover this call: a strided scatter, in slice_scatter at node slice_scatter
to free it: Write this step of the model with ops whose rules cover it, and report this text to fxwidth.""",
    "free": "'parts.free' is free: its width of 24 can change.",
}


@pytest.mark.parametrize("name", TOLD)
def test_reasons_in_words(graph, name):
    assert graph.why_pinned(f"parts.{name}") == TOLD[name]


def test_parts_of_one_dim_each_have_their_text(graph):
    told = graph.why_pinned("parts.unaligned.weight:0").split("\n\n")
    assert [text.splitlines()[0].split(" (")[0] for text in told] == [
        f"'parts.unaligned.weight:0' keeps its width of {size}" for size in (3, 8)
    ]
    for text in told:
        assert "\nreason: two factorings of one dimension cannot be aligned, in view at node view\n" in text
        assert text.endswith("Give the two ops numbers of groups or heads of which one divides the other.")


def test_groups_and_names_are_both_taken(graph):
    for group in graph.groups:
        assert graph.why_pinned(group) == graph.why_pinned(group.name)
        assert ("is free" in graph.why_pinned(group)) == (group.pinned is None)
    with pytest.raises(FxwidthError, match=r"there is no channel group 'parts.fre'; did you mean 'parts.free'"):
        graph.why_pinned("parts.fre")


class WithConstant(nn.Module):
    """A tensor that is neither a parameter nor a buffer is added to channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.constant = nn.Linear(3, 4), torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + self.constant).sum(1)


def test_constants_of_the_model():
    told = WidthGraph(analysed(as_one_node(WithConstant()), [torch.randn(2, 3)])).why_pinned("model.linear")
    assert told.splitlines()[1:] == [
        "reason: it must equal a dimension of fixed size, in add at node model, which is module 'model' (WithConstant)",
        "that dimension: it is a dimension of a tensor that the model holds as a constant",
        "to free it: Hold the tensor as a parameter or a buffer of a module: these are resized with the rest.",
    ]


def test_parameters_that_are_not_used():
    case = CASES["UnusedParameters"]
    told = WidthGraph(analysed(as_one_node(case.build()), case.inputs())).why_pinned("model.unused.bias")
    assert told.splitlines()[1] == "reason: the graph never uses this parameter"
    assert told.endswith(
        "Use it in forward, or delete it; what runs in training alone is not in a graph traced in eval mode."
    )


def test_long_lists_of_places_are_cut():
    chain = nn.Sequential(nn.Linear(3, 4), *(nn.LayerNorm(4) for _ in range(3)))
    told = WidthGraph(analysed(chain, [torch.randn(2, 3)])).why_pinned("0")
    assert told.startswith("'0' keeps its width of 4 (0.weight dim 0, 0.bias dim 0, 1.weight dim 0 and 5 more)\n")


def test_every_reason_has_a_remedy():
    public = {name: value for name, value in vars(pins).items() if name.isupper() and not name.startswith("_")}
    reasons = {value for value in public.values() if isinstance(value, str)}
    assert len(reasons) > 20
    assert reasons - {CONSTANT, NO_RULE} <= set(REMEDIES)


def test_rules_give_no_reason_that_has_no_remedy():
    """A reason written out in a rule would have no remedy: each is a name from `pins`."""
    folder = Path(fxwidth.__file__).parent / "rules"
    written_out = [
        f"{path.name}:{call.lineno}"
        for path in folder.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("pin", "pin_if_used", "fixed")
        and any(isinstance(argument, ast.Constant) and isinstance(argument.value, str) for argument in call.args)
    ]
    assert not written_out


def test_reasons_of_other_rules_have_a_remedy():
    assert remedy(Pin("my library needs it", "mylib::op at node a")) == (
        "What the op's rule says: change the model at that node."
    )


def test_equal_constants_keep_their_own_reasons():
    space = FactorSpace()
    first, second = Pin("the first reason"), Pin("the second reason")
    one, two = space.fresh(6), space.fresh(6)
    unify(space, one, space.product(constant(2, first), constant(3, first)))
    unify(space, two, space.product(constant(2, second), constant(3, second)))
    assert [str(axis[0][0].pinned) for axis in (one, two)] == [
        f"it must equal a dimension of fixed size: {reason}" for reason in (first, second)
    ]


def test_fixed_numbers_are_integers():
    number = Fixed(3, Pin("a reason"))
    assert (number, repr(number), number + 1, type(number * 1)) == (3, "3", 4, int)
