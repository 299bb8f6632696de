"""State that modules keep beside tensors, by `get_extra_state`, comes back from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError
from tests.frontends.test_extra_state import Inside, Itself


@pytest.mark.parametrize("kind", [Inside, Itself])
def test_it_comes_back(kind: type[Inside], tmp_path: Path) -> None:
    model, x = kind(), torch.randn(3, 6)
    model.part[0].note = {"scale": 0.5, 3: [torch.tensor([1.0, float("nan")])]}
    gm = fxwidth.trace(model, x)
    fxwidth.resize(gm, {"part.0": 5})
    fxwidth.save(gm, tmp_path / "a.safetensors")
    fresh = kind()
    again = fxwidth.load(tmp_path / "a.safetensors", fresh, x)
    assert torch.equal(again(x), gm(x))
    for state in (again.state_dict(), fresh.state_dict()):
        note = state["part.0._extra_state"]["note"]
        assert list(note) == ["scale", 3]
        assert (note["scale"], note[3][0][0].item(), note[3][0].isnan().tolist()) == (0.5, 1.0, [False, True])


def test_what_plain_data_cannot_hold_is_named(tmp_path: Path) -> None:
    model, x = Inside(), torch.randn(3, 6)
    model.part[0].note = object()
    with pytest.raises(FxwidthError, match=r"part\.0\._extra_state\['note'\] is a builtins\.object, which a file of"):
        fxwidth.save(fxwidth.trace(model, x), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


class Failing(nn.Linear):
    """Takes no extra state."""

    def get_extra_state(self) -> Any:
        return 1

    def set_extra_state(self, state: Any) -> None:
        self.half_done = state
        raise ValueError("not this one")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear calls it
        return super().forward(input)


def test_what_a_model_refuses_leaves_it_as_it_was(tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    fxwidth.save(fxwidth.trace(nn.Sequential(Failing(6, 4), nn.Linear(4, 2)), x), tmp_path / "a.safetensors")
    model = nn.Sequential(Failing(6, 4), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(FxwidthError, match=r"cannot be loaded \(ValueError: not this one\); nothing has changed"):
        fxwidth.load(tmp_path / "a.safetensors", model, x)
    assert not hasattr(model[0], "half_done")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
