"""A model whose code catches the errors of a tracer, and goes on another way than with real tensors."""

from __future__ import annotations

from collections.abc import Callable
from random import random

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.runtime.trace_guards import UntraceableError, heeding_refusals


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
