"""Nodes that switch autocast on and off, as `with` statements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxwidth.compilation.autocast_regions import with_autocast_regions


class Nested(nn.Module):
    """Layers of which some are in half precision, and one within them is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return two outputs, [n, 4] and [n, 8]."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.a(x)
            with torch.autocast("cpu", enabled=False):
                inner = self.b(h.float()) * self.scale
            out = self.c(inner)
            with torch.autocast("cpu", enabled=False):
                torch.sin(h)
        with torch.autocast("cpu", dtype=torch.float16):
            other = self.b(inner)
        return out, other + self.b(h.float())


def _captured(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    found: list[tuple[fx.GraphModule, list[Tensor]]] = []

    def keep(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        found.append((module, inputs))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(x)
    assert len(found) == 1
    return found[0]


def _switches(module: fx.GraphModule) -> list[str]:
    return [
        str(node.target)
        for part in module.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
        if "autocast" in getattr(node.target, "__name__", "")
    ]


def test_values_are_those_of_the_nodes_and_the_graph_is_compiled_whole() -> None:
    torch.manual_seed(0)
    model, x = Nested().eval(), torch.randn(3, 6)
    graph, inputs = _captured(model, x)
    code, count = graph.code, len(_switches(graph))
    assert count >= 6
    parted = with_autocast_regions(graph)
    assert not _switches(parted)
    assert graph.code == code
    with torch.no_grad():
        wanted = graph(*inputs)
        torch._dynamo.reset()
        compiled = torch.compile(parted, backend="eager", fullgraph=True)
        for result in (parted(*inputs), compiled(*inputs)):
            for own, other in zip(result, wanted, strict=True):
                assert own.dtype == other.dtype
                assert torch.equal(own, other)
    assert wanted[0].dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert {id(one) for one in parted.parameters()} == {id(one) for one in graph.parameters()}


def test_a_graph_without_them_is_itself() -> None:
    graph = fx.symbolic_trace(nn.Linear(2, 2))
    assert with_autocast_regions(graph) is graph


def test_autocast_is_left_where_a_region_fails() -> None:
    graph, inputs = _captured(Nested().eval(), torch.randn(3, 6))
    parted = with_autocast_regions(graph)

    def fail(*_: object) -> None:
        raise ValueError(torch.is_autocast_enabled("cpu"))

    parted.get_submodule("autocast_0.body").register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(ValueError, match="True"):
        parted(*inputs)
    assert not torch.is_autocast_enabled("cpu")
