"""Numbers that a model takes out of its own tensors are taken at every call, or the model is not traced."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.frontends.call_signature import arguments_of, call_of
from fxwidth.frontends.export import exported_graph
from fxwidth.frontends.symbolic import symbolic_graph
from fxwidth.frontends.watched_tensors import _READS
from fxwidth.runtime.trace_guards import UntraceableError

READS: dict[str, Callable[[Tensor], float]] = {
    "tolist": lambda t: t.tolist()[0],
    "tolist of an element": lambda t: t[0].tolist(),
    "item": lambda t: t[0].item(),
    "numpy": lambda t: float(t.numpy()[0]),
    "numpy of a part": lambda t: float(t.detach()[:1].numpy()[0]),
    "array": lambda t: float(np.asarray(t)[0]),
    "dlpack": lambda t: float(np.from_dlpack(t)[0]),
    "iterated": lambda t: next(float(part) for part in t),
    "number of a new tensor": lambda t: float(torch.tensor(t.tolist())[0]),
    "through numpy and back": lambda t: float(torch.from_numpy(t.numpy())[0]),
}


class Reading(nn.Module):
    """Multiplies with a number that is read from one of its tensors."""

    def __init__(self, read: Callable[[Tensor], float], place: str) -> None:
        super().__init__()
        self.into, self.out, self.read, self.place = nn.Linear(6, 8), nn.Linear(8, 3), read, place
        values = torch.tensor([2.0, 3.0])
        if place == "buffer":
            self.register_buffer("values", values)
        else:
            self.values = [values] if place == "list" else values

    @property
    def tensor(self) -> Tensor:
        return self.values[0] if self.place == "list" else self.values

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x) * self.read(self.tensor))


@pytest.mark.parametrize("place", ["attribute", "list", "buffer"])
@pytest.mark.parametrize("name", READS)
def test_numbers_follow_the_tensor(name: str, place: str) -> None:
    model, x = Reading(READS[name], place).eval(), torch.randn(4, 6)
    try:
        gm = fxwidth.trace(model, x)
    except FxwidthError as refusal:
        told = str(refusal)
        assert "cannot be traced" in told
        return
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x))
        model.tensor.mul_(3)
        if place == "buffer":
            for buffer in gm.buffers():
                buffer.copy_(model.tensor)
        torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize("name", ["tolist", "numpy", "array", "dlpack", "numpy of a part", "tolist of an element"])
def test_front_ends_end_there(name: str) -> None:
    model = Reading(READS[name], "attribute").eval()
    arguments = arguments_of(model, call_of((torch.randn(4, 6),), {}))
    with pytest.raises(UntraceableError, match="reads numbers from a tensor of the model"):
        symbolic_graph(model, arguments)
    if name in ("tolist", "numpy", "dlpack"):
        with pytest.raises(UntraceableError, match="reads numbers from a tensor of the model"):
            exported_graph(model, arguments, torch.device("cpu"))
    own = [vars(Tensor).get(read) for read in _READS]
    assert not any("refusing" in getattr(method, "__qualname__", "") for method in own)


def test_other_tensors_are_read_as_ever() -> None:
    class Making(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.into(x) * torch.tensor([2.0]).tolist()[0] * float(np.asarray(torch.ones(1))[0])

    model, x = Making().eval(), torch.randn(4, 6)
    torch.testing.assert_close(symbolic_graph(model, arguments_of(model, call_of((x,), {})))(x), model(x))
