"""Layers that are called twice and tied weights, in programs of `torch.export`: one tensor again, which is resized."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxwidth


class Shared(nn.Module):
    """Has a layer under two names, and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
        self.a, self.layers, self.c = nn.Linear(4, 10), nn.ModuleList([inner, inner]), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.c(x)


class Tied(nn.Module):
    """Reads words and tells of words by the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(7, 10), nn.Linear(10, 10), nn.Linear(10, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.words(x))) + self.words(x))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a layer": (Shared, torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)),
    "a weight": (Tied, torch.arange(12).view(4, 3) % 7),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_one_tensor_is_one_after_loading(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x = CASES[name]
    gm = fxwidth.trace(make().double().eval(), x)
    group = fxwidth.analyze(gm).free[0].name
    fxwidth.resize(gm, {group: 8})
    fxwidth.save(gm, tmp_path / "a.pt2")
    again = fxwidth.load(tmp_path / "a.pt2")
    for one, other in ((gm.named_parameters, again.named_parameters), (gm.named_buffers, again.named_buffers)):
        assert {name: tensor.shape for name, tensor in one()} == {name: tensor.shape for name, tensor in other()}
    assert torch.equal(again(x), gm(x))
    for module in (gm, again):
        fxwidth.resize(module, {fxwidth.analyze(module).free[0].name: 6}, selection="magnitude")
    torch.testing.assert_close(again(x), gm(x), rtol=1e-12, atol=1e-12)
    fxwidth.save(again, tmp_path / "b.pt2")
    assert torch.equal(fxwidth.load(tmp_path / "b.pt2")(x), again(x))


@pytest.mark.parametrize("name", CASES)
def test_a_program_from_a_file_is_traced_with_its_ties(name: str) -> None:
    make, x = CASES[name]
    program, file = torch.export.export(make().double().eval(), (x,)), io.BytesIO()
    torch.export.save(program, file)
    read = torch.export.load(io.BytesIO(file.getvalue()))
    counts = [sum(one.numel() for one in fxwidth.trace(each).parameters()) for each in (program, read)]
    assert counts[0] == counts[1]


def test_what_is_trained_by_itself_stays_by_itself(tmp_path: Path) -> None:
    """Equal values in other memory are no tie, and neither is nothing at all."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        net[2].weight.copy_(net[0].weight)
    fxwidth.save(fxwidth.trace(net, torch.randn(2, 4)), tmp_path / "a.pt2")
    assert len(list(fxwidth.load(tmp_path / "a.pt2").parameters())) == 2
