"""What each layer costs adds up to what the network does, whichever front end has traced it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_operations_and_memory_are_those_of_the_batch_that_was_given(batch: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    x = torch.randn(batch, 3, 8, 8)
    graph = fxwidth.analyze(fxwidth.trace(net, x))
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert fxwidth.cost_polynomial(graph, "flops")({}) == fxwidth.cost(graph).flops == counter.get_total_flops()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = net(x)
    for parameter in net.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert fxwidth.cost_polynomial(graph, "activation_memory")({}) == sum(kept.values())
    del result
    group = graph["0"]
    half = fxwidth.plan(graph, budget=fxwidth.Budget(flops=counter.get_total_flops() // 2))
    assert fxwidth.cost_polynomial(graph, "flops")({group.factor: half["0"]}) <= counter.get_total_flops() / 2
