"""What is told of a name that is no group's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError


class Residual(nn.Module):
    """Two layers that write one group, and one that writes three."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, [n, 3]."""
        x = self.stem(x)
        x = x + self.block(x.relu())
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.fixture(scope="module")
def graph() -> fxwidth.WidthGraph:
    return fxwidth.analyze(fxwidth.trace(Residual().eval(), torch.randn(2, 5, 6)))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("block", "the layer of this name writes the group 'stem', named after the first layer that does"),
        ("attention", "the layer of this name writes the groups .*'stem'"),
        ("stam", "did you mean 'stem'"),
    ],
)
def test_the_groups_that_a_layer_writes_are_named(graph: fxwidth.WidthGraph, name: str, told: str) -> None:
    calls = [
        lambda: graph[name],
        lambda: graph.why_pinned(name),
        lambda: fxwidth.resize(graph.analysis.module, {name: 4}),
    ]
    for call in calls:
        with pytest.raises(FxwidthError, match=told):
            call()


def test_a_layer_in_an_option_is_told_its_group(graph: fxwidth.WidthGraph) -> None:
    with pytest.raises(FxwidthError, match=r"keep='block' matches no group; the layer of this name writes.*'stem'"):
        fxwidth.plan(graph, params=0.5, keep="block")
