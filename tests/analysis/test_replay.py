"""The replay oracle on hard cases and on whole models, and that it is not blind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxwidth.analysis.axis_propagation import analyze_axes
from fxwidth.analysis.result import TensorSpec
from fxwidth.axes.index_maps import NEW, IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.recording.tape import tensors_in
from fxwidth.verification.replay_oracle import largest_difference, reference_outputs, replay_difference
from tests.oracles.judges import (
    ROUNDING,
    analysed,
    assert_replays,
    assert_rewrites,
    random_maps,
    traced,
)
from tests.zoo.networks import CASES

by_case = pytest.mark.parametrize("name", CASES)


@by_case
def test_hard_cases(name):
    case = CASES[name]
    inputs = case.inputs()
    model = case.build()
    analysis = analysed(model, inputs)
    assert len(WidthGraph(analysis).free) == case.free
    assert_replays(analysis, inputs)
    # The tape is the model: nothing that depends on values was baked into it.
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        expected = tensors_in(model.double()(*wide))
    assert largest_difference(reference_outputs(analysis, IndexMaps(analysis.space, {}), inputs), expected) < ROUNDING
    # Removing channels is seen in the outputs, so that agreement means something.
    if case.free:
        removed = reference_outputs(analysis, random_maps(analysis, 0.3), inputs)
        assert largest_difference(removed, expected) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_hard_cases_rewritten(name):
    case = CASES[name]
    assert_rewrites(case.build(), case.inputs())


TORCHVISION = {
    "resnet18": 64,
    "shufflenet_v2_x1_0": 64,
    "densenet121": 64,
    "vit_b_16": 224,
    "swin_t": 224,
}
SLOW = ("densenet121", "vit_b_16", "swin_t")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TORCHVISION]
)
def test_torchvision(name):
    torchvision = pytest.importorskip("torchvision")
    inputs = [torch.randn(2, 3, TORCHVISION[name], TORCHVISION[name])]
    analysis = analysed(getattr(torchvision.models, name)(weights=None), inputs)
    assert_replays(analysis, inputs)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.dropout(torch.relu(self.into(x)), 0.5, True) + torch.rand_like(self.into(x)))


def test_random_numbers_are_the_same_in_both_runs():
    inputs = [torch.randn(3, 4)]
    assert_replays(analysed(_Scaled(), inputs), inputs)


def test_inputs_and_model_stay_as_they_were():
    inputs = [torch.randn(3, 4)]
    model = _Scaled()
    analysis = analysed(model, inputs)
    before = [tensor.clone() for tensor in [*inputs, *model.parameters()]]
    replay_difference(analysis, random_maps(analysis, 0.5), inputs)
    assert all(map(torch.equal, before, [*inputs, *model.parameters()]))


def test_growth_is_refused():
    inputs = [torch.randn(3, 4)]
    analysis = analysed(_Scaled(), inputs)
    (group,) = WidthGraph(analysis).free
    maps = IndexMaps(analysis.space, {group.factor: torch.tensor([0, 1, NEW]).numpy()})
    with pytest.raises(FxwidthError, match=r"the plan adds some: replay without the growth\.$"):
        replay_difference(analysis, maps, inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "the graph has 1 inputs, but 0 values were given."),
        ([torch.randn(3, 5)], "an input was recorded with shape (3, 4), but (3, 5) was given."),
        (["x"], "an input was recorded with shape (3, 4), but str was given."),
    ],
)
def test_wrong_inputs(inputs, message):
    analysis = analysed(_Scaled(), [torch.randn(3, 4)])
    with pytest.raises(FxwidthError) as caught:
        replay_difference(analysis, random_maps(analysis, 0.5), inputs)
    assert str(caught.value) == message


def test_weights_without_values():
    with torch.device("meta"):
        model = _Scaled()
    analysis = analyze_axes(traced(model), [TensorSpec((3, 4), torch.float32, torch.device("meta"))])
    with pytest.raises(FxwidthError, match=r"is on the meta device and has no values; load the weights first\.$"):
        replay_difference(analysis, random_maps(analysis, 0.5), [torch.randn(3, 4)])


def test_a_wrong_shape_names_the_op_and_the_node(monkeypatch):
    inputs = [torch.randn(2, 4)]
    analysis = analysed(nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2)), inputs)
    monkeypatch.setattr("fxwidth.analysis.replay.resized_call", lambda call, maps: (call.func, call.arguments))
    with pytest.raises(FxwidthError, match=r"aten\.view\.default at node _1 \(op 2 of the tape\) does not run"):
        replay_difference(analysis, random_maps(analysis, 0.5), inputs)


class _Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x)[:, 2:8])


def test_a_wrong_literal_that_runs_is_seen_by_its_shape(monkeypatch):
    inputs = [torch.randn(2, 4)]
    analysis = analysed(_Cut(), inputs)
    monkeypatch.setattr("fxwidth.analysis.replay.resized_call", lambda call, maps: (call.func, call.arguments))
    with pytest.raises(FxwidthError) as caught:
        replay_difference(analysis, random_maps(analysis, 0.5), inputs)
    assert str(caught.value) == (
        "aten.slice.Tensor at node getitem (op 2 of the tape): the result has shape (2, 4) where (2, 3) is prescribed."
    )


def test_differences_are_relative_and_see_nan():
    one, nan = torch.tensor([1.0, 200.0]), torch.tensor([1.0, float("nan")])
    assert largest_difference([one + 2], [one]) == pytest.approx(0.01)
    assert largest_difference([nan], [one]) == float("inf")
    assert largest_difference([one[:1]], [one]) == float("inf")
    infinite = torch.tensor([1.0, float("inf")])
    assert largest_difference([infinite], [infinite]) == 0.0
