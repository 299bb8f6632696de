"""Whatever ends a look at a graph on its way, by Ctrl-C or an error, leaves the graph and torch as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.costs import latency
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.passes import PlanWidths
from fxwidth.rewriting import looks
from fxwidth.rewriting.transaction import Transaction
from fxwidth.statistics.remembered_noise import forget_noise
from tests.oracles.interruptions import Work, assert_undone, counted, differences


class Remembering(nn.Module):
    """Writes to a number, a buffer and tensors in attributes at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.register_buffer("steps", torch.zeros(()))
        self.sums, self.calls = [torch.zeros(()) for _ in range(3)], 0
        self.values = torch.zeros(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps.add_(1.0)
        for one in (*self.sums, self.values):
            one.add_(x.detach().mean())
        return x * self.scale


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Remembering) or super().is_leaf_module(m, module_qualified_name)


def graph() -> fx.GraphModule:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Remembering(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4 * 9, 3),
    ).train()  # fmt: skip
    model[1].eval()
    return fxwidth.trace(fx.GraphModule(model, _Tracer().trace(model)), images())


def images() -> Tensor:
    return torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def looked(look: Callable[[WidthGraph], object]) -> Work:
    """A look that finds everything anew every time."""
    gm = graph()
    found = fxwidth.analyze(gm)

    def run() -> object:
        forget_noise(gm)
        latency.LATENCIES.clear()
        found.memo.clear()
        found.analysis.memo.clear()
        return look(found)

    return Work(run, [gm])


def planned(**options: Any) -> Work:
    return looked(lambda found: fxwidth.plan(found, **options))


def passed() -> Work:
    gm = graph()
    # The notes of the analysis, which comes first, stay.
    return Work(lambda: (forget_noise(gm), PlanWidths(params=0.7, data=[images()])(gm)), list(gm.children()))


def on_a_graph(look: Callable[[fx.GraphModule], object]) -> Work:
    gm = graph()
    # The notes of the analysis are made anew.
    return Work(lambda: look(gm), list(gm.children()))


def loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


CASES: dict[str, Callable[[], Work]] = {
    "plan with data": lambda: planned(params=0.6, data=[images()]),
    "plan without data": lambda: planned(params=0.6),
    "plan with a loss": lambda: planned(params=0.6, data=[(images(), torch.ones(6, 3))], loss=loss),
    "spectrum": lambda: looked(fxwidth.spectrum),
    "latency": lambda: looked(lambda found: fxwidth.cost_polynomial(found, "latency")),
    "memory": lambda: looked(lambda found: fxwidth.cost_polynomial(found, "activation_memory")),
    "pass": passed,
    "analyze": lambda: on_a_graph(fxwidth.analyze),
    # It has no copies, and stays as it is.
    "untie": lambda: on_a_graph(fxwidth.untie_copies),
}


# Of the calls of a look, how many at its end are not interrupted.
_SPARED = 20


@pytest.fixture(autouse=True)
def timed_by_as_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """How often an op is called to be timed must not depend on the machine."""
    monkeypatch.setattr(latency, "_LEAST_SECONDS", 0.0)


@pytest.mark.parametrize("case", CASES)
def test_an_interruption_changes_nothing(case: str) -> None:
    work, chance = CASES[case](), random.Random(0)
    work.run()  # what is remembered of ops for the next time makes it go by fewer calls
    found = counted(work.run)
    assert_undone(work, chance.sample(range(1, found.count - _SPARED), 6))
    # Once in each function that contexts put things back by: what they have not yet put back stays.
    # What torch remembers makes a later run shorter by a call or two, so that the last ones may not be reached.
    leaving = (chance.choice(points) for points in found.leaving.values())
    assert_undone(work, [point for point in leaving if point < found.count - _SPARED])
    # And it can be done after all.
    work.run()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_interruption_wherever_something_is_put_back_changes_nothing(case: str) -> None:
    work = CASES[case]()
    work.run()
    found = counted(work.run)
    points = chain.from_iterable(found.leaving.values())
    assert_undone(work, sorted(point for point in points if point < found.count - _SPARED))


@pytest.mark.parametrize("case", [case for case in CASES if case != "pass"])
def test_a_look_changes_nothing(case: str) -> None:
    work = CASES[case]()
    before = work.state()
    work.run()
    assert not differences(before, work.state())


def test_a_look_inside_of_a_resize_is_part_of_that(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[nn.Module] = []

    class Noted(Transaction):
        def __init__(self, *modules: nn.Module, is_run_only: bool = False) -> None:
            begun.extend(modules)
            super().__init__(*modules, is_run_only=is_run_only)

    monkeypatch.setattr(looks, "Transaction", Noted)
    budget = fxwidth.Budget(params=0.6, activation_memory=0.99)
    model, gm, other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), graph(), graph()

    def scores(group: ChannelGroup, _: WidthGraph) -> range:
        fxwidth.plan(fxwidth.analyze(other), budget=budget)
        return range(group.width)

    fxwidth.evolve(model, torch.randn(2, 4), budget=budget)
    fxwidth.evolve(gm, budget=budget)
    assert begun == []
    fxwidth.plan(fxwidth.analyze(gm), budget=budget)
    assert begun == [gm]
    # A resize puts nothing of another model back.
    fxwidth.resize(gm, {fxwidth.analyze(gm).free[0].name: 1}, selection=scores)
    assert set(begun[1:]) == {other}
