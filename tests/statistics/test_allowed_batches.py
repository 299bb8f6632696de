"""A graph whose model branches on how many samples there are is run on such batches alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.statistics.allowed_batches import AllowedBatches
from fxwidth.statistics.calibration_data import batches_from, cut_anew

Condition = Callable[[int], bool]


class Branching(nn.Module):
    """Goes another way where a condition on the number of samples holds."""

    def __init__(self, condition: Condition) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.condition = condition

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        h = self.norm(self.first(x)).relu()
        if self.condition(x.shape[0]):
            h = h * 2
        return {"y": self.second(h if scale is None else h * scale)}


CONDITIONS: dict[str, tuple[int, Condition]] = {
    "more than a thousand": (2, lambda size: size > 1000),
    "more than five": (4, lambda size: size > 5),
    "eight": (8, lambda size: size == 8),
    "multiples of six": (6, lambda size: size % 6 == 0),
    "no multiples of sixteen": (16, lambda size: size % 16 != 0),
    "five at least": (8, lambda size: size >= 5),
    "none": (4, lambda size: False),
}


def graph(name: str) -> tuple[torch.fx.GraphModule, int, Condition]:
    torch.manual_seed(0)
    size, condition = CONDITIONS[name]
    model = Branching(condition).double().eval()
    return fxwidth.trace(model, {"x": torch.randn(size, 4).double()}), size, condition


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_sizes_that_are_allowed_are_those_that_go_the_same_way(name: str) -> None:
    gm, own, condition = graph(name)
    allowed = AllowedBatches(fxwidth.analyze(gm).analysis)
    for size in range(2, 40):
        same = condition(size) == condition(own)
        assert (size in allowed) <= same
        assert size not in allowed or gm(torch.randn(size, 4).double())["y"].shape == (size, 2)
    assert own in allowed
    assert allowed.largest(1500) in allowed
    assert allowed.all_in(range(2, 40)) == (name in ("none", "more than a thousand"))


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("with_data", [False, True])
def test_plans_and_resizes_ask_for_no_others(name: str, with_data: bool) -> None:
    gm, own, _ = graph(name)
    data = [torch.randn(own, 4).double() for _ in range(70)] if with_data else None
    plan = fxwidth.plan(fxwidth.analyze(gm), params=0.7, data=data)
    fxwidth.resize(gm, plan, data=data)
    assert gm(torch.randn(own, 4).double())["y"].shape == (own, 2)
    fxwidth.resize(gm, {"first": fxwidth.analyze(gm)["first"].width + 3})


def test_data_are_left_out_by_whole_batches_where_their_size_matters() -> None:
    # At one more than the example's the graph goes the same way.
    analysis, other = (fxwidth.analyze(graph(name)[0]).analysis for name in ("more than five", "none"))
    data = [torch.randn(4, 4).double() for _ in range(4)]
    assert [len(values[0]) for values in cut_anew(analysis, batches_from(analysis, data, None), 8)] == [4] * 4
    assert [len(values[0]) for values in cut_anew(other, batches_from(other, data, None), 8)] == [8, 8]
    analysis = fxwidth.analyze(graph("multiples of six")[0]).analysis
    data = [torch.randn(6, 4).double() for _ in range(4)]
    assert [len(values[0]) for values in batches_from(analysis, data, 14)] == [6, 6, 6]
    assert [len(values[0]) for values in batches_from(other, data, 14)] == [6, 6, 2]
