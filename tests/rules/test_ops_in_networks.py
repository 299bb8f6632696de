"""Ops between layers: halved as the replay oracle says, without copies and grown as the function says."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fxwidth
from fxwidth.analysis.roles import Role
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.verification.replay_oracle import largest_difference, reference_outputs
from tests.oracles.judges import ROUNDING, as_one_node, assert_rewrites, halved_exactly, randomise, removals
from tests.oracles.values import copy_halves
from tests.zoo.networks_of_ops import OP_CASES

# Torch 2.11 warns of sparse tensors even where their invariants are checked.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

TRACED, OTHER = 4, 7

by_name = pytest.mark.parametrize("name", OP_CASES)


def graph_of(name: str, batch: int = TRACED) -> fx.GraphModule:
    return copy.deepcopy(_graph_of(name, batch))


@functools.cache
def _graph_of(name: str, batch: int) -> fx.GraphModule:
    torch.manual_seed(0)
    case = OP_CASES[name]
    return fxwidth.trace(randomise(case.build()).double().eval(), inputs_of(name, batch))


@functools.cache
def inputs_of(name: str, batch: int) -> tuple[Any, ...]:
    torch.manual_seed(batch)
    return OP_CASES[name].inputs(batch)


@torch.no_grad()
def answers(gm: fx.GraphModule, name: str) -> list[Tensor]:
    """Return what a graph gives at two batch sizes."""
    return [tensor for batch in (TRACED, OTHER) for tensor in deep_tensors(gm(*inputs_of(name, batch)))]


def replayed(wg: WidthGraph, kept: dict[str, Any], values: tuple[Any, ...]) -> list[Tensor]:
    maps = IndexMaps(wg.analysis.space, {wg[name].factor: channels for name, channels in kept.items()})
    return reference_outputs(wg.analysis, maps, values)


@by_name
def test_halved_as_the_replay_oracle_says(name: str) -> None:
    gm = graph_of(name)
    wg, other = fxwidth.analyze(gm), fxwidth.analyze(graph_of(name, OTHER))
    assert len(wg.free) == OP_CASES[name].free, str(wg)
    kept = removals(wg.free, 0.5)
    by_group = {group.name: kept[group.factor] for group in wg.free}
    expected = [
        tensor
        for graph, batch in ((wg, TRACED), (other, OTHER))
        for tensor in replayed(graph, by_group, inputs_of(name, batch))
    ]
    halved_exactly(gm, by_group)
    assert largest_difference(answers(gm, name), expected) < ROUNDING


# Behind a norm over the channels, what the halves are is not all that its statistics hold.
@pytest.mark.parametrize("name", [name for name, case in OP_CASES.items() if case.free and case.copies])
def test_copies_go_without_a_trace(name: str) -> None:
    gm = graph_of(name)
    wg = fxwidth.analyze(gm)
    groups = [group for group in wg.free if group.sites_as(Role.WRITER)]
    for group in groups:
        copy_halves(wg, group)
    before = answers(gm, name)
    data = [OP_CASES[name].inputs(TRACED * 3) for _ in range(6)]
    fxwidth.resize(gm, {group.name: group.width // 2 for group in groups}, data=data, rotate=False)
    assert largest_difference(answers(gm, name), before) < ROUNDING


@by_name
def test_growth_is_exact(name: str) -> None:
    gm = graph_of(name)
    before = answers(gm, name)
    exact = [group for group in fxwidth.analyze(gm).free if group.inexact_growth is None]
    assert len(exact) == OP_CASES[name].grown, [group.inexact_growth for group in fxwidth.analyze(gm).free]
    fxwidth.resize(gm, {group.name: group.width + 3 for group in exact})
    assert largest_difference(answers(gm, name), before) < ROUNDING


class PartOfSamples(torch.nn.Module):
    """A layer beside a view by strides of a part of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shown = torch.tanh(x.contiguous()).as_strided((x.shape[0], 2), (x.shape[1], 1), 2)
        return self.out(torch.relu(self.into(x)).view(-1, 2, 4).flatten(1)), shown * 2


def test_a_view_by_strides_shows_the_same_of_more_samples() -> None:
    """Where the whole model has to be written as ops, the batch must not be written into it as a number."""
    x = torch.randn(4, 6, dtype=torch.float64)
    module = assert_rewrites(as_one_node(PartOfSamples()), [x])
    assert module.meta["fxwidth_history"][-1]["lowered"]
    longer = torch.cat([x, x[:3]])
    with torch.no_grad():
        answers_to_more, answers_to_few = module(longer), module(x)
    assert [len(y) for y in answers_to_more] == [7, 7]
    assert largest_difference([y[:4] for y in answers_to_more], answers_to_few) < ROUNDING
