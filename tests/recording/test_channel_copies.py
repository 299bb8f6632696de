"""The op itself: values, gradients, dtypes, layouts, and transforms of torch."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from fxwidth.recording.channel_copies import NOTHING, copied_channels

TABLE = [2, 0, NOTHING, 0, 1, 2, 2]


def explicit(x, table, dim):
    rows = [torch.zeros_like(x.select(dim, 0)) if s == NOTHING else x.select(dim, s) for s in table]
    return torch.stack(rows, dim)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.cfloat])
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_values(dtype, dim):
    x = torch.randn(3, 3, 3).mul(4).to(dtype)
    assert torch.equal(copied_channels(x, TABLE, dim), explicit(x, TABLE, dim))
    assert torch.equal(torch.ops.fxwidth.copied_channels(x, TABLE, dim), explicit(x, TABLE, dim))


def test_what_nothing_reads_may_be_anything():
    x = torch.tensor([[float("nan"), 1.0]])
    assert torch.equal(copied_channels(x, [NOTHING, 1], 1), torch.tensor([[0.0, 1.0]]))


def test_gradients_of_copies_add_up():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    copied_channels(x, TABLE, 1).sum().backward()
    assert x.grad[0, :, 0].tolist() == [2.0, 1.0, 3.0]
    assert torch.autograd.gradcheck(lambda t: copied_channels(t, TABLE, 1), x)
    assert torch.autograd.gradgradcheck(lambda t: copied_channels(t, TABLE, 1).square(), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fakes_are_laid_out_as_results_are(layout):
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.fxwidth.copied_channels(mode.from_tensor(x), TABLE, 1)
    real = copied_channels(x, TABLE, 1)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_transforms_go_through():
    x = torch.randn(5, 3, 4)
    assert torch.equal(vmap(lambda one: copied_channels(one, TABLE, 0))(x), copied_channels(x, TABLE, 1))
    graph = torch.fx.symbolic_trace(lambda t: copied_channels(t, TABLE, 1))
    assert copied_channels in [node.target for node in graph.graph.nodes]


def test_numbers_of_no_channel_are_refused():
    for table in ([3], [-2]):
        with pytest.raises((IndexError, RuntimeError), match=r"out of|index"):
            copied_channels(torch.randn(2, 3), table, 1)
