"""Tensors in one memory that are not one object: a resize of one is refused, of others it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError


class Tied(nn.Module):
    """A language model whose head lies in the memory of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.out = nn.Embedding(9, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight.data = self.emb.weight.data

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.out(torch.relu(self.mid(self.emb(ids)))).tanh())


@pytest.mark.parametrize("width", [5, 10])
def test_weights_tied_by_their_data_are_not_parted(width: int) -> None:
    gm = fxwidth.trace(Tied(), torch.randint(0, 9, (3, 4)))
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    with pytest.raises(FxwidthError, match=r"weight and (emb|head)\.weight are two tensors in one memory"):
        fxwidth.resize(gm, {"emb:1": width})
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    assert gm.get_parameter("emb.weight").data_ptr() == gm.get_parameter("head.weight").data_ptr()


def test_other_groups_are_resized() -> None:
    gm = fxwidth.trace(Tied(), torch.randint(0, 9, (3, 4)))
    fxwidth.resize(gm, {"mid": 9})
    assert gm.get_parameter("mid.weight").shape == (9, 8)
    assert gm.get_parameter("emb.weight").data_ptr() == gm.get_parameter("head.weight").data_ptr()


def test_parts_of_one_buffer_that_do_not_overlap_are_resized() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    flat, start = torch.cat([one.detach().flatten() for one in model.parameters()]), 0
    for one in model.parameters():
        one.data = flat[start : start + one.numel()].view_as(one)
        start += one.numel()
    gm = fxwidth.trace(model, torch.randn(2, 6))
    x = torch.randn(5, 6)
    expected = gm(x)
    fxwidth.resize(gm, {"0": 11})
    torch.testing.assert_close(gm(x), expected)
