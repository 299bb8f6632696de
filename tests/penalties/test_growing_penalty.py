"""The penalty that grows: on which channels, how fast, and what a resize then loses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxwidth
from fxwidth import FxwidthError
from tests.penalties.networks import made
from tests.zoo.nets import conv


def test_it_is_half_the_squared_norm_of_the_channels_that_go() -> None:
    gm, _ = made("conv")
    penalty = fxwidth.GrowingPenalty(gm, {"2": [0, 1, 4, 6, 7], "5": 4}, step=0.3, most=0.5)
    assert penalty.plan["2"] == (0, 1, 4, 6, 7)
    second, third, head = (gm.get_parameter(f"{i}.weight").detach() for i in (2, 5, 8))
    (gone,) = set(range(5)) - set(penalty.plan["5"])
    assert gone == int(torch.linalg.vector_norm(third.flatten(1), dim=1).argmin())
    squares = second[[2, 3, 5]].square().sum() + third[:, [2, 3, 5]].square().sum()
    squares += third[gone].square().sum() + head[:, 4 * gone : 4 * gone + 4].square().sum()
    for factor in (0.3, 0.5, 0.5):
        torch.testing.assert_close(penalty(), 0.5 * factor * squares)
        assert penalty.factor == factor
    penalty().backward()
    gradient = gm.get_parameter("2.weight").grad
    assert gradient is not None
    torch.testing.assert_close(gradient[3], 0.5 * second[3])
    assert not gradient[0].any()


def test_without_gradients_it_does_not_grow() -> None:
    gm, _ = made("conv")
    penalty = fxwidth.GrowingPenalty(gm, {"2": 5}, step=0.1)
    with torch.no_grad():
        assert float(penalty()) == 0
    assert penalty.factor == 0


def test_channels_are_chosen_as_a_resize_chooses_them() -> None:
    gm, x = made("conv")
    for options in ({"selection": "magnitude"}, {"selection": "greedy", "data": [x]}):
        penalty = fxwidth.GrowingPenalty(gm, {"2": 5}, **options)  # type: ignore[arg-type]
        other = copy.deepcopy(gm)
        fxwidth.resize(other, {"2": 5}, rotate=False, **options)  # type: ignore[arg-type]
        assert penalty.plan == fxwidth.report(other).resizes[-1]["kept"]


def test_what_has_shrunk_is_not_missed() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator, dtype=torch.float64)
    y = x[:, 0] * x[:, 1]
    lost = []
    for grows in (False, True):
        torch.manual_seed(0)
        gm = fxwidth.trace(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 1)).double(), x[:4])
        optimizer = torch.optim.Adam(gm.parameters(), lr=2e-2)
        penalty = fxwidth.GrowingPenalty(gm, {"0": 12}, step=1e-3)
        for _ in range(250):
            loss = (gm(x)[:, 0] - y).square().mean()
            if grows:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            before = (gm(x)[:, 0] - y).square().mean()
            fxwidth.resize(gm, penalty.plan, fold=False)
            lost.append(float((gm(x)[:, 0] - y).square().mean() - before))
    assert lost[1] < 0.02 * lost[0]


def test_a_state_goes_on() -> None:
    gm, _ = made("conv")
    first = fxwidth.GrowingPenalty(gm, {"2": 5}, step=0.1)
    for _ in range(3):
        first()
    second = fxwidth.GrowingPenalty(gm, {"2": [0, 1], "5": 2}, step=0.1)
    second.load_state_dict(first.state_dict())
    assert second.plan == first.plan
    assert torch.equal(second(), first())


def test_after_a_resize_a_new_one_is_needed() -> None:
    gm, _ = made("conv")
    penalty = fxwidth.GrowingPenalty(gm, {"2": [0, 1, 2, 3, 7]})
    state = penalty.state_dict()
    fxwidth.resize(gm, {"0": 4})
    penalty()
    fxwidth.resize(gm, penalty.plan)
    with pytest.raises(FxwidthError, match="'2' had 8 channels when this penalty was made, and has 5: it has"):
        penalty()
    other = fxwidth.GrowingPenalty(gm, {"2": 3})
    with pytest.raises(FxwidthError, match="keeps channel 7 of group '2', whose channels are 0 to 4"):
        other.load_state_dict(state)
    assert other.factor == 0
    assert len(other.plan["2"]) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plan", "options", "told"),
    [
        ({"2": 8}, {}, "drops no channels"),
        ({"2": 9}, {}, "drops no channels"),
        ({}, {}, "drops no channels"),
        ({"8": 1}, {}, "must keep its width 3"),
        ({"two": 1}, {}, "there is no channel group 'two'"),
        ({"2": [0, 9]}, {}, "keeps channel 9 of group '2'"),
        ({"2": 5}, {"step": 0}, "step=0 must be a number above 0"),
        ({"2": 5}, {"step": True}, "step=True must be"),
        ({"2": 5}, {"most": float("inf")}, "most=inf must be"),
        ({"2": 5}, {"selection": "best"}, "best"),
        ({"2": 5}, {"data": [torch.zeros(1)]}, "data= would be ignored: selection='magnitude'"),
        ({"2": 5}, {"data": 3, "selection": "greedy"}, "data"),
    ],
)
def test_what_cannot_be_used_is_refused(plan: Any, options: dict[str, Any], told: str) -> None:
    gm, _ = made("conv")
    with pytest.raises(FxwidthError, match=told):
        fxwidth.GrowingPenalty(gm, plan, **options)


def test_what_is_no_graph_or_no_state_is_refused() -> None:
    gm, _ = made("conv")
    with pytest.raises(FxwidthError, match="received Sequential"):
        fxwidth.GrowingPenalty(conv(), {"2": 5})  # type: ignore[arg-type]
    penalty = fxwidth.GrowingPenalty(gm, {"2": 5})
    for state in ({}, 3, {"calls": 2.5, "plan": {"2": [0]}}, {"calls": 1, "plan": {"2": 4}}):
        with pytest.raises(FxwidthError, match=r"a state of a GrowingPenalty is|groups of other widths"):
            penalty.load_state_dict(state)  # type: ignore[arg-type]
    assert penalty.factor == 0
