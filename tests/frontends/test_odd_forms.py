"""Models in odd forms are traced as a newcomer would, answer and learn as they do, and are halved exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.frontends.call_signature import call_of
from fxwidth.frontends.placeholder_calls import bound_to_placeholders
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.runtime.pytree_differences import difference
from fxwidth.runtime.pytrees import deep_tensors, flatten
from fxwidth.verification.replay_oracle import largest_difference, reference_outputs
from tests.oracles.judges import ROUNDING, halved_exactly, randomise, removals
from tests.zoo.networks_of_odd_forms import FORMS, StraightThrough, Two, x

by_form = pytest.mark.parametrize("name", FORMS)


def made(name: str) -> nn.Module:
    return randomise(FORMS[name][0]()).double().eval()


def traced(model: nn.Module, name: str, batch: int = 4) -> fx.GraphModule:
    args, kwargs = FORMS[name][1](batch)
    return fxwidth.trace(model, args, kwargs)


def called(function: nn.Module, name: str, batch: int) -> Any:
    args, kwargs = FORMS[name][1](batch)
    return function(*args, **kwargs)


def gradients(model: nn.Module, name: str) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    sum(tensor.square().sum() for tensor in deep_tensors(called(model, name, 4))).backward()
    # What is called as it is has its parameters one level further down; what a graph does not use is not in it.
    return {path.removeprefix("model."): parameter.grad for path, parameter in model.named_parameters()}


@by_form
def test_the_graph_answers_and_learns_as_the_model_does(name: str) -> None:
    model = made(name)
    gm = traced(copy.deepcopy(model), name)
    for mode in (False, True):
        model.train(mode)
        gm.train(mode)
        for batch in (4, 7):
            expected, actual = called(model, name, batch), called(gm, name, batch)
            assert type(actual) is type(expected)
            assert difference(flatten(expected)[1], flatten(actual)[1]) is None
            assert largest_difference(deep_tensors(actual), deep_tensors(expected)) < ROUNDING
    own = gradients(gm, name)
    for path, gradient in gradients(model, name).items():
        found = own.get(path)
        assert (found is None) == (gradient is None), path
        assert gradient is None or largest_difference([found], [gradient]) < ROUNDING
    # What is kept in buffers is kept alike.
    buffers = [dict(part.named_buffers()).values() for part in (gm, model)]
    assert largest_difference(*map(list, buffers)) < ROUNDING


@by_form
def test_halved_models_match_the_replay_oracle(name: str) -> None:
    gm, twin = traced(made(name), name), traced(made(name), name, 7)
    wg, other = fxwidth.analyze(gm), fxwidth.analyze(twin)
    assert wg.free, str(wg)
    kept = removals(wg.free, 0.5)
    by_group = {group.name: kept[group.factor] for group in wg.free}
    expected = {4: replayed(wg, by_group, name, 4), 7: replayed(other, by_group, name, 7)}
    halved_exactly(gm, by_group)
    for mode in (False, True):
        gm.train(mode)
        for batch, wanted in expected.items():
            assert largest_difference(deep_tensors(called(gm, name, batch)), wanted) < ROUNDING


def replayed(wg: WidthGraph, kept: dict[str, Any], name: str, batch: int) -> list[Tensor]:
    maps = IndexMaps(wg.analysis.space, {wg[group].factor: channels for group, channels in kept.items()})
    values = bound_to_placeholders(wg.analysis.module, call_of(*FORMS[name][1](batch)))
    return reference_outputs(wg.analysis, maps, values)


# -- what is more than an answer -------------------------------------------------------------------------------------


def test_autocast_inside_holds_under_an_autocast_outside() -> None:
    model = made("autocast").float()
    gm = fxwidth.trace(model, x().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x().float())
        assert torch.equal(gm(x().float()), expected)
    fxwidth.resize(gm, {"up": 5})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gm(x().float()).dtype == expected.dtype


def test_what_a_model_keeps_is_kept_at_the_new_width() -> None:
    gm = traced(made("counts in a buffer"), "counts in a buffer")
    (group,) = fxwidth.analyze(gm).free
    fxwidth.resize(gm, {group.name: 4})
    before = gm.get_buffer("total").clone()
    gm(x())
    assert gm.get_buffer("total").shape == (4,)
    assert not torch.equal(gm.get_buffer("total"), before)


def test_inputs_are_written_to_as_the_model_does() -> None:
    gm = traced(made("in place"), "in place")
    given = x()
    gm(given)
    assert torch.equal(given, 2 * x())


class SizeInside(StraightThrough):
    """Has a width written in beside a function with a gradient of its own, so that it must be called as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(x).view(-1, 2, 5).softmax(2).sum()


def test_a_part_with_a_gradient_of_its_own_is_not_taken_apart() -> None:
    wg = fxwidth.analyze(fxwidth.trace(randomise(SizeInside()).double(), x()))
    assert not wg.free
    assert "and it has a gradient of its own, so that it cannot be taken apart" in str(wg["up#0"].pinned)


class Swapped(Two):
    """Puts a computed tensor in the place of a layer's weight."""

    def forward(self, x: Tensor) -> Tensor:
        self.up.bias = nn.Parameter(self.up.bias.detach() * 2)
        return self.down(self.up(x))


class Yields(Two):
    def forward(self, x: Tensor) -> Any:
        yield self.down(self.up(x))


def test_weights_put_into_a_layer_are_not_overlooked() -> None:
    model = randomise(Swapped()).double()
    gm = fxwidth.trace(copy.deepcopy(model), x())
    assert largest_difference([gm(x())], [model(x())]) == 0


def test_a_forward_that_yields_is_called_as_it_is() -> None:
    model = randomise(Yields()).double()
    gm = fxwidth.trace(model, x())
    assert not fxwidth.analyze(gm).free
    assert torch.equal(next(gm(x())), next(model(x())))


def test_layers_without_shapes_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    told = r"0\.weight has no shape before its lazy layer has been called; run the model on a batch, then trace it"
    with pytest.raises(FxwidthError, match=told):
        fxwidth.trace(model, x())
    model(x().float())
    assert [group.name for group in fxwidth.analyze(fxwidth.trace(model, x().float())).free] == ["0"]
