"""Networks that write to parts of tensors or make their weights, from analysis to growth, as a user calls it."""

from __future__ import annotations

import copy

import pytest
import torch

import fxwidth
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import ROUNDING, randomise
from tests.zoo.networks import CASES
from tests.zoo.networks_of_writes import __name__ as own_module

NAMES = [name for name, case in CASES.items() if type(case.build()).__module__ == own_module]


@pytest.mark.parametrize("name", NAMES)
def test_as_a_user_calls_it(name):
    case = CASES[name]
    (x,) = [value.double() for value in case.inputs()]
    graph = fxwidth.trace(randomise(case.build()).double().eval(), x)
    width_graph = fxwidth.analyze(graph)
    assert len(width_graph.free) == case.free
    with torch.no_grad():
        before = graph(x)
    fxwidth.spectrum(width_graph)
    halves = {group.name: max(1, group.width // 2) for group in width_graph.free}
    if halves:
        fxwidth.plan(width_graph, params=0.7)
    for options in ({}, {"selection": "magnitude", "fold": False}, {"data": [x] * 3}):
        halved = fxwidth.resize(copy.deepcopy(graph), halves, **options)
        longer = torch.cat([x, x[:1]])
        with torch.no_grad():
            assert largest_difference([halved(longer)[: len(x)]], [halved(x)]) < ROUNDING
        halved.train()(x).sum().backward()
    grown = {group.name: group.width + 3 for group in width_graph.free if group.inexact_growth is None}
    fxwidth.resize(graph, grown)
    with torch.no_grad():
        assert largest_difference([graph(x)], [before]) < ROUNDING
