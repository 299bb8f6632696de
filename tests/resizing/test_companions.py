"""Companions of a network take its channels: what was an average of its weights goes on to be one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxwidth
from fxwidth import FxwidthError
from tests.oracles.interruptions import differences, state_of


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5),
    ).double()  # fmt: skip


def images(count: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def graph() -> fx.GraphModule:
    return fxwidth.trace(model(), images())


def perturbed(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph with slightly other weights."""
    result = copy.deepcopy(gm)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return result


def test_a_copy_with_the_same_weights_ends_with_the_same_weights() -> None:
    gm = graph()
    other = copy.deepcopy(gm)
    for plan in ({"0": 5, "3": 4}, {"0": 9, "3": 4}, {"3": 7}):
        fxwidth.resize(gm, plan, also=[other])
        pairs = zip(gm.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
        assert torch.equal(gm.eval()(images(3)), other.eval()(images(3)))


@pytest.mark.parametrize("data", [None, [images(32, 5)]])
def test_companions_keep_the_same_channels_with_weights_of_their_own(data: Any) -> None:
    gm = graph()
    other = perturbed(gm)
    wanted = perturbed(gm)
    fxwidth.resize(gm, {"0": 5, "3": 4}, also=[other], data=data)
    kept = fxwidth.report(gm).resizes[-1]["kept"]
    fxwidth.resize(wanted, kept, rotate=False, data=data)
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert fxwidth.report(gm).resizes[-1]["rotated"] == []


def test_a_companion_that_grows_does_what_it_did_and_has_the_new_channels_of_the_network() -> None:
    gm = graph()
    other = perturbed(gm)
    gm.eval()
    other.eval()
    x = images(5, 7)
    before = [one(x) for one in (gm, other)]
    fxwidth.resize(gm, {"0": 11, "3": 8}, also=other)
    for one, wanted in zip((gm, other), before, strict=True):
        torch.testing.assert_close(one(x), wanted, rtol=0, atol=1e-10)
    assert torch.equal(gm.get_parameter("0.weight")[8:], other.get_parameter("0.weight")[8:])
    assert not torch.equal(gm.get_parameter("0.weight")[:8], other.get_parameter("0.weight")[:8])


@pytest.mark.parametrize("directions", ["orthogonal", "tiny"])
def test_averaging_goes_on_while_an_evolver_resizes_both(directions: str) -> None:
    gm = graph()
    averaged = AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-3)
    options: dict[str, Any] = {"loss": F.cross_entropy} if directions == "tiny" else {}
    evolver = fxwidth.Evolver(
        gm, optimizer, every=3, rounds=2, params=0.6, breaths=1, also=[averaged], directions=directions, **options
    )
    for step in range(15):
        x, y = images(16, step), torch.randint(0, 5, (16,), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        apart = _apart(gm, averaged)
        evolver.step(x, y)
        # With other channels than those of the network its average would be a network of noise.
        assert _apart(gm, averaged) < 1.3 * apart + 0.05
        averaged.update_parameters(gm)
    assert evolver.finished
    shapes = [parameter.shape for parameter in gm.parameters()]
    assert [parameter.shape for parameter in averaged.parameters()] == shapes


@torch.no_grad()
def _apart(gm: nn.Module, averaged: nn.Module) -> float:
    one, mean = gm.eval()(images(32, 99)), averaged.eval()(images(32, 99))
    gm.train()
    averaged.train()
    return float((one - mean).norm() / one.norm())


def test_what_is_no_copy_is_refused_and_nothing_changes() -> None:
    gm = graph()
    narrower = copy.deepcopy(gm)
    fxwidth.resize(narrower, {"0": 4})
    before = [state_of(one) for one in (gm, narrower)]
    for companion, words in (
        (narrower, r"also\[0\] is no copy of the graph: '0' has width 4, and not 8"),
        (gm, r"also\[0\] shares tensors with the graph"),
        (model(), "also= takes copies of the graph, but received Sequential"),
    ):
        with pytest.raises(FxwidthError, match=words):
            fxwidth.resize(gm, {"0": 5}, also=[companion])
        assert not [
            line for one, old in zip((gm, narrower), before, strict=True) for line in differences(old, state_of(one))
        ]
