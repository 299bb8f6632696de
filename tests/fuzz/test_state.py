"""Random networks that keep something in buffers or follow their mode: graphs do what models do, call after call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxwidth
from fxwidth.verification.replay_oracle import largest_difference
from tests.fuzz.networks import Program, RandomNetwork, example_input, seeded_program
from tests.fuzz.state_ops import STATE_OPS
from tests.oracles.judges import ROUNDING, randomise

_OTHERS = ("pointwise conv", "conv", "relu", "batch norm", "add", "cat", "split", "layer norm", "modulated conv")


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_calls(graph: nn.Module, model: nn.Module) -> None:
    """Assert that both give the same and keep the same, in a number of calls in both modes and with other batches."""
    graph, model = copy.deepcopy(graph), copy.deepcopy(model)
    x = example_input()
    for training, batch in (
        (True, x),
        (True, torch.cat([x, x[:1]])),
        (False, x),
        (False, x[:2]),
        (True, x),
        (False, x),
    ):
        results = []
        for module in (model, graph):
            torch.manual_seed(1)
            with torch.no_grad():
                results.append(module.train(training)(batch))
        difference = largest_difference(results[1], results[0])
        assert difference < ROUNDING, f"train({training}), {len(batch)} samples: outputs differ by {difference:.1e}"
    own = graph.state_dict()
    for name, tensor in model.state_dict().items():
        assert name in own, f"{name} is not in the graph's state"
        assert torch.allclose(own[name], tensor), f"{name} is another one after some calls"


def check(program: Program) -> None:
    torch.manual_seed(0)
    model = randomise(RandomNetwork(program).double().eval())
    before = state_of(model)
    graph = fxwidth.trace(model, example_input())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"tracing has written to {name}"
    assert_same_calls(graph, model)
    alive = copy.deepcopy(graph)
    alive.graph.eliminate_dead_code()
    alive.recompile()
    # What is written is no dead code, whoever uses it.
    assert_same_calls(alive, model)
    groups = fxwidth.analyze(graph).free
    fxwidth.resize(graph, {group.name: group.width // 2 for group in groups if group.width > 3})
    for training in (True, False):
        assert all(y.isfinite().all() for y in graph.train(training)(example_input()))


@pytest.mark.parametrize("op", STATE_OPS)
def test_graphs_keep_and_follow_what_models_do(op: str) -> None:
    for seed in range(3):
        program = seeded_program(60_000 + seed, ops=(op, *_OTHERS))
        try:
            check(program)
        except Exception as error:
            raise AssertionError(f"the network of seed {60_000 + seed} fails: {error}\n{program}") from error
