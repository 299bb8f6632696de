"""Graphs that were copied together with their model: a resize of a copy leaves no half of that, as of the first."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import fxwidth
from fxwidth.rewriting.originals import original_of


class Written(nn.Module):
    """Knows a size in its own code; `is_followed` says that it reads that from a tensor."""

    def __init__(self, is_followed: bool = False) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 12), nn.Linear(6, 3)
        self.h, self.is_followed = 6, is_followed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.c.weight.shape[1] if self.is_followed else self.h
        return self.c(torch.relu(self.a(x)).view(x.shape[0], 2, h).mean(1))


def _pickled(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


def _net(is_followed: bool = False) -> Written:
    torch.manual_seed(0)
    return Written(is_followed).double()


_X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _halved(gm: torch.fx.GraphModule) -> str | None:
    graph = fxwidth.analyze(gm)
    fxwidth.resize(gm, {next(group.name for group in graph.free if group.width == 6): 3})
    return fxwidth.report(gm).resizes[-1]["original"]


@pytest.mark.parametrize("is_model_first", [True, False])
@pytest.mark.parametrize("how", [copy.deepcopy, _pickled])
def test_the_model_beside_a_copied_graph_stays_whole(how, is_model_first):
    net = _net()
    gm = fxwidth.trace(net, _X)
    expected = net(_X)
    pair = how((net, gm) if is_model_first else (gm, net))
    other, copied = pair if is_model_first else pair[::-1]
    assert original_of(copied) is other
    assert _halved(copied) == "untouched"
    assert torch.equal(other(_X), expected)
    assert torch.equal(net(_X), expected)
    assert _halved(gm) == "untouched"


@pytest.mark.parametrize("how", [copy.deepcopy, _pickled])
def test_the_model_beside_a_copied_graph_is_resized_with_it_where_it_can_be(how):
    net = _net(is_followed=True)
    gm = fxwidth.trace(net, _X)
    other, copied, beside = how([net, gm, fxwidth.trace(net, _X)])
    expected = beside(_X)
    assert _halved(copied) == "resized"
    assert other.a.out_features == 6
    assert torch.equal(other(_X), copied(_X))
    assert torch.equal(beside(_X), expected)
    assert net.a.out_features == 12


def test_a_shallow_copy_of_a_graph_resizes_the_same_model():
    net = _net()
    expected, gm = net(_X), fxwidth.trace(net, _X)
    shallow = copy.copy(gm)
    assert _halved(shallow) == "untouched"
    assert torch.equal(net(_X), expected)
    assert torch.equal(gm(_X), expected)


def test_a_graph_that_is_copied_alone_has_no_model_and_keeps_none_alive():
    net = _net()
    gm = fxwidth.trace(net, _X)
    alone = (copy.deepcopy(gm), _pickled(gm))
    assert [original_of(one) for one in alone] == [None, None]
    other, copied = copy.deepcopy((net, gm))
    assert original_of(copied) is other
    kept = weakref.ref(other)
    del other
    gc.collect()
    assert kept() is None
    assert original_of(copied) is None
