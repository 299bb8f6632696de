"""The network of `fxwidth train`: its tiles tie all streams together, until they are untied."""

from __future__ import annotations

import copy

import pytest
import torch

import fxwidth
from fxwidth import FxwidthError
from fxwidth.tracing.analyze import analyze_module
from fxwidth.training.networks import seed_resnet
from fxwidth.verification.replay_oracle import replay_difference
from tests.oracles.judges import random_maps, randomise

INNER = {"0.conv1": 7, "1.conv1": 48, "3.conv1": 100, "4.conv1": 140, "6.conv1": 180, "7.conv1": 200}
STREAMS = {"0.conv2": 24, "1.conv2": 72, "3.conv2": 120, "4.conv2": 160, "6.conv2": 200, "7.conv2": 200}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomise(seed_resnet(image_size=8).double()).eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gm(model, x):
    return fxwidth.untie_copies(fxwidth.trace(copy.deepcopy(model), x))


def test_every_stream_gets_a_width_of_its_own(model, x, gm):
    tied = fxwidth.analyze(fxwidth.trace(copy.deepcopy(model), x))
    assert {group.name: group.width for group in tied.free} == {**INNER, "0.conv2#0": 16, "0.conv2#1": 8}
    assert {group.name: group.width for group in fxwidth.analyze(gm).free} == {**INNER, **STREAMS}


def test_it_computes_the_same(model, gm, x):
    with torch.no_grad():
        for mode in (True, False):
            assert float((gm.train(mode)(x) - model.train(mode)(x)).abs().max()) < 1e-12


def test_the_floor_is_that_of_a_width_of_one_everywhere():
    gm = fxwidth.trace(seed_resnet(), torch.randn(2, 1, 28, 28))
    with pytest.raises(FxwidthError, match="8918 parameters remain"):
        fxwidth.plan(fxwidth.analyze(gm), params=3500)
    graph = fxwidth.analyze(fxwidth.untie_copies(gm))
    with pytest.raises(FxwidthError, match="620 parameters remain"):
        fxwidth.plan(graph, params=600)


@pytest.mark.slow
def test_small_plans_are_made_and_carried_out(gm, x):
    plan = fxwidth.plan(fxwidth.analyze(gm), params=3500)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    gm(x).square().mean().backward()
    optimizer.step()
    fxwidth.resize(gm, plan, optimizer=optimizer)
    assert 0.9 * 3500 < sum(parameter.numel() for parameter in gm.parameters()) <= 3500
    assert all(state["exp_avg"].shape == parameter.shape for parameter, state in optimizer.state.items())
    gm(x).square().mean().backward()
    optimizer.step()
    before = gm.eval()(x).detach()
    fxwidth.resize(gm, {name: width + 3 for name, width in plan.widths.items()}, optimizer=optimizer)
    with torch.no_grad():
        assert float((gm(x) - before).abs().max()) < 1e-10


def test_the_tape_is_followed_at_random_widths(gm, x):
    analysis = analyze_module(gm)
    assert replay_difference(analysis, random_maps(analysis, 0.4), [x]) < 1e-9
