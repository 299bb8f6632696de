"""Tensors in one memory that are not one object: a resize of one is refused, of others it is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.resizing.shared_memory import _extent, _meeting, _sharing


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


class Square(nn.Module):
    """Three layers in a row, two of which have weights of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


def two_weights(one: Tensor, other: Tensor) -> Square:
    model = Square().to(one.dtype)
    model.b.weight.data, model.c.weight.data = one, other
    return model


def a_buffer(view: Callable[[Tensor], Tensor]) -> Square:
    model = Square()
    model.b.register_buffer("view", view(model.b.weight.detach()))
    return model


def of_numpy(first: slice, second: slice) -> Square:
    array = np.random.default_rng(0).normal(size=(20, 8))
    one, other = torch.from_numpy(array[first]), torch.from_numpy(array[second])
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata
    return two_weights(one, other)


MATRIX = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
SHARING = {
    "columns": lambda: two_weights(MATRIX[:8, :8], MATRIX[:8, 4:12]),
    "the last column": lambda: two_weights(MATRIX[:8, :8], MATRIX[:8, 7:15]),
    "every second row and column": lambda: two_weights(MATRIX[:15:2, :8], MATRIX[2:17:2, 1:16:2]),
    "transposed": lambda: two_weights(MATRIX[:8, :8], MATRIX[2:10, 2:10].t()),
    "a column": lambda: a_buffer(lambda weight: weight[:, 3]),
    "the last entry": lambda: a_buffer(lambda weight: weight[7:, 7]),
    "one entry many times": lambda: a_buffer(lambda weight: weight[:1, 2].expand(5)),
    "windows": lambda: a_buffer(lambda weight: weight.view(-1).unfold(0, 5, 3)),
    "bytes": lambda: a_buffer(lambda weight: weight.view(torch.uint8)[:, 30]),
    "an array": lambda: of_numpy(slice(8), slice(8)),
    "rows of an array": lambda: of_numpy(slice(8), slice(4, 12)),
    "rows of an array, backwards": lambda: of_numpy(slice(7, 15), slice(8)),
}
APART = {
    "columns": lambda: two_weights(MATRIX[:8, :8], MATRIX[:8, 8:16]),
    "every second column": lambda: two_weights(MATRIX[:8, :16:2], MATRIX[:8, 1:16:2]),
    "every second row": lambda: two_weights(MATRIX[:16:2, :8], MATRIX[1:17:2, 4:12]),
    "corners": lambda: two_weights(MATRIX[:8, :8], MATRIX[4:12, 8:16].t()),
    "rows of an array": lambda: of_numpy(slice(8), slice(8, 16)),
    "every second row of an array": lambda: of_numpy(slice(0, 15, 2), slice(1, 16, 2)),
}


@pytest.mark.parametrize("plan", [{"b": 5}, {"b": 11}], ids=str)
@pytest.mark.parametrize("name", SHARING)
def test_one_entry_in_common_is_enough(name: str, plan: dict[str, int]) -> None:
    model = SHARING[name]()
    gm = fxwidth.trace(model, torch.randn(2, 6, dtype=model.a.weight.dtype))
    with pytest.raises(FxwidthError, match=r"are two tensors in one memory"):
        fxwidth.resize(gm, plan)


@pytest.mark.parametrize("name", APART)
def test_interleaved_parts_are_resized(name: str) -> None:
    model = APART[name]()
    x = torch.randn(5, 6, dtype=model.a.weight.dtype)
    gm = fxwidth.trace(model, x[:2])
    expected = gm(x)
    fxwidth.resize(gm, {"a": 9, "b": 11, "c": 12})
    torch.testing.assert_close(gm(x), expected)


def test_what_does_not_change_may_share() -> None:
    model = a_buffer(lambda weight: weight[:, 3])
    model.b.register_buffer("other", model.b.weight.detach()[:, 2:4])
    gm = fxwidth.trace(model, torch.randn(2, 6))
    fxwidth.resize(gm, {"c": 5})
    assert gm.get_parameter("c.weight").shape == (5, 8)


ARRAY = torch.zeros(320, dtype=torch.uint8)
DTYPES = (torch.uint8, torch.float16, torch.float32, torch.complex64)


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    memory = ARRAY.view(dtype)
    dims = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), max_size=3))
    reach = sum((size - 1) * stride for size, stride in dims)
    start = draw(st.integers(0, max(len(memory) - reach - 1, 0)))
    assume(start + reach < len(memory))
    return memory.as_strided([size for size, _ in dims], [stride for _, stride in dims], start)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(views(), min_size=2, max_size=4), st.integers(1, 4))
def test_what_is_shared_is_what_numpy_finds(tensors: list[Tensor], count: int) -> None:
    names = [f"t{number}" for number in range(len(tensors))]
    changed = set(names[:count])
    found = [_sharing(group, changed) for group in _meeting(map(_extent, names, tensors))]
    pairs = {
        (one, other)
        for one, first in zip(names, tensors, strict=True)
        for other, second in zip(names, tensors, strict=True)
        if one != other and one in changed and np.shares_memory(first.numpy(), second.numpy())
    }
    assert bool(pairs) == any(found)
    assert all(pair in pairs for pair in found if pair)
