"""Wrong rules planted on purpose: a check that cannot fail is no check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.axes.factors import constant
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.rules import contraction, normalization, views
from fxwidth.rules.registry import LITERAL_RULES, RULES, RuleContext, broadcast_all, revised
from fxwidth.verification.replay_oracle import replay_difference
from tests.fuzz.networks import seeded_program
from tests.oracles.judges import analysed, random_maps
from tests.oracles.rules import check_permutations, check_prescription, coupled_without_need, make_probe, removal
from tests.oracles.samples import ROWS
from tests.oracles.values import assert_samples_apart, check_copies, check_growth, check_training
from tests.rules.test_literals import check_other_literals
from tests.zoo.networks import CASES


def swapped_groups(c: RuleContext) -> Any:
    """A convolution whose groups are the minor part of its channels."""
    signal, weight = c.axes("input"), c.axes("weight")
    group, into = c.fresh(c["groups"]), c.fresh(c.shape("input")[1] // c["groups"])
    out = c.fresh(c.outputs[0].shape[1] // c["groups"])
    c.pin([*signal[2:], *weight[2:]], "a position")
    c.unify(signal[1], ((into, group),))
    c.unify(weight[1], into)
    c.unify(weight[0], ((out, group),))
    c.contract("input", (1,), "weight", (1,))
    channels = c.space.product(out, group)
    if "bias" in c:
        c.unify(channels, c.axes("bias")[0])
    return [[signal[0], channels, *map(c.fixed, c.outputs[0].shape[2:])]]


def reversed_cat(c: RuleContext) -> Any:
    """A concatenation whose parts come in the other order."""
    parts = [c.axes(tensor) for tensor in c["tensors"]][::-1]
    dim = c.dim(c["dim"], c.outputs[0].dim())
    for part in parts[1:]:
        for k, axis in enumerate(part):
            if k != dim:
                c.unify(parts[0][k], axis)
    joined = c.space.concatenation(part[dim] for part in parts)
    return [[joined if k == dim else axis for k, axis in enumerate(parts[0])]]


def reversed_view(c: RuleContext) -> Any:
    """A view that takes the last of its dims for the major one."""
    sizes = [size for size in c.outputs[0].shape if size > 1]
    if len(c.axes("self")) >= len(sizes):
        return views._view(c)
    signal = c.axes("self")
    parts = c.factored(signal[1], *c.outputs[0].shape[:0:-1])
    return [[signal[0], *parts[::-1]]]


def uncoupled_add(c: RuleContext) -> Any:
    """An addition whose second operand may have any width."""
    return [c.axes("self")] if c.axes("self") else broadcast_all(c)


def coupled_matmul(c: RuleContext) -> Any:
    """A matrix product whose result is square wherever it can be."""
    result = contraction._mm(c)
    if c.outputs[0].shape[0] == c.outputs[0].shape[1]:
        c.unify(*result[0])
    return result


def fearful_transpose(c: RuleContext) -> Any:
    """A transposition that pins without need."""
    c.pin(c.axes("self"), "fear")
    return [[constant(size) for size in c.outputs[0].shape]]


def unchanged_literals(call: Any, maps: Any) -> Any:
    """A literal_rule that keeps the old literals."""
    return revised(call)


def freed(c: RuleContext) -> Any:
    """A rule that lets any size change."""
    return [c.axes("self")]


def other_eps(call: Any, maps: Any) -> Any:
    """A literal_rule of a norm that has another eps."""
    return normalization._normalized_shape(call, maps)[0], {
        **normalization._normalized_shape(call, maps)[1],
        "eps": 0.1,
    }


def one_group(call: Any, maps: Any) -> Any:
    """A literal_rule of a group norm that takes all channels together."""
    func, arguments = normalization._group_norm_sizes(call, maps)
    return func, {**arguments, "group": 1}


def plant(monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], name: str, fault: Callable[..., Any]) -> None:
    assert name in table or fault is uncoupled_add
    monkeypatch.setitem(table, name, fault)


class Split(nn.Module):
    """Unfolds 12 channels into 3 x 4 and sums over one of the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x).view(-1, 3, 4).sum(1))


class Between(nn.Module):
    """Does something between two layers."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(5, 12), middle, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.into(x)))


class _InList(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


class Strided(nn.Module):
    """Transposes each matrix of 8 x 8 by its strides: a view of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.into(x))
        return self.out(y.as_strided((x.shape[0], 8, 8), (64, 1, 8)))


class Sum(nn.Module):
    """Adds two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x) + self.b(x))


def _hard_case(name: str) -> tuple[nn.Module, list[Tensor]]:
    return CASES[name].build(), CASES[name].inputs()


REPLAYED = {
    "groups swapped with channels": (RULES, "convolution", swapped_groups, lambda: _hard_case("ShuffledGroups")),
    "cat reversed": (RULES, "cat", reversed_cat, lambda: _hard_case("JoinedThenFlattened")),
    "view reversed": (RULES, "view", reversed_view, lambda: (Split(), [torch.randn(2, 5)])),
    "coupling missing": (RULES, "add", uncoupled_add, lambda: (Sum(), [torch.randn(2, 5)])),
    "literals kept": (LITERAL_RULES, "view", unchanged_literals, lambda: (Split(), [torch.randn(2, 5)])),
    "flip freed": (RULES, "flip", freed, lambda: (Between(lambda h: h.flip(-1)), [torch.randn(2, 5)])),
    "roll freed": (RULES, "roll", freed, lambda: (Between(lambda h: h.roll(2, -1)), [torch.randn(2, 5)])),
    "as_strided freed": (RULES, "as_strided", freed, lambda: (Strided(), [torch.randn(2, 8, 6)])),
    "layer norm with another eps": (
        LITERAL_RULES,
        "native_layer_norm",
        other_eps,
        lambda: (Between(nn.LayerNorm(12)), [torch.randn(2, 5)]),
    ),
    "group norm of one group": (
        LITERAL_RULES,
        "native_group_norm",
        one_group,
        lambda: (Between(nn.GroupNorm(3, 12)), [torch.randn(2, 5)]),
    ),
}


@pytest.mark.parametrize("fault", REPLAYED)
def test_the_replay_oracle_sees(fault, monkeypatch):
    table, name, wrong, build = REPLAYED[fault]
    model, inputs = build()
    good = analysed(model, inputs)
    assert replay_difference(good, random_maps(good, 0.5), inputs) < 1e-9
    plant(monkeypatch, table, name, wrong)
    bad = analysed(model, inputs)
    try:
        difference = replay_difference(bad, random_maps(bad, 0.5), inputs)
    except FxwidthError:
        return  # the sliced tensors do not even fit
    assert difference > 1e-2


PERMUTED = {
    "groups swapped with channels": ("convolution", swapped_groups),
    "cat reversed": ("cat", reversed_cat),
    "view reversed": ("view", reversed_view),
    "coupling missing": ("add", uncoupled_add),
}


def _rows_of(name: str) -> list[Any]:
    return [row for row in ROWS if row.op.partition(".")[0] == name and row.by_value]


@pytest.mark.parametrize("fault", PERMUTED)
def test_the_rule_oracle_sees(fault, monkeypatch):
    name, wrong = PERMUTED[fault]
    plant(monkeypatch, RULES, name, wrong)
    seen = 0
    for row in _rows_of(name):
        try:
            check_permutations(make_probe(row))
        except (AssertionError, RuntimeError):
            seen += 1
    assert seen


@pytest.mark.parametrize(
    ("name", "wrong", "equal"), [("mm", coupled_matmul, 8), ("transpose", fearful_transpose, None)]
)
def test_needless_caution_is_seen(name, wrong, equal, monkeypatch):
    plant(monkeypatch, RULES, name, wrong)
    row, *_ = _rows_of(name)
    probe = make_probe(row, equal)
    assert (len(probe.factors()), probe.fixed_dims()) != (row.free, row.pinned)
    assert coupled_without_need(probe)


def test_a_view_by_strides_taken_for_an_alias_is_seen(monkeypatch):
    monkeypatch.setattr(views, "_is_alias", lambda call, shape: list(call.arguments["size"]) == list(shape))
    inputs = [torch.randn(2, 8, 6)]
    analysis = analysed(Strided(), inputs)
    assert WidthGraph(analysis)["into"].pinned is None
    assert replay_difference(analysis, random_maps(analysis, 0.5), inputs) > 1e-2
    # The sample that its author thought of is right; one with other strides is not.
    row = _rows_of("as_strided")[0]
    check_permutations(make_probe(row))
    with pytest.raises(AssertionError, match="as_strided with stride="):
        check_other_literals(row)


VALUES = {
    "cat reversed": (check_growth, RULES, "cat", reversed_cat),
    "copies of a reversed cat": (check_copies, RULES, "cat", reversed_cat),
}


@pytest.mark.parametrize("fault", VALUES)
def test_the_values_of_random_networks_show(fault, monkeypatch):
    check, table, name, wrong = VALUES[fault]
    plant(monkeypatch, table, name, wrong)
    failed = 0
    for seed in range(8):
        try:
            check(seeded_program(seed, ops=("cat", "pointwise conv")))
        except (AssertionError, FxwidthError):
            failed += 1
    assert failed


def test_lost_gradients_are_seen(monkeypatch):
    resize = fxwidth.resize

    def freezing(module: Any, plan: Any) -> None:
        resize(module, plan)
        next(module.parameters()).requires_grad_(False)

    monkeypatch.setattr(fxwidth, "resize", freezing)
    with pytest.raises(AssertionError, match=r"gradients of \{'stems"):
        check_training(seeded_program(0, ops=("pointwise conv", "relu")))


def test_samples_that_see_each_other_are_seen():
    middle = nn.Sequential(Between(lambda h: h - h.mean(0)), _InList())
    module = fxwidth.trace(middle.double().eval(), torch.randn(3, 5).double())
    with pytest.raises(AssertionError, match="samples beside others"):
        assert_samples_apart(module, torch.randn(3, 5).double())


def test_a_wrong_prescription_is_seen(monkeypatch):
    plant(monkeypatch, LITERAL_RULES, "view", unchanged_literals)
    probe = make_probe(_rows_of("view")[0])
    generator = np.random.default_rng(0)
    with pytest.raises((AssertionError, RuntimeError)):
        check_prescription(probe, {factor: removal(factor, generator) for factor in probe.factors()})
