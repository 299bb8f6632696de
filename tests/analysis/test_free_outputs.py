"""Outputs whose callers follow: their sizes are free, all that is not named stays, and nothing of them is lost."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.analysis.free_outputs import output_names
from fxwidth.bases.linear_groups import linear_group
from fxwidth.importance.estimates import gather_evidence
from tests.oracles.judges import assert_replays


class Backbone(nn.Module):
    """Returns feature maps of two stages, of which the second is a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        low = self.norm(self.a(x)).relu()
        high = self.b(low).relu()
        return {"low": low, "high": [high, high + self.c(high)]}


class Pair(NamedTuple):
    hidden: Tensor
    pooled: Tensor


class Slotted:
    __slots__ = ("hidden",)

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Encoder(nn.Module):
    """Returns hidden states of linear layers, which any basis would do for inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Pair:
        hidden = self.b(self.a(x))
        return Pair(hidden, self.head(hidden))


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def backbone() -> fx.GraphModule:
    torch.manual_seed(0)
    model = Backbone().double()
    with torch.no_grad():
        for _ in range(5):
            model(images(16))
    return fxwidth.trace(model.eval(), images())


def flat(value: dict[str, Any]) -> list[Tensor]:
    return [value["low"], *value["high"]]


def free(width_graph: fxwidth.WidthGraph) -> list[str]:
    return [group.name for group in width_graph.free]


def test_names_are_those_by_which_a_caller_finds_tensors() -> None:
    one, two, three, four = torch.zeros(4, 1).unbind()
    names = output_names({"y": one, "rest": [two, Pair(three, four)], "again": one, "none": None})
    assert names == {one: "y", two: "rest.0", three: "rest.1.hidden", four: "rest.1.pooled"}
    assert output_names(one) == {one: "output"}
    assert output_names([Slotted(two)]) == {two: "0.hidden"}


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (True, ["a", "b"]), ("low", ["a"]), (["high"], ["b"]), ({"high.0", "low"}, ["a"]),
        (["high.0", "high.1"], ["b"]), (False, []), ([], []),
    ],
)  # fmt: skip
def test_what_is_named_is_free_and_remembered(outputs: Any, names: list[str], backbone: fx.GraphModule) -> None:
    graph = fxwidth.analyze(backbone, free_outputs=outputs)
    assert free(graph) == names == list(graph.followed)
    assert all(graph.kinds[name] == "output" for name in names)
    assert str(graph).count("callers follow") == len(names)
    for same in (backbone, copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert free(fxwidth.analyze(same)) == names
    assert free(fxwidth.analyze(backbone, free_outputs=False)) == []


def test_the_remedy_works(backbone: fx.GraphModule) -> None:
    assert "free_outputs=True" in fxwidth.analyze(backbone).why_pinned("b")
    with pytest.raises(FxwidthError, match="size of the model's output"):
        fxwidth.resize(backbone, {"b": 6})
    fxwidth.analyze(backbone, free_outputs=True)
    assert fxwidth.resize(backbone, {"b": 6})(images())["high"][0].shape[1] == 6


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        ("middle", r"'middle'.*outputs are 'low', 'high\.0', 'high\.1'"), ("hi", "'hi'"), (3, "received 3"),
        ([1], r"received \[1\]"),
    ],
)  # fmt: skip
def test_what_is_no_output_is_refused(outputs: Any, told: str, backbone: fx.GraphModule) -> None:
    fxwidth.analyze(backbone, free_outputs="low")
    with pytest.raises(FxwidthError, match=told):
        fxwidth.analyze(backbone, free_outputs=outputs)
    assert free(fxwidth.analyze(backbone)) == ["a"]


def test_channels_stay_as_they_are_and_the_report_tells_which(backbone: fx.GraphModule) -> None:
    before = flat(backbone(images(7)))
    fxwidth.analyze(backbone, free_outputs=True)
    fxwidth.resize(backbone, {"b": 5})
    record = fxwidth.report(backbone).resizes[-1]
    assert record["outputs"] == {"high.0 dim 1": [12, 5], "high.1 dim 1": [12, 5]}
    assert "output high.0 dim 1: 12 -> 5, which callers follow" in str(fxwidth.report(backbone))
    low, high, _ = flat(backbone(images(7)))
    assert torch.equal(low, before[0])
    torch.testing.assert_close(high, before[1][:, record["kept"]["b"]])
    grown = {"a": 11, "b": 9}
    smaller = flat(backbone(images(7)))
    fxwidth.resize(backbone, grown)
    for old, new in zip(smaller, flat(backbone(images(7))), strict=True):
        torch.testing.assert_close(new[:, : old.shape[1]], old)
    assert [tensor.shape[1] for tensor in flat(backbone(images(3)))] == [11, 9, 9]


def test_the_model_goes_along_and_plans_spend_their_budget() -> None:
    torch.manual_seed(0)
    for data in (None, [images(32)]):
        model = Backbone().double().eval()
        gm = fxwidth.trace(model, images())
        graph = fxwidth.analyze(gm, free_outputs=True)
        assert_replays(graph.analysis, [images()])
        # To lose what is returned has a price besides what its readers inside miss.
        evidence = gather_evidence(graph, data)
        other = fxwidth.analyze(gm)
        other.followed = {}
        inside = gather_evidence(other, data).errors(other["b"])
        assert (evidence.errors(graph["b"])[:-1] > inside[:-1]).all()
        plan = fxwidth.plan(graph, params=0.5, data=data)
        fxwidth.resize(gm, plan, data=data)
        before, after = fxwidth.report(gm).resizes[-1]["parameters"]
        assert 0.4 < after / before <= 0.5
        for own, other in zip(flat(gm(images(3))), flat(model(images(3))), strict=True):
            assert torch.equal(own, other)


def test_no_basis_of_an_output_is_changed() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 5, dtype=torch.float64)
    gm = fxwidth.trace(Encoder().double().eval(), x)
    graph = fxwidth.analyze(gm, free_outputs="hidden")
    assert linear_group(graph, graph["a"]) is not None
    assert linear_group(graph, graph["b"]) is None
    before = gm(x)
    fxwidth.resize(gm, {"b": 4}, data=[x])
    kept = fxwidth.report(gm).resizes[-1]["kept"]["b"]
    torch.testing.assert_close(gm(x).hidden, before.hidden[:, kept])


@pytest.mark.parametrize("form", [".safetensors", ".pt"])
def test_files_tell_of_it(form: str, backbone: fx.GraphModule, tmp_path: Path) -> None:
    fxwidth.analyze(backbone, free_outputs=["low", "high"])
    fxwidth.resize(backbone, {"a": 5, "b": 6})
    fxwidth.save(backbone, tmp_path / f"a{form}")
    model = (Backbone().double().eval(), images()) if form == ".safetensors" else ()
    loaded = fxwidth.load(tmp_path / f"a{form}", *model, trusted=form == ".pt")
    for one, two in zip(flat(loaded(images(3))), flat(backbone(images(3))), strict=True):
        assert torch.equal(one, two)
    assert free(fxwidth.analyze(loaded)) == ["a", "b"]


def test_groups_of_width_one_keep_what_was_free(backbone: fx.GraphModule) -> None:
    fxwidth.analyze(backbone, free_outputs="low")
    fxwidth.resize(backbone, {"a": 1})
    with pytest.raises(FxwidthError, match="width one"):
        fxwidth.analyze(backbone, free_outputs=True)
    assert fxwidth.resize(backbone, {"a": 6})(images())["low"].shape[1] == 6
