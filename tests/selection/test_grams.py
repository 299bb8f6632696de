"""The evidence of many readers, held and not held, against the sums over all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.importance.estimates import Evidence
from fxwidth.selection import grams as module
from fxwidth.selection.error_curves import lost_share
from fxwidth.selection.grams import Grams, each_grams, grams_of
from fxwidth.statistics.moments import Moments, moments_from_noise
from fxwidth.weights.readers import wiring_of
from tests.zoo.nets import width_graph

WIDTH = 8


class Stream(nn.Module):
    """A residual stream that so many layers read, each after a norm of its own and louder than the one before."""

    def __init__(self, readers: int) -> None:
        super().__init__()
        self.start = nn.Linear(4, WIDTH)
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(readers))
        self.readers = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(readers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return what each layer makes of the stream."""
        x = self.start(x)
        return [
            (place + 1.0) * read(torch.relu(norm(x)))
            for place, (norm, read) in enumerate(zip(self.norms, self.readers, strict=True))
        ]


def stream(readers: int) -> tuple[fxwidth.WidthGraph, fxwidth.ChannelGroup, Moments]:
    torch.manual_seed(readers)
    graph = width_graph(Stream(readers).double().eval(), torch.randn(16, 4).double())
    moments = moments_from_noise(graph)
    assert moments is not None
    (group,) = graph.free
    return graph, group, moments


def products(pairs: Grams) -> Tensor:
    """Return sums that neither depend on how pairs are scaled nor on how they are put together: each S with its D."""
    return torch.stack([(S * D).sum() for S, D in zip(pairs.activation, pairs.weight, strict=True)])


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
@pytest.mark.parametrize("readers", [1, 2, 3, 5, 7, 12])
def test_readers_that_are_too_many_are_added_to_their_neighbours(
    readers: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, group, moments = stream(readers)
    every = grams_of(wiring_of(graph), group, moments)
    assert every is not None
    assert not every.is_sum
    assert len(every.activation) == readers
    monkeypatch.setattr(module, "_MOST_ENTRIES", limit * WIDTH**2)
    held = grams_of(wiring_of(graph), group, moments)
    assert held is not None
    assert limit / 2 < len(held.activation) <= limit or len(held.activation) == readers <= limit
    assert held.is_sum is (readers > limit)
    scaled = every.on_one_scale()
    size = 1
    while -(-readers // size) > limit:
        size *= 2
    for place, (S, D) in enumerate(zip(held.activation, held.weight, strict=True)):
        own = slice(place * size, (place + 1) * size)
        source = scaled if held.is_sum else every
        torch.testing.assert_close(S, source.activation[own].sum(0))
        torch.testing.assert_close(D, source.weight[own].sum(0))
    torch.testing.assert_close(products(scaled), products(every))


def test_what_is_lost_is_the_same_whether_readers_are_held_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, group, moments = stream(9)
    every = grams_of(wiring_of(graph), group, moments)
    assert every is not None
    monkeypatch.setattr(module, "_MOST_ENTRIES", 2 * WIDTH**2)
    evidence = Evidence(graph, moments)
    errors = evidence.errors(group)
    order = evidence.order(group, WIDTH)
    expected = fxwidth.selection.error_curves.logarithmic(lost_share(every, order))
    np.testing.assert_allclose(errors, expected, rtol=1e-9, atol=1e-12)
    assert len(list(each_grams(wiring_of(graph), group, moments))) == 9


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_readers_weigh_the_same_however_loud_they_are(scale: float) -> None:
    graph, group, moments = stream(5)
    before = grams_of(wiring_of(graph), group, moments)
    assert before is not None
    # Each is measured by what it makes of the channels, all of which are one.
    torch.testing.assert_close(products(before), torch.ones(5).double())
    errors, order = Evidence(graph, moments).errors(group), Evidence(graph, moments).order(group, WIDTH)
    with torch.no_grad():
        graph.analysis.parameters["readers.2.weight"].tensor.mul_(scale)
    graph = fxwidth.analyze(graph.analysis.module)
    (group,) = graph.free
    after = grams_of(wiring_of(graph), group, moments)
    assert after is not None
    torch.testing.assert_close(after.activation, before.activation)
    torch.testing.assert_close(after.weight, before.weight)
    np.testing.assert_allclose(Evidence(graph, moments).errors(group), errors, rtol=1e-9, atol=1e-12)
    assert torch.equal(Evidence(graph, moments).order(group, WIDTH), order)
