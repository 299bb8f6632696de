"""Several optimizers that train one model are carried over a resize together, or none is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

import fxwidth
from fxwidth import FxwidthError
from tests.oracles.interruptions import differences, state_of


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3))


def rows() -> Tensor:
    return torch.randn(5, 6)


def trained(gm: fx.GraphModule) -> list[Optimizer]:
    """Return two optimizers with state, each for a part of the parameters."""
    parameters = list(gm.parameters())
    both = [torch.optim.SGD(parameters[:3], lr=0.1, momentum=0.9), torch.optim.Adam(parameters[3:])]
    for _ in range(2):
        gm(rows()).square().mean().backward()
        for one in both:
            one.step()
    return both


def resized(gm: fx.GraphModule, optimizers: list[Optimizer]) -> None:
    fxwidth.resize(gm, {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}, optimizer=optimizers)


def evolved(gm: fx.GraphModule, optimizers: list[Optimizer]) -> None:
    fxwidth.evolve(gm, optimizer=tuple(optimizers), params=0.5)


def stepped(gm: fx.GraphModule, optimizers: list[Optimizer]) -> None:
    evolver = fxwidth.Evolver(gm, optimizers, every=1, rounds=1, params=0.5)
    assert evolver.step(rows()) is not None


@pytest.mark.parametrize("resize", [resized, evolved, stepped])
def test_all_hold_the_parameters_of_the_graph_and_go_on(
    resize: Callable[[fx.GraphModule, list[Optimizer]], None],
) -> None:
    gm = fxwidth.trace(network(), rows())
    both = trained(gm)
    before = sum(parameter.numel() for parameter in gm.parameters())
    resize(gm, both)
    assert sum(parameter.numel() for parameter in gm.parameters()) < before
    held = [{id(parameter) for group in one.param_groups for parameter in group["params"]} for one in both]
    parameters = list(map(id, gm.parameters()))
    assert held == [set(parameters[:3]), set(parameters[3:])]
    for one in both:
        for key, state in one.state.items():
            assert all(
                value.shape == key.shape for value in state.values() if isinstance(value, Tensor) and value.dim()
            )
    old = [parameter.detach().clone() for parameter in gm.parameters()]
    gm(rows()).square().mean().backward()
    for one in both:
        one.step()
    assert not any(torch.equal(*pair) for pair in zip(old, gm.parameters(), strict=True))


def test_an_interruption_leaves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fxwidth.trace(network(), rows())
    both = trained(gm)
    plan = {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}
    before = [state_of(gm, optimizer=one) for one in both]

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxwidth.resizing.resize.forget_noise", broken)
    with pytest.raises(KeyboardInterrupt):
        fxwidth.resize(gm, plan, optimizer=both)
    for one, state in zip(both, before, strict=True):
        assert not differences(state, state_of(gm, optimizer=one))


def test_one_of_another_model_is_refused() -> None:
    gm = fxwidth.trace(network(), rows())
    both = [torch.optim.SGD(gm.parameters(), lr=0.1), torch.optim.Adam(network().parameters())]
    with pytest.raises(FxwidthError, match="Adam with 6 parameters, none of which is in the graph"):
        resized(gm, both)
    with pytest.raises(FxwidthError, match=r"takes a torch.optim.Optimizer, or a list of them, but received str"):
        fxwidth.resize(gm, {"0": 4}, optimizer=["adam"])  # type: ignore[list-item]


def test_a_graph_of_another_dtype_says_how_to_go_on() -> None:
    gm = fxwidth.trace(network(), rows()).double()
    with pytest.raises(FxwidthError, match=r"call fxwidth.analyze\(gm, example_inputs\) first") as caught:
        fxwidth.resize(gm, {"0": 4})
    assert "dtypes" in str(caught.value)
    fxwidth.analyze(gm, rows().double())
    fxwidth.resize(gm, {"0": 4})
    assert gm(rows().double()).shape == (5, 3)
