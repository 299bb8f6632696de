"""An op without a rule makes dims of fixed sizes: behind it, the batch must not become a number of the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.options import ResizeOptions
from fxwidth.resizing.resize import resize_analyzed
from fxwidth.tracing.analyze import analyze_module

_mystery = torch.library.custom_op(
    "fxwidth_tests::mystery", lambda x: 2 * x, mutates_args=(), schema="(Tensor x) -> Tensor"
)
_mystery.register_fake(torch.empty_like)


class _Folded(nn.Module):
    """Has a size of its own written into its code, so that it is taken apart where that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.into(x).view(x.shape[0] * 2, 4)).view(x.shape[0], 8))


def _graph(is_last: bool) -> fx.GraphModule:
    graph = fx.Graph()
    value = graph.placeholder("x")
    for name in ("folded", "mystery") if is_last else ("mystery", "folded"):
        if name == "folded":
            value = graph.call_module("folded", (value,))
        else:
            value = graph.call_function(torch.ops.fxwidth_tests.mystery.default, (value,))
    graph.output(value)
    return fx.GraphModule({"folded": _Folded()}, graph).eval()


def test_a_lost_batch_is_not_written_down():
    module, longer = _graph(is_last=False), torch.randn(5, 6)
    width_graph = WidthGraph(analyze_module(module, (torch.randn(3, 6),)))
    code, expected = module.code, module(longer)
    group = width_graph.free[-1]
    with pytest.raises(
        FxwidthError, match=r"it does take tensors of shapes \[\[4, 6\]\] from 'mystery_default' where \[\[3, 6\]\]"
    ):
        resize_analyzed(width_graph, {group.name: 2}, ResizeOptions(fold=False), blind=True)
    assert module.code == code
    assert torch.equal(module(longer), expected)


def test_a_batch_that_is_lost_later_is_no_reason():
    module = _graph(is_last=True)
    width_graph = WidthGraph(analyze_module(module, (torch.randn(3, 6),)))
    group = width_graph.free[-1]
    resize_analyzed(width_graph, {group.name: 2}, ResizeOptions(fold=False), blind=True)
    assert module(torch.randn(5, 6)).shape == (5, 3)
