"""Random networks through analysis, replay, rewriting, growth, training and a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fxwidth
from fxwidth.groups import WidthGraph
from fxwidth.verification import largest_difference
from tests.fuzzing import Program, RandomNetwork, Tally, example_input, programs
from tests.oracles import ROUNDING, analysed, assert_replays, assert_rewrites, randomise


def over_programs(count: int) -> Callable:
    """Run a test on that many random programs, the same ones every time."""
    profile = settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )
    return lambda test: profile(given(program=programs())(test))


def network(program: Program) -> RandomNetwork:
    torch.manual_seed(0)
    return RandomNetwork(program).double()


def check_replay(program: Program, tally: Tally) -> None:
    inputs = [example_input()]
    analysis = analysed(network(program), inputs)
    tally.add(WidthGraph(analysis))
    assert_replays(analysis, inputs)


def check_rewriting(program: Program) -> None:
    """Shrink, grow, train a step: the graph stays what the axes say, and every parameter is trained."""
    x = example_input()
    module = assert_rewrites(network(program), [x])
    longer = torch.cat([x, x[:1]])
    with torch.no_grad():
        assert largest_difference([y[: len(x)] for y in module(longer)], module(x)) < ROUNDING
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    sum(y.square().mean() for y in module(x)).backward()
    optimizer.step()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in module.parameters())


def check_growth(program: Program, path) -> None:
    """Grow every group that says that it can be, save, and load into a network of the old size."""
    x = example_input()
    module = fxwidth.trace(randomise(network(program).eval()), x)
    with torch.no_grad():
        before = module(x)
    groups = fxwidth.analyze(module).free
    plan = {group.name: group.width + 1 + i % 3 for i, group in enumerate(groups) if group.inexact_growth is None}
    fxwidth.resize(module, plan)
    with torch.no_grad():
        assert largest_difference(module(x), before) < ROUNDING


REPLAYED, REWRITTEN, GROWN = Tally(), 60, 40


@over_programs(250)
def test_random_networks_replay(program):
    check_replay(program, REPLAYED)


def test_pinned_groups_are_few(capsys):
    """What is pinned without need is seen by no oracle: it is counted here."""
    if not REPLAYED.networks:
        pytest.skip("runs after the test that counts")
    with capsys.disabled():
        print(f"\n{REPLAYED}")  # noqa: T201 - the share is a result
    assert REPLAYED.reasons.total() < 0.1 * REPLAYED.free


@over_programs(REWRITTEN)
def test_random_networks_rewritten(program):
    check_rewriting(program)


@over_programs(GROWN)
def test_random_networks_grown(tmp_path, program):
    check_growth(program, tmp_path)


@pytest.mark.slow
@over_programs(5000)
def test_many_random_networks_replay(program):
    check_replay(program, Tally())


@pytest.mark.slow
@over_programs(1000)
def test_many_random_networks_rewritten(program):
    check_rewriting(program)


@pytest.mark.slow
@over_programs(500)
def test_many_random_networks_grown(tmp_path, program):
    check_growth(program, tmp_path)
