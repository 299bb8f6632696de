"""What a user is shown in Python: objects in one line, tables when printed, and HTML in a notebook."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxwidth
from fxwidth.errors import FxwidthError
from fxwidth.tables import Table

LONGEST = 400


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 160), nn.ReLU(), nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 4))


def traced() -> Any:
    return fxwidth.trace(network(), torch.randn(2, 8))


def groups() -> fxwidth.WidthGraph:
    return fxwidth.analyze(traced())


def resized() -> Any:
    return fxwidth.resize(fxwidth.resize(traced(), {"0": 10}), {"0": 8, "2": 12})


def evolver() -> fxwidth.Evolver:
    gm = traced()
    return fxwidth.Evolver(gm, torch.optim.SGD(gm.parameters(), lr=0.1), every=2, params=0.5)


# What is shown of each class that is public.
SHOWN: dict[type, Callable[[], Any]] = {
    fxwidth.Budget: lambda: fxwidth.Budget(params=0.5),
    fxwidth.CompiledGraph: lambda: fxwidth.compile(traced(), backend="eager"),
    fxwidth.ChannelGroup: lambda: groups()["0"],
    fxwidth.Evolver: evolver,
    fxwidth.Frontier: lambda: fxwidth.frontier(groups(), params=[0.75, 0.5]),
    fxwidth.GroupSpectrum: lambda: fxwidth.spectrum(groups())["0"],
    fxwidth.GrowingPenalty: lambda: fxwidth.GrowingPenalty(traced(), {"0": 4}),
    fxwidth.LayerCosts: lambda: fxwidth.cost(groups()),
    fxwidth.Plan: lambda: fxwidth.plan(groups(), params=0.5),
    fxwidth.Polynomial: lambda: fxwidth.cost_polynomial(groups(), "params"),
    fxwidth.ProgressUpdate: lambda: fxwidth.ProgressUpdate("tracing", 0, None),
    fxwidth.Replacement: lambda: fxwidth.Replacement(
        "0.weight", torch.zeros(160, 160), torch.zeros(80, 160), [np.arange(80), None]
    ),
    fxwidth.Report: lambda: fxwidth.report(resized()),
    fxwidth.Site: lambda: groups()["0"].sites[0],
    fxwidth.Spectra: lambda: fxwidth.spectrum(groups()),
    fxwidth.TaskMoments: lambda: fxwidth.TaskMoments((torch.zeros(90, 90),), torch.zeros(90, 90)),
    fxwidth.WidthGraph: groups,
}
CLASSES = [
    value
    for value in (getattr(fxwidth, name) for name in fxwidth.__all__)
    if inspect.isclass(value) and not issubclass(value, BaseException | Warning)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_repr_is_one_line(kind: type) -> None:
    assert kind in SHOWN, "a class that is public needs a row"
    value = SHOWN[kind]()
    assert type(value) is kind
    text = repr(value)
    assert "\n" not in text, text
    assert len(text) <= LONGEST, text[:2000]
    assert not text.endswith(f"object at {id(value):#x}>"), text


class Balanced(HTMLParser):
    """Reads HTML, and complains of a tag that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (fxwidth.WidthGraph, 4),  # two of the hidden layers are alike
        (fxwidth.Plan, 3),
        (fxwidth.Spectra, 3),
        (fxwidth.Report, 5),
        (fxwidth.LayerCosts, 5),
        (fxwidth.Frontier, 3),
    ],
    ids=lambda kind: getattr(kind, "__name__", str(kind)),
)
def test_a_notebook_shows_a_table(kind: type, rows: int) -> None:
    page = Balanced()
    page.feed(SHOWN[kind]()._repr_html_())
    assert (page.open, page.rows) == ([], rows)


def test_cells_are_text_and_not_html() -> None:
    table = Table(("a<b", "n"), (("<script>&", "1,000"), ("x", "")), ("<up>",), ("<down>",))
    text = table._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;&amp;" in text
    assert text.count("text-align:right") == 3
    assert str(table) == "<up>\na<b        n\n<script>&  1,000\nx\n<down>"


def test_a_plan_tells_widths_before_and_after_and_the_cost() -> None:
    graph = groups()
    plan = fxwidth.plan(graph, params=0.5)
    lines = str(plan).splitlines()
    assert lines[0].split() == ["group", "before", "after", "share", "error"]
    name, before, after = lines[1].split()[:3]
    assert (name, before, after) == ("0", "160", str(plan["0"]))
    assert any(line.startswith("params: 27,844 -> ") for line in lines)
    assert "predicted error" in lines[-1]
    assert str(fxwidth.Plan.from_json(plan.to_json())) == str(plan)
    assert str(fxwidth.Plan({"conv1": [0, 2]})).splitlines()[1].split() == ["conv1", "2"]
    assert str(fxwidth.Plan()) == "no width changes"


def test_a_table_of_resizes_tells_every_width_on_the_way() -> None:
    rows = fxwidth.report(resized()).table().rows
    assert [row[:4] for row in rows[:2]] == [("0", "160", "10", "8"), ("2", "160", "160", "12")]


def test_spectra_of_the_weights_alone_predict_no_errors() -> None:
    graph = groups()
    full, alone = fxwidth.spectrum(graph), fxwidth.spectrum(graph, errors=False)
    assert alone["0"].singular_values == full["0"].singular_values
    assert (alone["0"].errors, alone["0"].evidence) == ((), None)
    with pytest.raises(fxwidth.FxwidthError, match="errors=False looks at the weights alone"):
        fxwidth.spectrum(graph, errors=False, data=[torch.randn(4, 8)])


def test_a_report_of_a_module_is_that_of_its_graph() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    graph = fxwidth.evolve(copy.deepcopy(net), torch.randn(2, 8), params=0.5)
    module = fxwidth.evolve(copy.deepcopy(net), torch.randn(2, 8), params=0.5, output="module")
    assert type(module) is nn.Sequential
    assert str(fxwidth.report(module)).split(", the traced")[0] == str(fxwidth.report(graph)).split(", the traced")[0]
    again = fxwidth.write_back(graph, copy.deepcopy(net))
    assert str(fxwidth.report(again)) == str(fxwidth.report(graph))
    with pytest.raises(FxwidthError, match="no graph to tell of"):
        fxwidth.report(module).to_html("report.html")


CALLS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], object]] = {
    "analyze": lambda net, _: fxwidth.analyze(net),  # type: ignore[arg-type]
    "resize": lambda net, _: fxwidth.resize(net, {"0": 3}),  # type: ignore[arg-type]
    "report": lambda net, _: fxwidth.report(net),
    "save": lambda net, _: fxwidth.save(net, "x.safetensors"),  # type: ignore[arg-type]
    "Evolver": lambda net, optimizer: fxwidth.Evolver(net, optimizer, params=0.5),  # type: ignore[arg-type]
    "spectral_penalty": lambda net, _: fxwidth.spectral_penalty(net),  # type: ignore[arg-type]
    "GrowingPenalty": lambda net, _: fxwidth.GrowingPenalty(net, {"0": 3}),  # type: ignore[arg-type]
    "untie_copies": lambda net, _: fxwidth.untie_copies(net),  # type: ignore[arg-type]
    "write_back": lambda net, _: fxwidth.write_back(net, net),  # type: ignore[arg-type]
    "plan": lambda net, _: fxwidth.plan(net, params=0.5),  # type: ignore[arg-type]
    "spectrum": lambda net, _: fxwidth.spectrum(net),  # type: ignore[arg-type]
    "cost": lambda net, _: fxwidth.cost(net),  # type: ignore[arg-type, call-overload]
    "frontier": lambda net, _: fxwidth.frontier(net, params=[0.5]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_model_is_refused_and_its_class_stays(name: str) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    before = dict(vars(nn.Sequential))
    with pytest.raises(FxwidthError, match="received Sequential"):
        CALLS[name](net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert dict(vars(nn.Sequential)) == before
