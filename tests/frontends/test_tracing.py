"""Front ends: who traces, what shapes are known, and what a user reads when something does not fit."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import fxwidth
from fxwidth import FxwidthError


class Branching(nn.Module):
    """Control flow on a shape: symbolic_trace cannot follow it, torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) if x.shape[-1] == 4 else self.up(x)


def convnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def test_export_takes_over_and_stays_open_in_the_batch() -> None:
    gm = fxwidth.trace(Branching(), torch.randn(3, 4))
    fxwidth.resize(gm, {"up": 5})
    assert gm(torch.randn(7, 4)).shape == (7, 2)


def test_export_asks_for_inputs() -> None:
    with pytest.raises(FxwidthError, match=r"torch\.export may, but needs example_inputs"):
        fxwidth.trace(Branching())


def test_graphs_of_others_are_taken() -> None:
    exported = torch.export.export(convnet().eval(), (torch.randn(2, 3, 8, 8),)).module()
    propagated = fx.symbolic_trace(convnet())
    ShapeProp(propagated).propagate(torch.randn(2, 3, 8, 8))
    for gm in (exported, propagated):
        assert [group.width for group in fxwidth.analyze(gm).free] == [8]


def test_shapes_are_inferred_from_the_first_layer() -> None:
    assert len(fxwidth.analyze(fx.symbolic_trace(convnet())).free) == 1
    flat = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 2))
    assert fxwidth.trace(flat).meta["fxwidth_inputs"][0].shape == (2, 1, 28, 28)


def test_shapes_are_asked_for_by_name() -> None:
    class TwoInputs(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return query + key

    with pytest.raises(FxwidthError, match="no shape is known for input 'query', 'key' of the graph"):
        fxwidth.trace(TwoInputs())


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3), (3, 8)])
def test_wrong_shapes_name_the_node(shape: tuple[int, ...]) -> None:
    with pytest.raises(FxwidthError, match=r"takes .*: pass example_inputs such as .* The graph fails at node '_0'"):
        fxwidth.trace(convnet(), torch.randn(shape))


def test_the_number_of_inputs_is_checked() -> None:
    with pytest.raises(FxwidthError, match=r"the model takes 1 inputs \(input\), but example_inputs has 2"):
        fxwidth.trace(convnet(), (torch.randn(2, 3, 8, 8), torch.randn(1)))


def test_values_that_are_not_finite_are_refused() -> None:
    model = convnet()
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    with pytest.raises(FxwidthError, match=r"0\.weight holds values that are not finite"):
        fxwidth.trace(model, torch.randn(2, 3, 8, 8))


def test_bounds_may_be_infinite() -> None:
    class Clipped(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 8)
            self.register_buffer("highest", torch.tensor(torch.inf))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.minimum(self.highest))

    model = nn.Sequential(Clipped(), nn.Linear(8, 2))
    assert [group.name for group in fxwidth.analyze(fxwidth.trace(model, torch.randn(2, 4))).free] == ["0"]


def test_other_objects_are_refused() -> None:
    with pytest.raises(FxwidthError, match=r"trace takes an nn\.Module or a GraphModule, but received function"):
        fxwidth.trace(convnet)
    with pytest.raises(FxwidthError, match=r"a torch\.fx\.GraphModule is needed, but received Sequential"):
        fxwidth.analyze(convnet())


def test_the_model_keeps_its_mode_and_parameters() -> None:
    model = convnet().train()
    gm = fxwidth.trace(model, torch.randn(2, 3, 8, 8))
    assert gm.training
    assert model[0].training
    assert gm.get_parameter("0.weight") is model[0].weight
    assert not isinstance(model[0].weight.data, torch._subclasses.FakeTensor)


def test_graphs_of_models_with_postponed_annotations_pickle() -> None:
    class Annotated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # postponed in this file: names as strings
            return x + 1

    for model in (Annotated(), fx.symbolic_trace(Annotated())):
        gm = fxwidth.trace(model, torch.randn(2, 4))
        assert torch.equal(pickle.loads(pickle.dumps(gm))(torch.ones(3, 4)), torch.full((3, 4), 2.0))
