"""What each layer costs adds up to what the network does, whichever front end has traced it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxwidth
from fxwidth.errors import FxwidthError
from tests.zoo.networks import CASES


@pytest.mark.parametrize("name", sorted(CASES)[::9])
def test_layers_add_up(name: str) -> None:
    case = CASES[name]
    graph = fxwidth.analyze(fxwidth.trace(case.build(), tuple(case.inputs())))
    costs = fxwidth.cost(graph)
    assert costs.params == sum(layer.params for layer in costs.layers) == fxwidth.cost_polynomial(graph, "params")({})
    assert costs.flops == sum(layer.flops for layer in costs.layers) == fxwidth.cost_polynomial(graph, "flops")({})


def test_names_are_those_of_modules_after_an_export_too() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
            self.head = nn.Linear(16, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.part(x) + torch.tensor([float(size) for size in x.shape[1:]]).sum())

    graph = fxwidth.analyze(fxwidth.trace(Branching(), torch.randn(2, 8)))
    found = {layer.name: (layer.params, layer.flops) for layer in fxwidth.cost(graph).layers}
    assert found == {"part.0": (144, 2 * 2 * 8 * 16), "head": (64, 2 * 2 * 16 * 4)}


def test_repeated_layers_are_one_row() -> None:
    net = nn.Sequential(nn.Linear(8, 16), *(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 4))
    costs = fxwidth.cost(fxwidth.analyze(fxwidth.trace(net, torch.randn(2, 8))))
    assert [row[0] for row in costs.table(folds=True).rows] == ["0", "1..3", "4", "all"]
    assert costs.as_plain()["layers"][0] == {"name": "0", "kind": "Linear", "params": 144, "flops": 512}


def test_a_cost_without_a_unit_and_a_module_are_refused() -> None:
    with pytest.raises(FxwidthError, match=r"lacks the unit; register a cost by @fxwidth.cost\('mine', unit=...\)"):
        fxwidth.cost("mine")  # type: ignore[call-overload]
    with pytest.raises(FxwidthError, match=r"pass what fxwidth\.analyze"):
        fxwidth.cost(nn.Linear(2, 2))  # type: ignore[call-overload]
