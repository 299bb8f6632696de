"""A bound of latency that the user measures is met as it is measured, and nothing of the graph changes for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import fxwidth
from fxwidth import Budget, FxwidthError, FxwidthWarning


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 4)]
    return nn.Sequential(*layers).double().eval(), torch.randn(8, 12, dtype=torch.float64)


def widths(gm: fx.GraphModule) -> tuple[int, int]:
    return gm.get_parameter("0.weight").shape[0], gm.get_parameter("2.weight").shape[0]


def linear(gm: fx.GraphModule) -> float:
    """Return seconds of a device on which one layer costs far more than its operations tell."""
    first, second = widths(gm)
    return 1e-4 + 1e-6 * first + 2e-5 * second


def in_steps(gm: fx.GraphModule) -> float:
    """Return seconds of a device that works in blocks of eight channels."""
    first, second = (-(-width // 8) for width in widths(gm))
    return 1e-5 * (1 + first * second + 3 * second)


@pytest.mark.parametrize("measure", [linear, in_steps])
@pytest.mark.parametrize("share", [0.8, 0.6])
def test_the_bound_is_met_as_it_is_measured(measure: Any, share: float) -> None:
    net, x = network()
    gm = fxwidth.trace(net, x)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    seen = list[fx.GraphModule]()

    def watched(copy: fx.GraphModule) -> float:
        seen.append(copy)
        assert not copy.training
        assert copy is not gm
        return float(measure(copy))

    plan = fxwidth.plan(fxwidth.analyze(gm), budget=Budget(latency=share, measure=watched))
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    assert not fxwidth.report(gm).resizes
    fxwidth.resize(gm, plan)
    told = plan.notes["measured"]
    present = told["present"] / 1e6
    assert measure(gm) == pytest.approx(told["planned"] / 1e6)
    assert measure(gm) <= share * present
    # It is not met by far more than it has to be.
    assert measure(gm) > 0.8 * share * present
    assert len(told["tried"]) <= 5
    assert f"of {told['limit']:,.0f} allowed" in str(plan)


def test_a_bound_in_microseconds_beside_another_bound() -> None:
    net, x = network()
    gm = fxwidth.evolve(net, x, budget=Budget(latency=400, params=0.9, measure=linear))
    assert linear(gm) <= 400e-6
    before, after = (sum(p.numel() for p in module.parameters()) for module in (network()[0], gm))
    assert after <= 0.9 * before


def test_what_no_widths_meet_is_told() -> None:
    net, x = network()
    calls = 0

    def at_first_quick(gm: fx.GraphModule) -> float:
        nonlocal calls
        calls += 1
        return linear(gm) if calls <= 4 else 1.0

    with pytest.warns(FxwidthWarning, match=r"latency=0\.7 was not met: the planned network takes 1,000,000\.0 micro"):
        plan = fxwidth.plan(fxwidth.analyze(fxwidth.trace(net, x)), budget=Budget(latency=0.7, measure=at_first_quick))
    assert plan.notes["measured"]["planned"] > plan.notes["measured"]["limit"]


def failing(gm: fx.GraphModule) -> float:
    if widths(gm)[0] < 40:
        raise RuntimeError("no such device")
    return 1.0


REFUSED: dict[str, tuple[Any, str]] = {
    "fails": (failing, r"measure= failed on a copy of the graph at 75% of its widths: RuntimeError: no such device"),
    "infinite": (lambda gm: float("inf"), r"measure= returned inf for a copy of the graph at 100% of its widths"),
    "nan": (lambda gm: float("nan"), r"measure= returned nan"),
    "negative": (lambda gm: -0.1, r"measure= returned -0\.1"),
    "none": (lambda gm: None, r"measure= returned None for a copy .*return the seconds of one forward pass"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_time_is_refused(name: str) -> None:
    measure, message = REFUSED[name]
    net, x = network()
    gm = fxwidth.trace(net, x)
    with pytest.raises(FxwidthError, match=message):
        fxwidth.evolve(gm, budget=Budget(latency=0.5, measure=measure))
    assert widths(gm) == (40, 24)


def test_what_measures_is_a_function_and_for_latency() -> None:
    with pytest.raises(FxwidthError, match=r"measure=3 must be a function of a graph"):
        Budget(latency=0.5, measure=3)  # type: ignore[arg-type]
    with pytest.raises(FxwidthError, match=r"measure= measures latency; give latency= too"):
        Budget(params=0.5, measure=linear)


def test_an_evolver_says_that_it_does_not_measure() -> None:
    net, x = network()
    gm = fxwidth.trace(net, x)
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    with pytest.raises(FxwidthError, match=r"an Evolver .*measure="):
        fxwidth.Evolver(gm, optimizer, budget=Budget(latency=0.5, measure=linear))
