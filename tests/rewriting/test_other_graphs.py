"""Graphs of one model: a resize through one of them leaves the others as they were, never half of each."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from tests.oracles.interruptions import differences, state_of
from tests.rewriting.test_originals import Bare, Exported, Scaled, Written, answer, features, set_apart


class Normed(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x)) * self.scale + self.shift))


class Frozen(Normed):
    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bare": (Bare, "resized"),
    "normed": (Normed, "resized"),
    "frozen": (Frozen, "resized"),
    "sequential": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), "resized"),
    "written": (Written, "untouched"),
    "scaled": (Scaled, "untouched"),
    "exported": (Exported, "resized"),
}
by_case = pytest.mark.parametrize("name", CASES)


def to(gm: fx.GraphModule, width: int) -> fx.GraphModule:
    return fxwidth.resize(gm, {group.name: width for group in fxwidth.analyze(gm).free})


def tensors(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}


def same(one: nn.Module, other: nn.Module) -> bool:
    x = features()
    x = torch.cat([x, x[:1]])
    return all(torch.equal(answer(one, x, mode), answer(other, x, mode)) for mode in (True, False))


@by_case
def test_another_graph_stays_as_it_was(name: str) -> None:
    make, told = CASES[name]
    torch.manual_seed(0)
    model, x = set_apart(make()).eval(), features()
    first, second = fxwidth.trace(model, x), fxwidth.trace(model, x)
    twin, other_twin = copy.deepcopy(model), copy.deepcopy(second)
    fxwidth.resize(first, {group.name: group.width // 2 for group in fxwidth.analyze(first).free}, data=[x])
    assert fxwidth.report(first).resizes[-1]["original"] == told
    assert same(copy.deepcopy(second), other_twin)
    assert not tensors(first) & tensors(second)
    if told == "untouched":
        # The two that stayed still have everything in common.
        assert tensors(second) == tensors(model)
        assert same(copy.deepcopy(model), twin)
    else:
        assert tensors(first) == tensors(model)
        assert same(copy.deepcopy(model), copy.deepcopy(first))
    # It can be resized in its turn, which changes nothing of the first one.
    before = copy.deepcopy(first)
    fxwidth.resize(second, {group.name: group.width - 2 for group in fxwidth.analyze(second).free}, data=[x])
    assert same(copy.deepcopy(first), before)
    assert answer(second, x, True).shape == (4, 3)


def test_a_graph_of_a_part_and_one_of_the_whole() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), set_apart(Bare())).eval(), features()
    whole, part = fxwidth.trace(model, x), fxwidth.trace(model[1], x)
    twin = copy.deepcopy(whole)
    to(part, 5)
    assert same(whole, twin)
    assert model[1].scale.shape == (5,)
    assert model(x).shape == (4, 3)


@pytest.mark.parametrize("name", ["normed", "written"])
def test_an_interrupted_resize_leaves_both_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = CASES[name][0]().eval(), features()
    first, second = fxwidth.trace(model, x), fxwidth.trace(model, x)
    plan = {group.name: 5 for group in fxwidth.analyze(first).free}
    before = [state_of(module) for module in (model, first, second)]

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxwidth.resizing.resize.forget_noise", broken)
    with pytest.raises(KeyboardInterrupt):
        fxwidth.resize(first, plan)
    for module, state in zip((model, first, second), before, strict=True):
        assert not differences(state, state_of(module))
    assert tensors(first) == tensors(second) == tensors(model)
    monkeypatch.undo()
    to(second, 5)
    assert first(x).shape == second(x).shape


def test_graphs_that_are_gone_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Bare(), features()
    copied: list[Tensor] = []
    monkeypatch.setattr("fxwidth.rewriting.originals.twin", lambda tensor, _: copied.append(tensor))
    gc.disable()
    try:
        for width in (7, 6, 5):
            to(fxwidth.trace(model, x), width)
    finally:
        gc.enable()
    assert not copied
    assert model.scale.shape == (5,)
