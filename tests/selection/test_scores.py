"""Channels in the order of scores that a function gives: everywhere where a method is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import ChannelGroup, FxwidthError, WidthGraph
from fxwidth.analysis.roles import Role
from fxwidth.passes import AnalyzeWidths, PlanWidths, ResizeWidths
from tests.zoo.nets import batch_norm_bottleneck, build, images, trained_like

X = images(16)


def network() -> nn.Module:
    torch.manual_seed(0)
    return trained_like(batch_norm_bottleneck())


def traced() -> fx.GraphModule:
    return fxwidth.trace(network(), X[:4])


def last_first(group: ChannelGroup, width_graph: WidthGraph) -> Tensor:
    """Score channels by their number."""
    assert group in width_graph.free
    return torch.arange(group.width)


def largest_rows(group: ChannelGroup, width_graph: WidthGraph) -> list[float]:
    """Score channels by the squares of what writes them, found by the positions of sites."""
    scores = np.zeros(group.width)
    for site in group.sites_as(Role.WRITER):
        tensor = width_graph.analysis.parameters[site.parameter].tensor.detach()
        squares = tensor.movedim(site.dim, 0).reshape(tensor.shape[site.dim], -1).square().sum(1).numpy()
        scores += [float(squares[own].sum()) for own in site.positions]
    return scores.tolist()


@pytest.mark.parametrize("fold", [False, True])
def test_the_highest_scores_stay(fold: bool) -> None:
    gm = traced()
    fxwidth.resize(gm, {"0": 4, "2": 3, "4": 7}, selection=last_first, fold=fold, exact=False)
    record = fxwidth.report(gm).resizes[-1]
    assert record["kept"] == {"0": [2, 3, 4, 5], "2": [5, 6, 7], "4": [0, 1, 2, 3, 4]}
    # Scores are of the channels as they are.
    assert record["rotated"] == record["named"] == []
    assert record["selection"] == "tests.selection.test_scores.last_first"
    assert "channels chosen by tests.selection.test_scores.last_first" in str(fxwidth.report(gm))
    named = traced()
    fxwidth.resize(named, {"0": [2, 3, 4, 5], "2": [5, 6, 7], "4": 7}, fold=fold, exact=False)
    assert all(torch.equal(a, b) for a, b in zip(gm.parameters(), named.parameters(), strict=True))


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_of_equal_scores_the_first_channels_stay(form: Callable[[Any], Any]) -> None:
    gm = traced()
    scores = np.full(8, 0.1)
    scores[6] += 1e-12
    fxwidth.resize(gm, {"2": 3}, selection=lambda *_: form(scores))
    assert fxwidth.report(gm).resizes[-1]["kept"] == {"2": [0, 1, 6]}


FORMS: dict[str, Callable[[ChannelGroup], Any]] = {
    "integers": lambda group: list(range(group.width)),
    "numpy": lambda group: np.arange(group.width, dtype=np.float32)[::-1][::-1],
    "half precision": lambda group: torch.arange(group.width, dtype=torch.bfloat16),
    "with a gradient": lambda group: torch.arange(group.width, dtype=torch.float64, requires_grad=True) * 2,
    "a tuple of tensors": lambda group: tuple(torch.arange(group.width)),
    "a range": lambda group: range(group.width),
}


@pytest.mark.parametrize("form", FORMS)
def test_scores_of_every_form(form: str) -> None:
    gm = traced()
    fxwidth.resize(gm, {"2": 3}, selection=lambda group, _: FORMS[form](group), fold=False)
    assert fxwidth.report(gm).resizes[-1]["kept"] == {"2": [5, 6, 7]}


@pytest.mark.parametrize("name", ["conv", "grouped", "tile", "attention", "packed attention"])
def test_rows_found_by_positions(name: str) -> None:
    graph, _ = build(name)
    gm, other = (fxwidth.trace(build(name)[0].analysis.module, build(name)[1][:4]) for _ in range(2))
    plan = {group.name: max(group.least.width, group.width // 2) for group in graph.free}
    fxwidth.resize(gm, plan, selection=largest_rows, fold=False)
    kept = fxwidth.report(gm).resizes[-1]["kept"]
    for group, channels in kept.items():
        scores = np.array(largest_rows(graph[group], graph))
        assert scores[channels].min() >= np.delete(scores, channels).max()
    fxwidth.resize(other, kept, fold=False)
    assert all(torch.equal(a, b) for a, b in zip(gm.parameters(), other.parameters(), strict=True))


def passes(gm: fx.GraphModule, **options: Any) -> None:
    options = {**options, "rotate": False}
    AnalyzeWidths()(gm)
    PlanWidths(params=0.6, **options)(gm)
    ResizeWidths(**options)(gm)


WAYS: dict[str, Callable[..., Any]] = {
    "evolve": lambda gm, **options: fxwidth.evolve(gm, params=0.6, **options),
    "Evolver": lambda gm, **options: fxwidth.Evolver(gm, every=1, rounds=1, params=0.6, **options).step(X),
    "passes": passes,
    "resize": lambda gm, **options: fxwidth.resize(gm, {"0": 5, "2": 4}, **options),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_takes_a_function(way: str) -> None:
    gm = traced()
    WAYS[way](gm, selection=last_first, data=[X])
    record = fxwidth.report(gm).resizes[-1]
    assert record["kept"]
    for name, (old, new) in record["widths"].items():
        assert record["kept"][name] == list(range(old - new, old))


def test_plans_and_spectra_are_of_what_a_function_chooses() -> None:
    graph = fxwidth.analyze(traced())
    by_rows = fxwidth.spectrum(graph, data=[X], selection=largest_rows)["2"].errors
    by_number = fxwidth.spectrum(graph, data=[X], selection=last_first)["2"].errors
    assert by_rows != by_number
    errors = fxwidth.plan(graph, params=0.6, data=[X], selection=last_first, only="2").notes["errors"]
    assert errors["2"] in [pytest.approx(error) for error in by_number]


def test_a_function_is_asked_once_for_each_group_that_shrinks() -> None:
    asked = []

    def noting(group: ChannelGroup, width_graph: WidthGraph) -> Tensor:
        asked.append(group.name)
        return last_first(group, width_graph)

    fxwidth.resize(traced(), {"0": 4, "2": [0, 1], "4": 7}, selection=noting, exact=False)
    assert asked == ["0"]


REFUSED: list[tuple[Callable[[ChannelGroup], Any], str]] = [
    (lambda group: [1.0], r"gave numbers of shape \[1\] for group '2'; return one real number for each of its 8 chan"),
    (lambda group: torch.ones(group.width, 1), r"gave numbers of shape \[8, 1\] for group '2'"),
    (lambda group: 3.0, r"gave numbers of shape \[\] for group '2'"),
    (lambda group: None, "gave NoneType for group '2'"),
    (lambda group: ["a"] * group.width, "gave list for group '2'"),
    (lambda group: [1j] * group.width, "gave list for group '2'"),
    (lambda group: torch.ones(group.width, dtype=torch.complex64), "gave Tensor for group '2'"),
    (lambda group: torch.ones(group.width, device="meta"), "gave Tensor for group '2'"),
    (lambda group: dict.fromkeys(range(group.width), 1.0), "gave dict for group '2'"),
    (lambda group: [0.0, torch.nan, *[1.0] * 6], "gave the score nan for channel 1 of group '2'; return finite"),
    (lambda group: [torch.inf, *[1.0] * 7], "gave the score inf for channel 0 of group '2'; return finite"),
]


@pytest.mark.parametrize(("scores", "words"), REFUSED)
def test_scores_that_cannot_be_used_change_nothing(scores: Callable[[ChannelGroup], Any], words: str) -> None:
    gm = traced()
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    with pytest.raises(FxwidthError, match=words):
        fxwidth.resize(gm, {"0": 4, "2": 3}, selection=lambda g, _: scores(g) if g.name == "2" else range(g.width))
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    assert not fxwidth.report(gm).resizes


def test_a_function_that_fails_changes_nothing() -> None:
    gm = traced()
    before = {name: value.clone() for name, value in gm.state_dict().items()}

    def failing(group: ChannelGroup, width_graph: WidthGraph) -> Tensor:
        with torch.no_grad():
            gm.get_parameter("0.weight").zero_()
        raise KeyError(group.name)

    with pytest.raises(KeyError, match="2"):
        fxwidth.resize(gm, {"2": 3}, selection=failing)
    assert set(before) == set(gm.state_dict())
