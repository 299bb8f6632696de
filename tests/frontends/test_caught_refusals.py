"""A model whose code catches the errors of a tracer, and goes on another way than with real tensors."""

from __future__ import annotations

from collections.abc import Callable
from random import random

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.runtime.trace_guards import UntraceableError, heeding_refusals, unheeded


def asks(x: Tensor) -> bool:
    return bool((x > 50).any())


def reads_a_float(x: Tensor) -> bool:
    return float(x.sum()) > 1e6


def reads_an_item(x: Tensor) -> bool:
    return x.sum().item() > 1e6


def counts_some(x: Tensor) -> bool:
    return len(x[x > 50]) > 0


def lists(x: Tensor) -> bool:
    return max(x.flatten().tolist()) > 50


def iterates(x: Tensor) -> bool:
    return any(row.sum() > 1e6 for row in x)


def indexes(x: Tensor) -> bool:
    return [False, True][(x > 50).any().long()]


def draws(x: Tensor) -> bool:
    return random() > 2


class Catches(nn.Module):
    """Takes what an error says for an answer."""

    def __init__(self, ask: Callable[[Tensor], bool], *, is_exported: bool, inside: bool) -> None:
        super().__init__()
        self.ask, self.is_exported, self.inside = ask, is_exported, inside
        self.first, self.other, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_exported and not isinstance(x, Tensor):
            raise TypeError
        h = x
        try:
            h = self.first(h) if self.inside else h
            is_large = self.ask(x)
        except Exception:
            return self.last(self.other(x))
        return self.last(self.other(x) if is_large else self.first(x) * 0.5 + (h.mean() if self.inside else 0))


ASKS = [asks, reads_a_float, reads_an_item, counts_some, lists, iterates, indexes, draws]


@pytest.mark.parametrize("inside", [False, True], ids=["before", "around layers"])
@pytest.mark.parametrize("is_exported", [False, True], ids=["symbolic", "exported"])
@pytest.mark.parametrize("ask", ASKS)
def test_its_graph_does_what_it_does_or_there_is_none(
    ask: Callable[[Tensor], bool], is_exported: bool, inside: bool
) -> None:
    torch.manual_seed(0)
    model = Catches(ask, is_exported=is_exported, inside=inside).double().eval()
    small = torch.randn(3, 4, dtype=torch.float64)
    try:
        gm = fxwidth.trace(model, small)
    except fxwidth.FxwidthError:
        return
    for x in (small, small[:2], 1e7 * torch.ones(3, 4, dtype=torch.float64)):
        torch.testing.assert_close(gm(x), model(x))


class CatchesAll(nn.Module):
    """Goes on without an order of channels where it cannot look at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        try:
            is_large = bool((x > 50).any())
        except Exception:
            return self.last(self.first(x) + self.other(x))
        return self.last(self.other(x) if is_large else self.first(x).flip(-1) + self.other(x))


@pytest.mark.parametrize("around", [nn.Identity, lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
def test_it_is_analysed_on_the_way_of_real_tensors(around: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(around(), CatchesAll()).eval()
    gm = fxwidth.trace(model, torch.randn(3, 4))
    graph = fxwidth.analyze(gm)
    (first,) = [group for group in graph.groups if "1.first.bias" in {site.parameter for site in group.sites}]
    assert "the order along the dimension matters" in str(first.pinned)
    assert torch.equal(gm(torch.ones(2, 4)), model(torch.ones(2, 4)))
    with pytest.raises(fxwidth.FxwidthError):
        fxwidth.analyze(fxwidth.trace(model.to("meta"), torch.randn(3, 4, device="meta")))


def test_what_is_tried_out_is_no_refusal() -> None:
    with heeding_refusals(), heeding_refusals(), unheeded(), pytest.raises(UntraceableError):
        raise UntraceableError
    inner = heeding_refusals((torch.fx.proxy.TraceError,))
    with pytest.raises(UntraceableError, match="a reason"), heeding_refusals(), inner, pytest.raises(UntraceableError):
        raise UntraceableError("a reason")


@pytest.mark.parametrize("error", [UntraceableError("a reason"), torch.fx.proxy.TraceError("a reason")])
def test_errors_that_are_caught_are_told(error: Exception) -> None:
    def catches() -> None:
        with pytest.raises(type(error)):
            raise type(error)(*error.args)

    catches()
    with pytest.raises(UntraceableError, match=r"catches an error .*: a reason"), heeding_refusals():
        catches()
    catches()


def test_other_errors_go_through() -> None:
    with pytest.raises(KeyError), heeding_refusals():
        raise KeyError
    with pytest.raises(torch.fx.proxy.TraceError), heeding_refusals():
        raise torch.fx.proxy.TraceError("a reason")
    with heeding_refusals(), pytest.raises(KeyError):
        raise KeyError
