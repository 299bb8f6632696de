"""The plans of a frontier are those of `plan`, from one look at the data; what is measured is what `resize` makes."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import fxwidth
from fxwidth import Budget, FxwidthError, Plan
from tests.zoo.nets import conv, images, trained_like

SHARES = [0.9, 0.7, 0.5]


class Batches:
    """Batches that count how often they are gone through."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)


def graph() -> fxwidth.WidthGraph:
    torch.manual_seed(0)
    return fxwidth.analyze(fxwidth.trace(trained_like(conv()), images(4)))


def labelled() -> tuple[Tensor, Tensor]:
    return images(32), torch.arange(32) % 3


def outputs(gm: fx.GraphModule) -> Tensor:
    with torch.no_grad():
        return gm(images(8))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data": [labelled()]},
        {"data": [labelled()], "loss": F.cross_entropy},
        {"data": [labelled()], "selection": "backward", "min_width": 2, "align": 2},
        {"keep": "0"},
        {"same_width": [["0", "2"]], "min_width": 0.2},
        {"for_module": conv()},
    ],
    ids=["noise", "data", "loss", "limits", "keep", "together", "module"],
)
def test_each_plan_is_that_of_plan_for_its_budget(options: dict[str, Any]) -> None:
    found = fxwidth.frontier(graph(), params=SHARES, **options)
    assert found.budgets == tuple(Budget(params=share) for share in SHARES)
    for share, made in zip(SHARES, found.plans, strict=True):
        alone = fxwidth.plan(graph(), params=share, **options)
        assert made == alone
        assert made.notes == alone.notes


@pytest.mark.parametrize("name", ["flops", "latency", "activation_memory"])
def test_other_costs_have_frontiers_likewise(name: str) -> None:
    whole = graph()
    found = fxwidth.frontier(whole, params=1.0, **{name: [0.9, 0.8]})
    assert list(found.plans) == [
        fxwidth.plan(whole, budget=Budget(**{"params": 1.0, name: share})) for share in (0.9, 0.8)
    ]
    budgets = [Budget(**{"params": 1.0, name: share}) for share in (0.9, 0.8)]
    assert fxwidth.frontier(whole, budget=budgets).plans == found.plans


def test_growth_is_in_a_frontier_too() -> None:
    whole = graph()
    found = fxwidth.frontier(whole, params=[1.5, 1.0, 0.6])
    assert [dict(made) for made in found.plans] == [
        dict(fxwidth.plan(whole, params=share)) for share in (1.5, 1.0, 0.6)
    ]


@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_data_are_gone_through_once(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    gather = fxwidth.importance.loss_sensitivity.gather_evidence
    monkeypatch.setattr(
        "fxwidth.importance.loss_sensitivity.gather_evidence", lambda *args: looks.append(args) or gather(*args)
    )
    data = Batches(labelled(), labelled())
    fxwidth.frontier(graph(), params=SHARES, data=data, loss=loss)
    assert data.passes == 1
    assert len(looks) == 1
    # Budgets by themselves look each time.
    for share in SHARES:
        fxwidth.plan(graph(), params=share, data=data, loss=loss)
    assert data.passes == 1 + len(SHARES)


@pytest.mark.parametrize("options", [{}, {"data": [labelled()]}, {"data": iter([labelled()]), "rotate": False}])
def test_what_is_measured_is_the_resized_network(options: dict[str, Any]) -> None:
    whole, seen = graph(), []
    gm = whole.analysis.module
    before = copy.deepcopy(gm.state_dict())

    def evaluate(resized: fx.GraphModule) -> Tensor:
        seen.append(outputs(resized))
        return (seen[-1] - outputs(gm)).square().mean()

    found = fxwidth.frontier(whole, params=SHARES, evaluate=evaluate, **options)
    assert found.present == 0
    assert found.measured is not None
    # Channels that are zero on these images are dropped first, where what is measured is zero or rounding.
    assert found.measured[-1] > 1e-6
    assert found.measured == tuple(float((one - seen[0]).square().mean()) for one in seen[1:])
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    options = {**options, "data": [labelled()]} if "data" in options else options
    for made, out in zip(found.plans, seen[1:], strict=True):
        assert torch.equal(outputs(fxwidth.resize(copy.deepcopy(gm), made, **options)), out)


def test_a_copy_may_be_trained() -> None:
    whole = graph()
    before = copy.deepcopy(whole.analysis.module.state_dict())

    def tuned(gm: fx.GraphModule) -> Tensor:
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
        x, y = labelled()
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
        return F.cross_entropy(gm(x), y)

    fxwidth.frontier(whole, params=SHARES, evaluate=tuned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.analysis.module.state_dict().items())


def test_a_fault_in_evaluate_is_the_user_s_own_and_leaves_the_graph() -> None:
    whole = graph()
    before = copy.deepcopy(whole.analysis.module.state_dict())

    def failing(gm: fx.GraphModule) -> float:
        next(gm.parameters()).data.zero_()
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        fxwidth.frontier(whole, params=SHARES, evaluate=failing)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.analysis.module.state_dict().items())
    assert whole.outdated is None


def test_rows_and_table_tell_costs_errors_and_measurements() -> None:
    values = iter([0.9, 0.8, 0.7, 0.6])
    found = fxwidth.frontier(graph(), params=SHARES, evaluate=lambda _: next(values))
    rows = found.rows()
    assert [row["measured"] for row in rows] == [0.8, 0.7, 0.6]
    assert [row["params"] for row in rows] == sorted((row["params"] for row in rows), reverse=True)
    assert [row["error"] for row in rows] == sorted(row["error"] for row in rows)
    assert [row["widths"] for row in rows] == [made.widths for made in found.plans]
    table = found.table()
    assert [row[-1] for row in table.rows] == ["0.8", "0.7", "0.6"]
    assert table.below[-1] == "measured of the network as it is: 0.9"
    again = json.loads(found.to_json())
    assert again["present"] == 0.9
    assert [Plan.from_json(json.dumps(row["plan"])) for row in again["frontier"]] == list(found.plans)


@pytest.mark.parametrize("measured", [False, True])
def test_a_plot_has_a_point_for_each_plan(tmp_path: Path, measured: bool) -> None:
    pytest.importorskip("matplotlib")
    values = iter([0.9, 0.8, 0.7, 0.6])
    evaluate = (lambda _: next(values)) if measured else None
    found = fxwidth.frontier(graph(), params=SHARES, evaluate=evaluate)
    axes = found.plot(tmp_path / "frontier.svg").axes[0]
    (line,) = axes.lines
    assert sorted(line.get_xdata()) == sorted(row["params"] for row in found.rows())
    assert axes.get_ylabel() == ("measured" if measured else "predicted error")
    assert (tmp_path / "frontier.svg").stat().st_size > 1000
    assert found.plot(cost="flops").axes[0].get_xlabel() == "flops"
    with pytest.raises(FxwidthError, match="cost='latency' is not known of every plan; known are 'params', 'flops'"):
        found.plot(cost="latency")
    with pytest.raises(FxwidthError, match=r"plots are drawn as SVG, PNG or PDF, not as 'a\.txt'\. End the path in"):
        found.plot(tmp_path / "a.txt")


def test_a_plot_needs_matplotlib_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fxwidth.frontier(graph(), params=SHARES)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FxwidthError, match=r"drawing needs matplotlib\. Run pip install 'fxwidth\[draw\]'\."):
        found.plot()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, r"a frontier needs bounds for each plan: a list for one of params=, flops="),
        ({"params": 0.5}, r"a frontier needs bounds for each plan: a list for one of"),
        ({"params": []}, r"a frontier needs bounds for each plan"),
        ({"budget": []}, r"a frontier needs bounds for each plan"),
        ({"params": [0.5], "budget": Budget(flops=0.5)}, r"budget= and params= both bound the plans"),
        ({"budget": [0.5]}, r"budget= takes fxwidth.Budget, or a list of them, but received 0\.5"),
        ({"params": [0.5, 0.4], "flops": [0.5]}, r"there are 2 in params=, 1 in flops=; give lists of one length"),
        ({"params": [0.5, "half"]}, r"params='half' must be an int"),
        ({"params": [0.9, 1e-6]}, r"params=1e-06 is out of reach"),
        ({"params": [0.9], "shrink_energy": 0.5}, r"shrink_energy= decides without a budget"),
        ({"params": [0.9], "min_widht": 2}, r"min_widht= is no option of fxwidth.plan; did you mean min_width=\?"),
        ({"params": [0.9], "evaluate": 3}, r"evaluate=3 must be a function of the resized graph"),
        ({"params": [0.9], "evaluate": lambda _: "good"}, r"evaluate returned 'good'; return one number"),
        ({"params": [0.9], "evaluate": lambda _: float("nan")}, r"evaluate returned nan; return one number"),
    ],
)
def test_what_is_refused(options: dict[str, Any], text: str) -> None:
    data = Batches(labelled())
    with pytest.raises(FxwidthError, match=text):
        fxwidth.frontier(graph(), data=data, **options)
    assert data.passes <= 2 * ("evaluate" in options), "the data are looked at before what is wrong is told"


def test_of_what_is_no_graph_there_is_none() -> None:
    with pytest.raises(FxwidthError, match=r"pass what fxwidth\.analyze"):
        fxwidth.frontier(conv(), params=[0.5])  # type: ignore[arg-type]
