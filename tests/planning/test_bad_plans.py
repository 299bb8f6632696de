"""Plans that cannot be carried out: clear words, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxwidth
from fxwidth import FxwidthError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Softmax(-1), nn.Linear(6, 3)).eval()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"encoder": 4}, r"there is no channel group 'encoder'.*print\(fxwidth\.analyze\(gm\)\) lists all groups"),
        ({"0": 0}, r"group '0'.* 0"),
        ({"0": -3}, r"group '0'.* -3"),
        ({"0": 2.5}, r"group '0'.* 2\.5"),
        ({"0": True}, r"group '0'.* True"),
        ({"4": 2}, r"group '4' must keep its width 3: the size of the model's output.*Remove it from the plan"),
        ({"2": 9}, r"growing group '2' from 6 to 9 would change the function: .*softmax.*Pass exact=False"),
        (["0"], r"a plan maps group names to widths, but received \['0'\]; fxwidth\.plan"),
    ],
)
def test_bad_plans_are_refused_and_nothing_changes(plan: Any, words: str) -> None:
    model = network()
    gm = fxwidth.trace(model, torch.randn(2, 4))
    x = torch.randn(2, 4)
    before, code, meta = gm(x), gm.code, dict(gm.meta)
    parameters = [id(parameter) for parameter in gm.parameters()]
    with pytest.raises(FxwidthError, match=words):
        fxwidth.resize(gm, plan)
    assert torch.equal(gm(x), before)
    assert (gm.code, gm.meta) == (code, meta)
    assert [id(parameter) for parameter in gm.parameters()] == parameters


def test_inexact_growth_can_be_asked_for() -> None:
    gm = fxwidth.trace(network(), torch.randn(2, 4))
    fxwidth.resize(gm, {"2": 9}, exact=False)
    assert gm(torch.randn(2, 4)).shape == (2, 3)
