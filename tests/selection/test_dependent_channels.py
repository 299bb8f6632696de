"""Channels that depend on others are found and leave no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxwidth.groups.width_graph import WidthGraph
from fxwidth.reconstruction.folding import fold
from fxwidth.statistics.moments import moments_from_noise
from tests.oracles.channels import (
    copy_channel,
    evidence,
    plain_groups,
    readers_of,
    relative,
    select,
    silence_channel,
)
from tests.zoo.nets import (
    Attention,
    batch_norm_bottleneck,
    build,
    images,
    maps_for,
    outputs_after,
    tokens,
    trained_like,
    width_graph,
)

CASES = [(name, group) for name in ("conv", "grouped", "tile", "in place", "shared") for group in plain_groups(name)]


class TestExactRank:
    """Channels that hold nothing new are found and leave no trace."""

    @pytest.mark.parametrize(("name", "group"), CASES)
    def test_duplicates(self, name: str, group: str) -> None:
        graph, x = build(name)
        if not readers_of(graph, group):
            pytest.skip("nothing reads the group")
        copy_channel(graph, group, 0, 2)
        assert_shrinks_exactly(graph, x, {group: graph[group].width - 1}, 1e-9)

    @pytest.mark.parametrize(("name", "group"), CASES)
    def test_unread_channels(self, name: str, group: str) -> None:
        graph, x = build(name)
        if not readers_of(graph, group):
            pytest.skip("nothing reads the group")
        silence_channel(graph, group, 1, "reader")
        assert_shrinks_exactly(graph, x, {group: graph[group].width - 1}, 1e-12)

    @pytest.mark.parametrize("make", ["linear", "batch norm", "convolution", "value-output"])
    def test_linear_combinations(self, make: str) -> None:
        torch.manual_seed(0)
        model, x, group = RANK_DEFICIENT[make]()
        graph = width_graph(model, x)
        moments = evidence(graph, x)
        rank = 4
        kept = select(graph, graph[group], rank, moments)
        maps = maps_for(graph, {group: kept})
        with torch.no_grad():
            expected = model(x)
        assert relative(outputs_after(graph, maps, fold(graph, maps, moments), x), expected) < 1e-9
        fewer = maps_for(graph, {group: select(graph, graph[group], rank - 1, moments)})
        assert relative(outputs_after(graph, fewer, fold(graph, fewer, moments), x), expected) > 1e-4

    def test_noise_is_evidence_enough_for_duplicates(self) -> None:
        graph, x = build("conv")
        widths = {"0": 6, "2": 8, "5": 5}
        for name, width in widths.items():
            copy_channel(graph, name, 0, width - 1)
        moments = moments_from_noise(graph)
        maps = maps_for(graph, {name: select(graph, graph[name], width - 1, moments) for name, width in widths.items()})
        with torch.no_grad():
            expected = graph.analysis.module(x)
        assert relative(outputs_after(graph, maps, fold(graph, maps, moments), x), expected) < 1e-9


def assert_shrinks_exactly(graph: WidthGraph, x: Tensor, widths: dict[str, int], tolerance: float) -> None:
    """Check that what selection drops, and the fold makes up for, leaves the function as it was."""
    with torch.no_grad():
        expected = graph.analysis.module(x)
    moments = evidence(graph, x)
    kept = {name: select(graph, graph[name], width, moments) for name, width in widths.items()}
    maps = maps_for(graph, kept)
    assert relative(outputs_after(graph, maps, fold(graph, maps, moments), x), expected) < tolerance


def _low_rank(rows: int, columns: int, rank: int = 4) -> Tensor:
    return torch.randn(rows, rank).double() @ torch.randn(rank, columns).double()


def _linear_bottleneck() -> tuple[nn.Module, Tensor, str]:
    model = trained_like(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    model[0].weight.data = _low_rank(8, 16)
    return model, tokens()[:, 0], "0"


def _batch_norm_bottleneck() -> tuple[nn.Module, Tensor, str]:
    model = trained_like(batch_norm_bottleneck())
    model[2].weight.data = _low_rank(8, 6)[:, :, None, None]
    return model, images(), "2"


def _convolution_bottleneck() -> tuple[nn.Module, Tensor, str]:
    model = trained_like(nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.Conv2d(8, 5, 3, padding=1), nn.Flatten(2)))
    model[0].weight.data = _low_rank(8, 9).view(8, 1, 3, 3)
    return model, images(), "0"


def _value_output() -> tuple[nn.Module, Tensor, str]:
    model = trained_like(Attention(heads=1))
    model.v.weight.data = _low_rank(8, 12)
    return model, tokens(), "v"


RANK_DEFICIENT: dict[str, Callable[[], tuple[nn.Module, Tensor, str]]] = {
    "linear": _linear_bottleneck,
    "batch norm": _batch_norm_bottleneck,
    "convolution": _convolution_bottleneck,
    "value-output": _value_output,
}
