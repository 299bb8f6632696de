"""Code that asks what kind of object it has gets the answers that it gets without a tracer, or is traced otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.tracing import front_end_attempts

WIDTH = 8


class Asking(nn.Module):
    """Two layers, with what is asked in between."""

    def __init__(self, between: Callable[..., Any]) -> None:
        super().__init__()
        self.between = between
        self.up, self.down = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, n: float = 2) -> Any:
        return self.down(self.between(self.up(x), n))


def floats(h: Tensor, _: float) -> Tensor:
    try:
        return h * float(h.shape[1])
    except TypeError:
        return h


QUESTIONS: dict[str, Callable[..., Any]] = {
    "isinstance of a tensor": lambda h, n: h * 3 if isinstance(h, Tensor) else h,
    "is_tensor": lambda h, n: h * 3 if torch.is_tensor(h) else h,
    "type of a tensor": lambda h, n: h * 3 if issubclass(type(h), Tensor) else h,
    "isinstance of a number": lambda h, n: h * n if isinstance(n, (int, float)) else h,
    "isinstance of a size": lambda h, n: h * 3 if isinstance(h.shape[-1], int) else h,
    "type of a number": lambda h, n: h * 3 if type(n) is int else h,
    "is_tensor of a number": lambda h, n: h * 3 if torch.is_tensor(n) else h,
    "dtype": lambda h, n: h * 3 if h.dtype is torch.float64 else h,
    "number of dims in a table": lambda h, n: h * {2: 3.0}.get(h.dim(), 1.0),
    "text of a number": lambda h, n: h * f"{n}".count("2"),
    "attribute of a number": lambda h, n: h * 7 if hasattr(n, "shape") else h,
    "conversion that fails": floats,
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_graph_does_what_the_model_does(question: str, given: bool, x: Tensor) -> None:
    torch.manual_seed(0)
    model = Asking(QUESTIONS[question]).double()
    arguments = (x, 2) if given else (x,)
    gm = fxwidth.trace(model, arguments)
    for mode in (True, False):
        assert torch.equal(gm.train(mode)(*arguments), model.train(mode)(*arguments))
    expected = model(*arguments)
    for group in fxwidth.analyze(gm).free:
        gm = fxwidth.resize(gm, {group.name: WIDTH + 2})
    torch.testing.assert_close(gm(*arguments), expected)


def test_a_tensor_is_not_taken_where_a_number_was(x: Tensor) -> None:
    """The code may have asked which of the two it is."""
    torch.manual_seed(0)
    model = Asking(QUESTIONS["is_tensor of a number"]).double()
    gm = fxwidth.trace(model, (x, 2))
    assert torch.equal(gm(x, 5), model(x, 5))
    with pytest.raises(FxwidthError, match="argument 'n' is a tensor, not 2 as when the graph was traced"):
        gm(x, torch.tensor(2.0))


@pytest.mark.parametrize("question", ["isinstance of a tensor", "dtype", "number of dims in a table"])
def test_a_graph_that_does_something_else_is_seen(question: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: nobody compares the graph with the model."""
    monkeypatch.setattr(front_end_attempts._Attempts, "_otherwise", lambda *_: None)
    torch.manual_seed(0)
    model = Asking(QUESTIONS[question]).double()
    assert not torch.equal(fxwidth.trace(model, x)(x), model(x))
