"""Data, limits and networks that cannot be used: clear words or right results, by every way in, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxwidth
from fxwidth import FxwidthError
from fxwidth.passes import PlanWidths, ResizeWidths
from fxwidth.selection.registry import METHODS
from tests.zoo.nets import images

X = images(8).float()


def network() -> fx.GraphModule:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1)]
    return fxwidth.trace(nn.Sequential(*layers).eval(), X)


def planned(gm: fx.GraphModule, **options: Any) -> None:
    fxwidth.plan(fxwidth.analyze(gm), **options)


def evolved(gm: fx.GraphModule, **options: Any) -> None:
    fxwidth.evolve(gm, **options)


def evolved_in_training(gm: fx.GraphModule, **options: Any) -> None:
    fxwidth.Evolver(gm, every=1, **options).step(X)


def passed(gm: fx.GraphModule, **options: Any) -> None:
    PlanWidths(**options)(gm)


def resized(gm: fx.GraphModule, data: Any) -> None:
    fxwidth.resize(gm, {"0": 5}, data=data)


def resized_in_a_pass(gm: fx.GraphModule, data: Any) -> None:
    ResizeWidths({"0": 5}, data=data)(gm)


Way = Callable[..., None]
PLANNING: list[Way] = [planned, evolved, evolved_in_training, passed]
RESIZING: list[Way] = [resized, resized_in_a_pass]


def with_nan() -> Tensor:
    x = X.clone()
    x[3, 0, 0, 0] = torch.nan
    return x


def refused(way: Way, message: str, **options: Any) -> None:
    """Check that a way in refuses its options and leaves everything as it was."""
    gm = network()
    before, code, values = set(gm.meta), gm.code, {k: v.clone() for k, v in gm.state_dict().items()}
    with pytest.raises(FxwidthError, match=message):
        way(gm, **options)
    assert set(gm.meta) == before
    assert gm.code == code
    assert all(torch.equal(value, values[key]) for key, value in gm.state_dict().items())


UNUSABLE = {
    "nothing": (list, "data gave no batches; pass at least one"),
    "an exhausted generator": (lambda: iter(()), "data gave no batches; pass at least one"),
    "no rows": (lambda: [X[:0]], "data gave no batches; pass at least one"),
    "NaN": (lambda: [X, with_nan()], "batch 1 of data holds NaN or infinite values; leave such samples out"),
    "other names": (lambda: [{"pixels": X}], r"holds \['pixels'\] but no tensor 'input'; pass dicts"),
    "another size": (lambda: [X[:, :, :5]], "has shape .* pass batches of that shape"),
    "no tensors": (lambda: [None], "has 0 tensors, the graph takes 1"),
    "a number": (lambda: 3, "data is a int; pass an iterable of batches"),
}


@pytest.mark.parametrize("way", [*PLANNING, *RESIZING])
@pytest.mark.parametrize("name", UNUSABLE)
def test_data_that_cannot_be_used(name: str, way: Way) -> None:
    data, message = UNUSABLE[name]
    refused(way, message, data=data(), **({} if way in RESIZING else {"params": 0.5}))


def of_tensors() -> Iterator[Tensor]:
    yield from X.split(4)


USABLE: dict[str, Callable[[], Any]] = {
    "tuples": lambda: [(part, torch.zeros(4)) for part in X.split(4)],
    "dicts": lambda: [{"input": part, "label": torch.zeros(4)} for part in X.split(4)],
    "a generator": of_tensors,
}


@pytest.mark.parametrize("name", USABLE)
def test_all_forms_of_data_lead_to_the_same_network(name: str) -> None:
    expected, actual = (fxwidth.evolve(network(), params=0.5, data=data) for data in (list(X.split(4)), USABLE[name]()))
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), actual.parameters(), strict=True))
    assert torch.equal(expected(X), actual(X))


def test_a_generator_lasts_for_all_rounds_of_an_evolver() -> None:
    gm = network()
    evolver = fxwidth.Evolver(gm, every=1, params=0.3, rounds=3, data=of_tensors())
    counts = [sum(p.numel() for p in gm.parameters()) for _ in range(3) if evolver.step(X) is not None]
    assert counts == sorted(counts, reverse=True)
    assert len(evolver.history) == 3


LIMITS = [
    ({"params": 0.5, "min_width": 9, "max_width": 4}, "no width lies between min_width=9 and max_width=4"),
    ({"params": 0.5, "align": 16, "max_width": 8}, "no width lies between .* with align=16"),
    ({"params": 0.5, "align": 64}, "params=.* is out of reach: .* parameters remain.*lower min_width or align"),
    ({"params": 0.5, "keep": "*"}, r"out of reach: .*'0' is in \d+ of them \(left out by only= or keep=\)"),
    ({"params": 0.5, "only": []}, r"out of reach: .*'3' is in \d+ of them \(left out by only= or keep=\)"),
    ({"params": 2}, r"with every free group at its smallest width \d+ parameters remain.*'5' is in .*model's output"),
    ({"params": 0.5, "same_width": [["0", "3"]], "min_width": 7}, "have no width in common|out of reach"),
    ({"params": 0.5, "only": 3}, "only= takes names or patterns of groups, or modules, but received 3"),
    ({"params": 0.5, "same_width": 3}, "same_width= takes patterns of groups, but received 3"),
    ({"params": 0.5, "min_widht": 3}, r"min_widht= is no option of fxwidth.plan; did you mean min_width="),
]


@pytest.mark.parametrize("way", PLANNING)
@pytest.mark.parametrize(("options", "message"), LIMITS)
def test_limits_that_contradict_each_other(options: dict[str, Any], message: str, way: Way) -> None:
    target = {"rounds": 1} if way is evolved_in_training else {}
    refused(way, message, **options, **target)


def test_the_graph_may_be_named() -> None:
    assert fxwidth.plan(width_graph=fxwidth.analyze(network()), params=0.5)


def test_where_all_is_left_out_nothing_changes() -> None:
    for options in ({"keep": "*"}, {"only": []}, {"min_width": 100}):
        assert fxwidth.plan(fxwidth.analyze(network()), **options) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "data"), [(F.mse_loss, [X]), (F.cross_entropy, [(X, torch.zeros(3, dtype=torch.long))]), (3, [X])]
)
def test_a_loss_that_fails(loss: Any, data: Any) -> None:
    refused(evolved, r"loss=.* fails: .*what follows the inputs in a batch of data, here \d values", params=0.5,
            data=data, loss=loss)  # fmt: skip


@pytest.mark.parametrize("selection", METHODS)
@pytest.mark.parametrize("data", [None, [X], [X[:1]], [torch.zeros_like(X)]], ids=["none", "many", "one", "zeros"])
@pytest.mark.parametrize("dead", ["0", "3", ""], ids=["first", "second", "all"])
def test_singular_moments(dead: str, data: Any, selection: str) -> None:
    gm = network()
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.startswith(dead):
                parameter.zero_()
    gm = fxwidth.evolve(gm, params=0.5, data=data, selection=selection)
    with torch.no_grad():
        assert bool(gm(X).isfinite().all())


@pytest.mark.parametrize("function", [fxwidth.plan, fxwidth.spectrum])
@pytest.mark.parametrize("module", [nn.Linear(2, 2), network()])
def test_a_module_in_the_place_of_its_groups(function: Callable[..., Any], module: nn.Module) -> None:
    with pytest.raises(FxwidthError, match=f"received {type(module).__name__}; pass what fxwidth.analyze"):
        function(module)


@pytest.mark.parametrize("act", [lambda gm: planned(gm, params=0.5), lambda gm: fxwidth.resize(gm, {"0": 5})])
def test_a_negative_running_variance(act: Callable[[fx.GraphModule], None]) -> None:
    gm = network()
    gm.get_buffer("1.running_var")[2] = -0.5
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    with pytest.raises(FxwidthError, match=r"1\.running_var, .*batch norm divides at node '_1', goes down to -0\.5"):
        act(gm)
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
