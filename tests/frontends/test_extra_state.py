"""State that modules keep beside tensors, by `get_extra_state`: a state dict fits the model and its graph."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth


class Noted(nn.Linear):
    """A layer with a note, which symbolic tracing takes apart."""

    note: Any = 1

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(Noted(6, 8), nn.ReLU())
        self.unused, self.down = Noted(2, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.part(x))


class Itself(Inside):
    """The model has a note, too."""

    def get_extra_state(self) -> Any:
        return "of the model"

    def set_extra_state(self, state: Any) -> None:
        self.given = state


class Exported(Itself):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.part(x)) if x.shape[1] == 6 else x


@pytest.mark.parametrize("kind", [Inside, Itself, Exported])
def test_a_state_dict_fits_both(kind: type[Inside]) -> None:
    model = kind()
    gm = fxwidth.trace(model, torch.randn(2, 6))
    other = kind()
    other.part[0].note, other.unused.note = "changed", [torch.ones(2)]
    for module in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        saved = {name: value for name, value in module.state_dict().items() if name.endswith("_extra_state")}
        assert saved == {name: value for name, value in model.state_dict().items() if name.endswith("_extra_state")}
        assert module.load_state_dict(other.state_dict()) == ([], [])
        fresh = kind()
        assert fresh.load_state_dict(module.state_dict()) == ([], [])
        assert fresh.part[0].note == "changed"
        assert torch.equal(fresh.unused.note[0], torch.ones(2))
        x = torch.randn(3, 6)
        assert torch.equal(module(x), other(x))


def test_a_state_dict_without_it_loads_as_far_as_it_goes() -> None:
    model = Inside()
    gm = fxwidth.trace(model, torch.randn(2, 6))
    plain = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        model.load_state_dict(plain)
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        gm.load_state_dict(plain)
    assert gm.load_state_dict(plain, strict=False).unexpected_keys == []
