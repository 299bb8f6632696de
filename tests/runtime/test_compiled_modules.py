"""What `torch.compile(module)` returns is taken for the module in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fxwidth


@pytest.fixture(autouse=True)
def _without_a_warning() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).double()


X = torch.ones(16, 8, dtype=torch.float64)


def test_a_compiled_model_is_traced_and_resized_as_the_one_in_it() -> None:
    model = network()
    gm = fxwidth.trace(torch.compile(model, backend="eager"), X)
    wanted = fxwidth.trace(network(), X)
    assert list(gm.state_dict()) == list(model.state_dict()) == list(wanted.state_dict())
    for one in (gm, wanted):
        fxwidth.resize(one, {"0": 20})
    assert torch.equal(gm(X), wanted(X))
    assert torch.equal(model(X), wanted(X))


def test_a_compiled_model_is_given_back_as_such() -> None:
    compiled = torch.compile(network(), backend="eager")
    compiled(X)
    assert fxwidth.evolve(compiled, X, params=0.5, output="module") is compiled
    wanted = fxwidth.evolve(network(), X, params=0.5)
    assert torch.equal(compiled(X), wanted(X))


def test_a_compiled_graph_is_resized_in_it() -> None:
    gm = fxwidth.trace(network(), X)
    compiled = torch.compile(gm, backend="eager")
    compiled(X)
    assert fxwidth.resize(compiled, {"0": 24}) is not None
    assert fxwidth.analyze(compiled)["0"].width == 24
    assert fxwidth.Evolver(compiled, every=1, rounds=1, params=0.5).step() is not None
    assert torch.equal(compiled(X), gm(X))
    assert gm.get_parameter("0.weight").shape[0] < 24
