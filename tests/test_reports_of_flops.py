"""A report tells the flops before and after each resize, as they are counted of the graph, or that none are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import flop_registry
from typer.testing import CliRunner

import fxwidth
from fxwidth.commands.app import app
from fxwidth.recording.graph_meta import HISTORY, notes_of
from tests.zoo.nets import conv, images


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "convolutions": (lambda: conv().double(), lambda: images(3)),
    "a batch of one": (lambda: conv().double(), lambda: images(1)),
    "attention": (attention, lambda: torch.randn(2, 5, 16)),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)),
        lambda: torch.randn(2, 4, 9, 9),
    ),
    "recurrent": (lambda: Last(nn.LSTM(6, 8), nn.Linear(8, 3)), lambda: torch.randn(4, 2, 6)),
}


class Last(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)[0][-1])


def counted(gm: fx.GraphModule) -> int:
    return fxwidth.cost(fxwidth.analyze(gm)).flops


@pytest.mark.parametrize("name", NETS)
def test_flops_are_those_of_the_graph_before_and_after(name: str) -> None:
    make, inputs = NETS[name]
    torch.manual_seed(0)
    gm = fxwidth.trace(make().eval(), inputs())
    told = []
    for change in (-1, 1, -2):
        free = {group.name: group.width for group in fxwidth.analyze(gm).free}
        before = counted(gm)
        plan = {name: max(2, width + change) for name, width in free.items()}
        gm = fxwidth.resize(gm, plan, fold=False, selection="magnitude", exact=False)
        told.append(([before, counted(gm)], fxwidth.report(gm).resizes[-1]["flops"]))
    assert [own for own, _ in told] == [noted for _, noted in told]
    assert all(own[0] != own[1] for own, _ in told)


def small() -> fx.GraphModule:
    torch.manual_seed(0)
    return fxwidth.trace(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8))


def resized() -> fx.GraphModule:
    gm = fxwidth.resize(small(), {"0": 10}, selection="magnitude", fold=False)
    return fxwidth.resize(gm, {"0": 5}, selection="magnitude", fold=False)


def test_they_are_shown_in_text_table_notebook_page_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gm = resized()
    found = fxwidth.report(gm)
    assert [line.split(", ")[1] for line in str(found).splitlines() if line.startswith("resize")] == [
        "768 -> 480 flops (62.5%)",
        "480 -> 240 flops (50.0%)",
    ]
    assert found.table().rows[-1] == ("flops", "768", "480", "240")
    assert found.table().below == ()
    assert "480 -&gt; 240 flops (50.0%)" in found._repr_html_()
    fxwidth.save(gm, "small.pt2")
    told = CliRunner().invoke(app, ["report", "small.pt2", "--html", "small.html"]).stdout
    assert "768 -> 480 flops (62.5%)" in told
    assert ["flops", "768", "480", "240"] in [line.split() for line in told.splitlines()]
    assert "480 -&gt; 240 flops (50.0%)" in Path("small.html").read_text()
    noted = json.loads(CliRunner().invoke(app, ["report", "small.pt2", "--json"]).stdout)["resizes"]
    assert [one["flops"] for one in noted] == [[768, 480], [480, 240]]
    fxwidth.save(gm, "small.safetensors")
    again = fxwidth.load("small.safetensors", small())
    assert [one["flops"] for one in fxwidth.report(again).resizes] == [[768, 480], [480, 240]]


def test_that_they_are_not_known_is_told() -> None:
    gm = resized()
    # As an earlier version has noted it.
    del notes_of(gm)[HISTORY][0]["flops"]
    found = fxwidth.report(gm)
    assert "parameters (63.2%), flops not known, " in str(found).splitlines()[0]
    assert found.table().rows[-1] == ("flops", "", "", "240")
    assert "flops are left out where" in found.table().below[0]
    del notes_of(gm)[HISTORY][1]["flops"]
    assert found.table().rows[-1][0] == "parameters"
    assert "flops not known" in found._repr_html_()


def test_a_formula_that_fails_stops_no_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> int:
        raise ZeroDivisionError

    gm = small()
    monkeypatch.setitem(flop_registry, torch.ops.aten.relu, failing)
    gm = fxwidth.resize(gm, {"0": 10}, selection="magnitude", fold=False)
    assert fxwidth.report(gm).resizes[0]["flops"] is None
    assert "flops not known" in str(fxwidth.report(gm))


def test_a_page_tells_costs_that_only_the_history_knows(tmp_path: Path) -> None:
    gm = resized()
    record = notes_of(gm)[HISTORY][0]
    # A group that there is no more.
    record["widths"] = {"gone": [16, 10]}
    rows = fxwidth.report(gm).to_html(tmp_path / "a.html").read_text().split("<table", 2)[1]
    assert "212" in rows
    assert "768" in rows
    del record["flops"]
    rows = fxwidth.report(gm).to_html(tmp_path / "b.html").read_text().split("<table", 2)[1]
    assert "212" in rows
    assert "768" not in rows
