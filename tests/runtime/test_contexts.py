"""What the caller has switched on around a call changes nothing of what is found, planned and done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from tests.checkpoint.test_saving import NETWORKS, network


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _autocast_of_other_devices() -> Iterator[None]:
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of a GPU": _autocast_of_other_devices,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "the meta device": lambda: torch.device("meta"),
    "doubles": lambda: _default_dtype(torch.float64),
    "half precision": lambda: _default_dtype(torch.bfloat16),
    "deterministic algorithms": _deterministic,
}


def evolved(
    name: str, traced_in: AbstractContextManager[object], resized_in: AbstractContextManager[object]
) -> tuple[fx.GraphModule, str, dict[str, int]]:
    model, x = network(name)
    model, x = model.float(), x.float()
    with traced_in:
        gm = fxwidth.trace(model, x)
    with resized_in:
        width_graph = fxwidth.analyze(gm)
        described = str(width_graph)
        plan = fxwidth.plan(width_graph, params=0.6)
        fxwidth.resize(gm, plan, data=[x])
        grown = next(g for g in fxwidth.analyze(gm).free if g.inexact_growth is None)
        fxwidth.resize(gm, {grown.name: grown.width + 2})
    return gm, described, dict(plan)


@cache
def outside(name: str) -> tuple[fx.GraphModule, str, dict[str, int]]:
    torch.manual_seed(0)
    return evolved(name, nullcontext(), nullcontext())


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["layer norm", "convolutions"])
def test_results_are_those_of_outside(name: str, around: str) -> None:
    gm, described, plan = evolved(name, AROUND[around](), AROUND[around]())
    expected, described_outside, plan_outside = outside(name)
    assert described == described_outside
    assert plan == plan_outside
    assert gm.code == expected.code
    for (key, tensor), (_, other) in zip(gm.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(tensor, other), key
    # What can be trained can be trained.
    gm.train()(NETWORK_INPUTS[name]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gm.parameters())


NETWORK_INPUTS: dict[str, Tensor] = {name: torch.randn(shape) for name, (_, shape) in NETWORKS.items()}


def test_autocast_forgets_the_weights_that_have_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = torch.randn(8, 6)
    gm = fxwidth.trace(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        gm(x)  # the cast bias of the last layer, which takes a constant in the resize, is kept
        fxwidth.resize(gm, {"0": 5})
        inside = gm(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gm(x), inside)
