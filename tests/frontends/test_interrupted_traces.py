"""Whatever ends a trace or an analysis on its way leaves the model, torch and Python as they were."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

import fxwidth
from fxwidth.tracing.analyze import analyze_module
from tests.oracles.interruptions import TRACERS, counted, differences, state_of

FEATURES: list[Tensor] = []


@fx.wrap
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@fx.wrap
def unrelated(x: Tensor) -> Tensor:
    """Is replaced while any model is traced; no model here mentions it."""
    return x


DOUBLED, UNRELATED = doubled, unrelated


class Kept(nn.Module):
    """Writes to a buffer, to a container and to a list outside of it; draws no numbers."""

    def __init__(self, assigns: bool = False) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.register_buffer("steps", torch.zeros(4))
        self.config = {"widths": [1, 2]}
        self.assigns = assigns

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        scale = torch.ones(4)
        if self.assigns:
            scale = torch.ones(4, dtype=x.dtype)
            scale[1:3] = 0.5  # what symbolic tracing does not follow
        FEATURES[:] = [scale]
        return doubled(self.down(torch.relu(self.norm(self.up(x))))) * scale + self.steps


class Looking(nn.Module):
    """Looks at values, so that it is called as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.down = Part(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.part(x))


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.seen = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.up(x)
        return self.seen if x.sum() < 1e9 else x


def traced(model: nn.Module) -> tuple[Callable[[], object], list[nn.Module]]:
    return lambda: fxwidth.trace(model, torch.ones(3, 6)), [model]


def analysed(model: nn.Module) -> tuple[Callable[[], object], list[nn.Module]]:
    gm = fxwidth.trace(model, torch.ones(3, 6))
    return lambda: analyze_module(gm, torch.ones(4, 6)), [model, gm]


CASES: dict[str, Callable[[], tuple[Callable[[], object], list[nn.Module]]]] = {
    "symbolic": lambda: traced(Kept().train()),
    "export": lambda: traced(Kept(assigns=True)),
    "leaves": lambda: traced(Looking()),
    "analysis": lambda: analysed(Kept()),
    "analysis of leaves": lambda: analysed(Looking()),
}


def assert_undone(name: str, choose: Callable[[dict[str, list[int]]], list[int]]) -> None:
    work, modules = CASES[name]()
    work()  # what is remembered of ops for the next time makes it go by fewer calls
    functions = counted(work, places=TRACERS).functions
    before, features = state_of(*modules), list(FEATURES)
    for point in choose(functions):
        counted(work, point, places=TRACERS)
        assert not differences(before, state_of(*modules)), f"interrupted at call {point}"
        assert (doubled, unrelated) == (DOUBLED, UNRELATED), f"interrupted at call {point}"
        assert all(one is other for one, other in zip(FEATURES, features, strict=True))
    work()


# Of what a trace makes most calls.
LONGEST = ("export", "leaves")


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_interruption_changes_nothing(name: str) -> None:
    def some(functions: dict[str, list[int]]) -> list[int]:
        count = 5 if name in LONGEST else 25
        tracers = [points for place, points in functions.items() if place.startswith(TRACERS)]
        tracing = sorted({point for points in tracers for point in (points[0], points[-1])})
        calls = [point for points in functions.values() for point in points]
        chosen = random.Random(0)
        return sorted({*chosen.sample(calls, count), *(chosen.sample(tracing, count) if name in LONGEST else tracing)})

    assert_undone(name, some)


def test_an_interruption_where_a_look_ends_by_an_error_leaves_the_modes() -> None:
    """Its contexts are then left late, and in no order: each must put back what was before all of them."""
    assert_undone(
        "leaves",
        lambda functions: sorted(
            {p for place, points in functions.items() if "readonly_runs.py" in place for p in (points[0], points[-1])}
        ),
    )


def test_an_interruption_is_heeded_where_torch_raises_an_error_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbolic tracing, which would be taken for one that has failed."""

    class Interrupted:
        def __init__(self) -> None:
            monkeypatch.undo()
            raise KeyboardInterrupt

    model = Kept()
    before = state_of(model)
    monkeypatch.setattr(_symbolic_trace, "_Patcher", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxwidth.trace(model, torch.ones(3, 6))
    assert not differences(before, state_of(model))


def test_a_trace_after_an_interruption_may_fail() -> None:
    model = Kept()
    model.down = nn.Linear(7, 4)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        # Of any kind: an interruption would end the tests.
        with pytest.raises(BaseException, match="shapes") as told:
            fxwidth.trace(model, torch.ones(3, 6))
    assert told.type is fxwidth.FxwidthError


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_interruption_of_any_function_changes_nothing(name: str) -> None:
    assert_undone(
        name,
        lambda functions: sorted({p for points in functions.values() for p in (points[0], points[-1])}),
    )
