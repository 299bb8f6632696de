"""Graphs whose arguments hold their tensors in containers, as programs of `torch.export`: equal, and resized again."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError


class Net(nn.Module):
    """Takes tensors in any container."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, batch: Any, shift: Tensor | None = None, scale: float = 2.0) -> Tensor:
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        hidden = self.a(leaves[0])
        for leaf in leaves[1:]:
            hidden = hidden + self.a(leaf).sum(0)
        return self.b(torch.relu(hidden) * scale)


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


ARGUMENTS: dict[str, Any] = {
    "a dict of one": {"x": tensor(8, 4)},
    "a list of one": [tensor(8, 4)],
    "a tuple of one": (tensor(8, 4),),
    "one in the other": {"x": [(tensor(8, 4),)]},
    "several": {"x": tensor(8, 4), "rest": [tensor(5, 4), (tensor(3, 4),)]},
    "with what is no tensor": {"mode": "fast", "x": tensor(8, 4), "count": 3, "none": None},
    "an ordered dict": OrderedDict(x=tensor(8, 4)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_containers_go_through_programs_again_and_again(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = ARGUMENTS[name]
    gm = fxwidth.resize(fxwidth.trace(Net().double().eval(), (batch,)), {"a": 7})
    fxwidth.save(gm, tmp_path / "a.pt2")
    again = fxwidth.load(tmp_path / "a.pt2")
    assert torch.equal(again(batch), gm(batch))
    for width in (6, 5):
        for module in (gm, again):
            fxwidth.resize(module, {fxwidth.analyze(module).free[0].name: width}, selection="magnitude")
        fxwidth.save(again, tmp_path / "b.pt2")
        again = fxwidth.load(tmp_path / "b.pt2")
        torch.testing.assert_close(again(batch), gm(batch), rtol=1e-12, atol=1e-12)
    assert len(fxwidth.report(again).resizes) == 3
    # Whoever has such a file as the model goes on by files of tensors.
    fxwidth.resize(again, {fxwidth.analyze(again).free[0].name: 4})
    fxwidth.save(again, tmp_path / "c.safetensors")
    last = fxwidth.load(tmp_path / "c.safetensors", fxwidth.load(tmp_path / "b.pt2"))
    assert torch.equal(last(batch), again(batch))


def test_other_containers_are_refused_by_name(tmp_path: Path) -> None:
    batch = {"x": tensor(8, 4)}
    fxwidth.save(fxwidth.trace(Net().double().eval(), (batch,)), tmp_path / "a.pt2")
    again = fxwidth.load(tmp_path / "a.pt2")
    assert torch.equal(again(batch=batch), again(batch))
    with pytest.raises(FxwidthError, match="argument 'batch'"):
        again([tensor(8, 4)])
    with pytest.raises(FxwidthError, match="argument 'shift'"):
        again(batch, tensor(12))
