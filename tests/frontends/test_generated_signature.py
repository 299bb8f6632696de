"""A call that a model would take otherwise than its graph is refused: nothing is passed on as another argument."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.costs.latency import latency_polynomial
from fxwidth.frontends.call_signature import call_of
from fxwidth.frontends.placeholder_calls import bound_to_placeholders, call_with

EXACT = 1e-12
REFUSED = (TypeError, FxwidthError)
WIDTH = 6
# What keeps each front end but the one from the graph.
FORMS = ("symbolic", "export", "one call")


class Net(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, 4)

    def run(self, x: Tensor, *more: Any) -> Tensor:
        if self.form == "export" and x.shape[1] != WIDTH:
            raise ValueError
        if self.form == "one call" and float(x.detach().sum()) > 1e9:
            x = 2 * x
        y = self.up(x)
        for one in more:
            y = y + one
        return self.down(y)


class Many(Net):
    def forward(self, x: Tensor, *more: Any, scale: float = 3.0) -> Tensor:
        return self.run(x, *more) * scale


class ByName(Net):
    def forward(self, x: Tensor, *, scale: float = 3.0, add: Any = None) -> Tensor:
        return self.run(x) * scale + (0 if add is None else add)


class ByPosition(Net):
    def forward(self, x: Tensor, scale: float = 3.0, /, shift: float = 0.0) -> Tensor:
        return self.run(x) * scale + shift


class Keys(Net):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.run(x) * (2.0 if "flag" in options else 5.0)


class OtherDefault(Net):
    def forward(self, x: Tensor, size: tuple[int, ...] = (2, 3), scale: float = 3.0) -> Tensor:
        return self.run(x) * scale * (1 if size is None else sum(size))


class BehindDefault(Net):
    def forward(self, x: Tensor, scale: float = 3.0, size: Any = (2, 3), *more: Any) -> Tensor:
        return self.run(x, *more) * scale * (1 if size is None else sum(size))


class KeysByPosition(Net):
    def forward(self, x: Tensor, /, **options: Any) -> Tensor:
        return self.run(x) * options.get("x", 1.0)


def _x(batch: int = 3) -> Tensor:
    return torch.randn(batch, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


ONE, TWO = (torch.tensor(float(number), dtype=torch.float64) for number in (1, 2))
# Each with the arguments behind x of the trace, and of calls.
CASES: dict[str, tuple[type[Net], tuple[Any, ...], dict[str, Any], list[tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "none of many": (Many, (), {"scale": 2.0}, [((TWO,), {}), ((2.0,), {}), ((TWO,), {"scale": 2.0})]),
    "one of many": (Many, (ONE,), {"scale": 2.0}, [((), {}), ((TWO, 2.0), {}), ((TWO, TWO), {"scale": 2.0})]),
    "by name": (ByName, (), {"scale": 2.0}, [((2.0,), {}), ((2.0, None), {})]),
    "by position": (ByPosition, (2.0,), {}, [((), {"scale": 2.0})]),
    "a key that was None": (Keys, (), {"flag": None}, [((), {}), ((None,), {})]),
    "a key that was not there": (Keys, (), {}, [((), {"flag": None}), ((None,), {})]),
    "behind another default": (OtherDefault, (), {"scale": 2.0}, [((2.0,), {}), (((1, 1), 2.0), {})]),
    "None behind a default": (BehindDefault, (), {"size": None}, [((), {}), ((3.0,), {})]),
    "one of many behind a default": (BehindDefault, (2.0, None, ONE), {}, [((), {}), ((2.0, None), {})]),
}
by_case = pytest.mark.parametrize("name", CASES)


def traced(name: str, form: str) -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    kind, args, kwargs, _ = CASES[name]
    model = kind(form).double()
    gm = fxwidth.trace(model, (_x(2), *args), kwargs)
    assert (type(gm).__name__ == "Exported") == (form == "export")
    return model, gm


@pytest.mark.parametrize("form", FORMS[:2])
@by_case
def test_what_would_be_another_argument_is_refused(name: str, form: str) -> None:
    _, args, kwargs, others = CASES[name]
    model, gm = traced(name, form)
    call = call_of((_x(), *args), kwargs)
    assert call is not None
    same = call_with(gm, bound_to_placeholders(gm, call))
    expected = model(_x(), *args, **kwargs)
    for answer in (gm(_x(), *args, **kwargs), gm(*same.args, **same.kwargs)):
        assert float((answer - expected).detach().abs().max()) < EXACT
    for more, options in others:
        with pytest.raises(REFUSED):
            gm(_x(), *more, **options)
        with pytest.raises(REFUSED):
            gm.eval()(*bound_to_placeholders(gm, call_of((_x(), *more), options)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("none of many", (2.0,), {}),
        ("none of many", (), {"more": 2.0}),
        ("by name", (2.0,), {}),
        ("by position", (), {"scale": 2.0}),
        ("behind another default", (2.0,), {}),
    ],
)
def test_a_graph_of_one_call_refuses_it_too(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    kind = CASES[name][0]
    model = kind("one call").double()
    gm = fxwidth.trace(model, _x(2))
    assert [node.op for node in gm.graph.nodes if node.op != "placeholder"] == ["call_module", "output"]
    assert torch.equal(gm(_x()), model(_x()))
    with pytest.raises(REFUSED):
        gm(_x(), *args, **kwargs)


def _saved(gm: fx.GraphModule, folder: Path) -> fx.GraphModule:
    fxwidth.save(gm, folder / "graph.pt")
    return fxwidth.load(folder / "graph.pt", trusted=True)


MADE: dict[str, Callable[[fx.GraphModule, Path], Any]] = {
    "pickled": lambda gm, _: pickle.loads(pickle.dumps(gm)),
    "copied": lambda gm, _: copy.deepcopy(gm),
    "saved": _saved,
    "transformed": lambda gm, _: fx.Transformer(gm).transform(),
    "compiled": lambda gm, _: torch.compile(gm, backend="eager"),
    "resized": lambda gm, _: fxwidth.resize(gm, {"up": 11}, exact=True),
    "resized and saved": lambda gm, folder: _saved(fxwidth.resize(gm, {"up": 11}, exact=True), folder),
}


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("way", MADE)
def test_what_is_made_of_a_graph_refuses_it_too(way: str, form: str, tmp_path: Path) -> None:
    model, gm = traced("one of many", form)
    expected = model(_x(), TWO, scale=2.0).detach()
    made = MADE[way](gm, tmp_path)
    assert float((made(_x(), TWO, scale=2.0) - expected).detach().abs().max()) < EXACT
    for args, kwargs in CASES["one of many"][3]:
        with pytest.raises(REFUSED):
            made(_x(), *args, **kwargs)


def test_examples_are_told_how_a_graph_takes_them() -> None:
    _, gm = traced("by name", "symbolic")
    with pytest.raises(FxwidthError, match=r"takes 3 inputs \(x, scale, add\), .* has 2, 2 of them by position, of wh"):
        fxwidth.analyze(gm, (_x(), 2.0))
    _, gm = traced("None behind a default", "symbolic")
    with pytest.raises(FxwidthError, match="argument 'size' is left out, but was given when the graph was traced"):
        gm(_x())


def test_two_arguments_of_one_name_are_no_argument_and_another() -> None:
    model = KeysByPosition("symbolic").double()
    with pytest.raises(FxwidthError, match="duplicate argument 'x'"):
        fxwidth.trace(model, (_x(2),), {"x": 2.0})


def test_a_graph_that_takes_arguments_by_name_is_timed() -> None:
    _, gm = traced("by name", "symbolic")
    graph = fxwidth.analyze(gm)
    assert latency_polynomial(graph)({}) > 0
