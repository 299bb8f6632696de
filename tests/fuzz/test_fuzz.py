"""Random networks through analysis, replay, rewriting, growth, training and a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fxwidth
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.verification.replay_oracle import largest_difference
from tests.fuzz.networks import Program, RandomNetwork, Tally, example_input, programs, seeded_program
from tests.oracles.judges import (
    ROUNDING,
    analysed,
    assert_replays,
    assert_replays_unchanged,
    assert_rewrites,
    randomise,
)

# The same networks every time; hypothesis's are small and can be shrunk, those of seeds are more varied.
PROFILE = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def network(program: Program) -> RandomNetwork:
    torch.manual_seed(0)
    return RandomNetwork(program).double()


def check_replay(program: Program, tally: Tally) -> None:
    inputs = [example_input()]
    model = network(program)
    analysis = analysed(model, inputs)
    tally.add(WidthGraph(analysis))
    assert_replays(analysis, inputs)
    assert_replays_unchanged(analysis, model, inputs)


def check_rewriting(program: Program) -> None:
    """Shrink for real, run at another batch size, train a step."""
    x = example_input()
    module = assert_rewrites(network(program), [x])
    longer = torch.cat([x, x[:1]])
    with torch.no_grad():
        assert largest_difference([y[: len(x)] for y in module(longer)], module(x)) < ROUNDING
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    sum(y.square().mean() for y in module(x)).backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def check_growth(program: Program, folder: Path) -> None:
    """Grow every group that says that it can be; save, and load into a network of the old size."""
    x = example_input()
    module = fxwidth.trace(randomise(network(program).eval()), x)
    with torch.no_grad():
        before = module(x)
    groups = fxwidth.analyze(module).free
    plan = {group.name: group.width + 1 + i % 3 for i, group in enumerate(groups) if group.inexact_growth is None}
    fxwidth.resize(module, plan)
    fxwidth.save(module, folder / "grown.safetensors")
    loaded = fxwidth.load(folder / "grown.safetensors", network(program).eval(), x)
    with torch.no_grad():
        assert largest_difference(module(x), before) < ROUNDING
        assert largest_difference(loaded(x), module(x)) == 0.0


def over_seeds(check: Callable[[Program], None], seeds: Iterable[int]) -> None:
    for seed in seeds:
        program = seeded_program(seed)
        try:
            check(program)
        except Exception as error:
            raise AssertionError(f"the network of seed {seed} fails: {error}\n{program}") from error


@settings(PROFILE, max_examples=100)
@given(programs())
def test_small_networks_replay(program):
    check_replay(program, Tally())


def test_varied_networks_replay(capsys):
    tally = Tally()
    over_seeds(partial(check_replay, tally=tally), range(200))
    with capsys.disabled():
        print(f"\n{tally}")  # noqa: T201 - no oracle sees what is pinned without need: a reader must
    # A view by strides pins for good reason: its numbers are its own.
    assert tally.needless() < 0.1 * tally.free
    assert tally.by_strides < 0.2 * tally.free


def test_varied_networks_rewritten():
    over_seeds(check_rewriting, range(1000, 1040))


def test_varied_networks_grown(tmp_path):
    over_seeds(partial(check_growth, folder=tmp_path), range(2000, 2040))


@pytest.mark.slow
@settings(PROFILE, max_examples=1000)
@given(programs())
def test_many_small_networks_replay(program):
    check_replay(program, Tally())


@pytest.mark.slow
@pytest.mark.parametrize("start", range(10_000, 15_000, 500))
def test_many_networks_replay(start):
    over_seeds(partial(check_replay, tally=Tally()), range(start, start + 500))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(20_000, 21_000, 250))
def test_many_networks_rewritten(start):
    over_seeds(check_rewriting, range(start, start + 250))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(30_000, 31_000, 250))
def test_many_networks_grown(tmp_path, start):
    over_seeds(partial(check_growth, folder=tmp_path), range(start, start + 250))
