"""An Evolver on the way to its target, at it, and across an interruption."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.evolution.evolver import parameter_count
from fxwidth.evolution.schedule import Phase, Schedule

SMALL, LARGE = 6, 24


def network(width: int = LARGE) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def traced(width: int = LARGE) -> fx.GraphModule:
    return fxwidth.trace(network(width), torch.randn(2, 8))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(32, 8, generator=generator) for _ in range(count)]
    return [(x, (x[:, :4] * x[:, 4:]).argmax(1)) for x in xs]


def trained(gm: fx.GraphModule, evolver: fxwidth.Evolver, optimizer: Any, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        evolver.step(x, y)


# -- the schedule ----------------------------------------------------------------------------------------------------


@given(st.integers(10, 10_000), st.integers(10, 10_000), st.integers(1, 12), st.floats(1.0, 3.0), st.floats(1.0, 2.0))
def test_costs_go_to_the_target_and_breathe_there(
    first: int, target: int, rounds: int, overshoot: float, breath: float
) -> None:
    schedule = Schedule({"params": first}, {"params": target}, rounds, overshoot, breath)
    costs = [schedule.budget_after(event).bounds["params"] for event in range(1, schedule.lead + 5)]
    way, at_it = costs[: schedule.lead], costs[schedule.lead :]
    assert way[-1] == target
    steps = way[:rounds]
    assert steps == sorted(steps, reverse=target < first)
    assert max(way) <= max(first, round(overshoot * target))
    assert at_it == [round(breath * target), target] * 2
    phases = [schedule.phase(event) for event in range(1, schedule.lead + 5)]
    assert phases[:rounds] == [Phase.APPROACH] * rounds
    assert phases[schedule.lead :] == [Phase.GROW, Phase.FOLD] * 2


# -- toward a target, and at it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [SMALL, LARGE])
def test_the_target_is_reached_from_below_and_from_above(width: int) -> None:
    gm = traced(width)
    evolver = fxwidth.Evolver(gm, every=1, rounds=3, params=500)
    counts = []
    for x, y in batches(5):
        before = gm(x)
        evolver.step(x, y)
        counts.append(parameter_count(gm))
        if width == SMALL:
            assert torch.allclose(gm(x), before, atol=1e-5)
    assert evolver.finished
    assert counts[2:] == [counts[2]] * 3
    assert 0.85 * 500 < counts[2] <= 500
    assert counts[:3] == sorted(counts[:3], reverse=width == LARGE)


def test_a_network_goes_beyond_its_target_on_the_way_up() -> None:
    gm = traced(SMALL)
    evolver = fxwidth.Evolver(gm, every=1, rounds=2, params=400, overshoot=1.5)
    counts = []
    for x, y in batches(4):
        evolver.step(x, y)
        counts.append(parameter_count(gm))
    assert counts[1] > 450
    assert counts[2] <= 400
    assert evolver.finished
    assert [record["phase"] for record in evolver.history] == ["approach", "approach", "fold"]


@pytest.mark.parametrize("directions", ["orthogonal", "tiny"])
def test_a_network_breathes_until_the_end_and_ends_at_its_target(directions: str) -> None:
    gm = traced(12)
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    options: dict[str, Any] = {"loss": F.cross_entropy} if directions == "tiny" else {}
    evolver = fxwidth.Evolver(gm, optimizer, every=5, rounds=1, params=250, stop=38, directions=directions, **options)
    trained(gm, evolver, optimizer, batches(50))
    assert evolver.finished
    phases = [record["phase"] for record in evolver.history]
    assert phases[0] == "approach"
    assert phases[1:] == ["grow", "fold"] * ((len(phases) - 1) // 2)
    assert len(phases) >= 3
    assert evolver.history[-1]["step"] <= 38
    for record in evolver.history:
        assert record["params_after"] <= (1.25 * 250 if record["phase"] == "grow" else 250)
    assert parameter_count(gm) <= 250


def test_breathing_finds_other_widths_than_those_it_began_with() -> None:
    """All at the front: the task needs channels behind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3), nn.ReLU(), nn.Linear(3, 4))
    gm = fxwidth.trace(model, torch.randn(2, 8))
    first = parameter_count(gm)
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    evolver = fxwidth.Evolver(gm, optimizer, every=20, rounds=1, params=1.0, breaths=6)
    trained(gm, evolver, optimizer, batches(300))
    assert gm.get_parameter("2.weight").shape[0] > 3
    assert parameter_count(gm) <= first


def test_breathing_ends_where_the_loss_is_no_longer_better() -> None:
    gm = traced(12)
    evolver = fxwidth.Evolver(gm, every=1, rounds=1, params=250, stop=1000, loss=F.cross_entropy)
    for x, y in batches(40):
        evolver.step(x, y)  # without training
    assert evolver.finished
    assert 5 <= len(evolver.history) <= 12
    assert evolver.history[-1]["phase"] == "fold"


def test_there_are_so_many_breaths() -> None:
    gm = traced(12)
    evolver = fxwidth.Evolver(gm, every=1, rounds=2, params=250, breaths=3)
    for x, y in batches(20):
        evolver.step(x, y)
    assert len(evolver.history) == 2 + 2 * 3
    assert evolver.finished


# -- when ------------------------------------------------------------------------------------------------------------


def test_epochs_are_counted() -> None:
    gm = traced()
    evolver = fxwidth.Evolver(gm, every="epoch", start=1, rounds=2, params=0.5)
    found = []
    for _ in range(4):
        for x, y in batches(3):
            assert evolver.step(x, y) is None
        found.append(evolver.epoch() is not None)
    assert found == [False, True, True, False]
    assert [record["step"] for record in evolver.history] == [6, 9]


def test_a_plateau_is_waited_for() -> None:
    gm = traced()
    evolver = fxwidth.Evolver(gm, every="epoch", patience=2, rounds=2, params=0.5)
    x, y = batches(1)[0]
    evolver.step(x, y)
    metrics = [3.0, 2.0, 2.5, 2.1, 1.0, 1.5, 1.0, 0.5]
    assert [evolver.epoch(metric) is not None for metric in metrics] == [False] * 3 + [True, False, False, True, False]
    with pytest.raises(FxwidthError, match=r"epoch\(metric\) needs a finite number with patience=, but received None"):
        fxwidth.Evolver(traced(), every="epoch", patience=2, params=0.5).epoch()


def test_a_group_does_not_go_to_and_fro_by_thresholds() -> None:
    """The last singular value is between the two thresholds: it would shrink after it has grown."""
    gm = traced(SMALL)
    evolver = fxwidth.Evolver(gm, every=1, grow_step=4, grow_energy=0.0, shrink_energy=0.3, cooldown=3)
    turns: dict[str, list[tuple[int, int]]] = {}
    for event, (x, y) in enumerate(batches(12)):
        evolver.step(x, y)
        for name, (old, new) in evolver.history[-1]["widths"].items():
            turns.setdefault(name, []).append((event, 1 if new > old else -1))
    reversals = [
        second[0] - first[0]
        for of_group in turns.values()
        for first, second in pairwise(of_group)
        if first[1] != second[1]
    ]
    assert all(gap > 3 for gap in reversals)


# -- an interrupted run ----------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[fx.GraphModule, Any], fxwidth.Evolver]] = {
    "approach": lambda gm, optimizer: fxwidth.Evolver(gm, optimizer, every=4, rounds=6, params=0.4),
    "breathing": lambda gm, optimizer: fxwidth.Evolver(
        gm, optimizer, every=3, rounds=2, params=0.6, stop=40, loss=F.cross_entropy, directions="tiny"
    ),
    "thresholds": lambda gm, optimizer: fxwidth.Evolver(gm, optimizer, every=5, shrink_energy=0.02),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_to_the_same_result(kind: str, tmp_path: Any) -> None:
    make, data = KINDS[kind], batches(40)
    whole = traced()
    optimizer = torch.optim.Adam(whole.parameters(), lr=1e-2)
    evolver = make(whole, optimizer)
    trained(whole, evolver, optimizer, data)

    gm = traced()
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    interrupted = make(gm, optimizer)
    trained(gm, interrupted, optimizer, data[:17])
    fxwidth.save(gm, tmp_path / "graph.pt")
    file = io.BytesIO()
    torch.save({"evolver": interrupted.state_dict(), "optimizer": optimizer.state_dict()}, file)

    again = fxwidth.load(tmp_path / "graph.pt", trusted=True)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    optimizer = torch.optim.Adam(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(saved["optimizer"])
    resumed = make(again, optimizer)
    resumed.load_state_dict(saved["evolver"])
    trained(again, resumed, optimizer, data[17:])

    assert resumed.history == evolver.history
    wanted = whole.state_dict()
    assert {name: t.shape for name, t in again.state_dict().items()} == {name: t.shape for name, t in wanted.items()}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())


def test_a_state_that_does_not_fit_is_refused() -> None:
    evolver = fxwidth.Evolver(traced(), params=0.5)
    state = evolver.state_dict()
    before = copy.deepcopy(evolver.state_dict())
    for wrong, words in (
        ({}, "takes what Evolver.state_dict returned, but received a dict with"),
        (3, "but received int"),
        (
            {**state, "progress": {**state["progress"], "version": 9}},
            "the state is of version 9, and this is version 1",
        ),
        (
            fxwidth.Evolver(traced(), budget=fxwidth.Budget(flops=0.5)).state_dict(),
            "a target of flops, and this Evolver",
        ),
        ({**state, "gathered": None}, "the state of gathered batches is NoneType"),
        ({**state, "progress": {**state["progress"], "target": {"params": 3}}}, "out of reach"),
    ):
        with pytest.raises(FxwidthError, match=words):
            evolver.load_state_dict(wrong)  # type: ignore[arg-type]
        assert evolver.state_dict() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": 100, "params": 0.5}, "stop=100 comes before the target: 8 resizes end at step 1600"),
        ({"stop": 0}, "stop= is the step after which nothing changes any more, a whole number of at least 1"),
        ({"overshoot": 0.5, "params": 2.0}, "overshoot= is the ratio .*, a number of at least 1, but received 0.5"),
        ({"breath": "a", "params": 2.0}, "breath= is the ratio .*, a number of at least 1, but received 'a'"),
        ({"breaths": 2}, "breaths=2 needs params= or budget= to go to"),
        ({"overshoot": 1.5}, "overshoot=1.5 needs params= or budget= to go to"),
        ({"patience": 2, "params": 0.5}, "patience=2 waits for epochs .* give every='epoch' too"),
        ({"policy": "budget"}, "policy='budget' needs params= or budget= to go to"),
        ({"policy": "thresholds", "params": 0.5}, "policy='thresholds' goes by the spectrum"),
        ({"policy": "both"}, "policy='both' must be 'budget' or 'thresholds'"),
    ],
)
def test_bad_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FxwidthError, match=words):
        fxwidth.Evolver(traced(), **options)
    with pytest.raises(FxwidthError, match=r"epoch\(\) counts epochs, and every=200 counts steps"):
        fxwidth.Evolver(traced(), params=0.5).epoch()
