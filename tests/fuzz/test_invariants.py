"""What a resize of a random network must leave: flags, dtypes, devices, modes, and what the caller passed in."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.verification.replay_oracle import largest_difference
from tests.fuzz.networks import RandomNetwork, example_input, seeded_program
from tests.oracles.judges import ROUNDING, randomise

Flags = dict[str, tuple[bool, torch.dtype, torch.device, type]]


def network(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random network, some of whose parameters are frozen and some of whose modules are in eval mode."""
    torch.manual_seed(0)
    model = randomise(RandomNetwork(seeded_program(seed)).double()).to(dtype)
    chooser = random.Random(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(chooser.random() < 0.7)
    model.train(chooser.random() < 0.5)
    for part in model.layers.values():
        if chooser.random() < 0.3:
            part.train(not model.training)
    return model


def flags_of(module: nn.Module) -> Flags:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: (t.requires_grad, t.dtype, t.device, type(t)) for name, t in tensors}


def modes_of(module: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in module.named_modules()}


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [y.detach() for y in module(x)]


def widths(gm: fx.GraphModule, seed: int) -> dict[str, int]:
    """New widths of about half of the groups: some shrink, and some of those that can, grow."""
    chooser = random.Random(seed)
    plan = {}
    for group in fxwidth.analyze(gm).free:
        grows = group.inexact_growth is None and chooser.random() < 0.4
        if chooser.random() < 0.6:
            plan[group.name] = group.width + chooser.randint(1, 3) if grows else max(2, group.width // 2)
    return plan


def check(seed: int, dtype: torch.dtype) -> None:
    model, x = network(seed, dtype), example_input().to(dtype)
    gm = fxwidth.trace(model, x)
    plan = widths(gm, seed)
    data = [torch.cat([x, x + 0.1])]
    given: list[Any] = [x, plan, *data]
    before = copy.deepcopy(given), flags_of(gm), modes_of(gm)
    drops = any(width < fxwidth.analyze(gm)[name].width for name, width in plan.items())
    # Data that growth would not look at are refused.
    fxwidth.resize(gm, plan, **({"data": data, "recalibrate": False} if drops else {}))
    for one, other in zip(given, before[0], strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert flags_of(gm) == before[1]
    for name, training in before[2].items():
        assert modes_of(gm)[name] == training, name
    assert all(y.isfinite().all() for y in run(gm.eval(), x))


@pytest.mark.parametrize("start", range(40_000, 40_040, 10))
def test_a_graph_is_its_model_in_both_modes(start: int) -> None:
    for seed in range(start, start + 10):
        model, x = network(seed), example_input()
        gm = fxwidth.trace(model, x)
        for training in (True, False):
            one, other = (copy.deepcopy(module).train(training) for module in (model, gm))
            assert largest_difference(run(other, x), run(one, x)) < ROUNDING, f"seed {seed}, train({training})"


@pytest.mark.parametrize("start", range(41_000, 41_040, 10))
def test_flags_and_arguments_stay(start: int) -> None:
    for seed in range(start, start + 10):
        try:
            check(seed, torch.float32 if seed % 2 else torch.float64)
        except Exception as error:
            raise AssertionError(f"the network of seed {seed} fails: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("start", range(42_000, 43_000, 250))
def test_flags_and_arguments_of_many_stay(start: int) -> None:
    for seed in range(start, start + 250):
        check(seed, torch.float32 if seed % 2 else torch.float64)
