"""Widths that a plan asks of a module are those that it gets: tried before, or others near by, or none."""

import pytest
import torch
from torch import nn

import fxwidth
from fxwidth.modules.holdings import Holdings, Tie
from fxwidth.modules.probing import module_holdings


def _near(widths):
    return ({name: width - less for name, width in widths.items()} for less in range(20))


def test_the_first_widths_that_are_not_refused_are_taken():
    held = Holdings(narrower=_near, problem=lambda widths: "odd" if widths["a"] % 2 else None)
    assert held.settled({"a": 8}, lambda name, width: True) == {"a": 8}
    assert held.settled({"a": 7}, lambda name, width: True) == {"a": 6}
    assert held.settled({"a": 7}, lambda name, width: width % 4 == 0) == {"a": 4}


def test_groups_are_rounded_down_at_once_before_one_is_made_narrower_step_by_step():
    one_by_one = lambda widths: ({**widths, "a": widths["a"] - less} for less in range(9))  # noqa: E731
    held = Holdings(narrower=one_by_one, problem=lambda widths: "odd" if widths["b"] % 4 else None)
    assert held.settled({"a": 32, "b": 23}, lambda name, width: True) == {"a": 32, "b": 20}
    assert held.settled({"a": 31, "b": 24}, lambda name, width: True) == {"a": 31, "b": 24}


def test_that_all_are_refused_is_told_with_the_first_reason():
    held = Holdings(narrower=_near, problem=lambda widths: f"not {widths['a']}")
    with pytest.raises(fxwidth.FxwidthError, match=r"'a' to 7.*: not 7\. Ask for another budget, or keep"):
        held.settled({"a": 7}, lambda name, width: True)


class InFours(nn.Module):
    """Its code runs at widths that are multiples of four."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.shape[1] % 4:
            raise ValueError("not in fours")
        return self.last(x.relu())


def test_a_plan_asks_the_module_at_the_very_widths():
    model = InFours().double()
    gm = fxwidth.trace(model, torch.randn(2, 6, dtype=torch.float64))
    graph = fxwidth.analyze(gm)
    group = graph.free[0].name
    for width in (10, 11, 14):
        with pytest.raises(fxwidth.FxwidthError, match="not in fours"):
            fxwidth.plan(graph, max_width=width, min_width=width, shrink_energy=0, for_module=model)
    for share in (0.4, 0.6, 0.7):
        plan = fxwidth.plan(graph, params=share, for_module=model)
        assert plan.widths[group] % 4 == 0
    assert fxwidth.write_back(fxwidth.resize(gm, plan), model).first.out_features == plan.widths[group]


def test_groups_that_go_together_are_rounded_together():
    held = Holdings([Tie({"a": 1, "b": 3}, "")], problem=lambda widths: "odd" if widths["a"] % 2 else None)
    assert held.settled({"a": 7, "b": 21, "c": 5}, lambda name, width: True) == {"a": 6, "b": 18, "c": 4}
    assert held.settled({"a": 8, "b": 24, "c": 5}, lambda name, width: True) == {"a": 8, "b": 24, "c": 5}


class CutInHalves(nn.Module):
    """Some layers, and then one that is cut into equal parts, whose halves go ways of their own."""

    def __init__(self, before: int, is_second_first: bool) -> None:
        super().__init__()
        self.before = nn.Sequential(*(nn.Linear(6 if n == 0 else 16, 16) for n in range(before)))
        self.both = nn.Linear(16 if before else 6, 32)
        self.one, self.other, self.last = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 3)
        self.is_second_first = is_second_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.both(self.before(x).tanh()).tanh().chunk(2, 1)
        parts = [self.one(a), self.other(b)]
        return self.last(torch.cat(parts[::-1] if self.is_second_first else parts, 1))


@pytest.mark.parametrize("is_second_first", [False, True])
@pytest.mark.parametrize("before", range(6))
def test_halves_that_one_chunk_makes_go_together_wherever_they_are(before: int, is_second_first: bool) -> None:
    """Halves that differ by one are what `chunk` gives of an odd width, if the first is the greater one."""
    model = CutInHalves(before, is_second_first).double()
    graph = fxwidth.analyze(fxwidth.trace(model, torch.randn(2, 6, dtype=torch.float64)))
    holdings = module_holdings(graph, model)
    assert {"both#0", "both#1"} <= {group.name for group in graph.free}
    assert [tie.units for tie in holdings.ties if "both#0" in tie.units] == [{"both#0": 1, "both#1": 1}]
