"""Whether a graph is still what an analysis saw: of other sizes, or rewired, it would be answered for wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.runtime.tensor_slots import Slots, tensor_slots

_Facts = tuple[tuple[int, ...], torch.dtype, torch.device]


@dataclass(frozen=True, eq=False)
class GraphState:
    """A graph as it was at some time, but for the values of its tensors, which training may change.

    Attributes:
        graph: the graph.
        nodes: its nodes, what they did, and the modules that they called.
        tensors: its parameters and buffers by name, with their shapes, dtypes and devices.
    """

    graph: fx.Graph
    nodes: tuple[tuple[Any, ...], ...]
    tensors: dict[str, tuple[Tensor, _Facts]]

    @classmethod
    def of(cls, module: fx.GraphModule, slots: Slots) -> GraphState:
        """Return the present state of a module, whose tensors are known."""
        tensors = {name: (tensor, _facts(tensor)) for name, (tensor, _) in slots.items()}
        return cls(module.graph, tuple(_described(module, node) for node in module.graph.nodes), tensors)

    def called_modules(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        """Yield the nodes that call modules, and what they call."""
        return ((node, called) for node, *_, called in self.nodes if called is not None)

    def change(self, module: fx.GraphModule) -> str | None:
        """Return what has changed of a module since, or None."""
        slots = tensor_slots(module)
        for name, (tensor, facts) in self.tensors.items():
            now = slots[name][0] if name in slots else None
            if now is None:
                return f"{name} is gone"
            if (found := _facts(now)) != facts:
                return f"{name} was {_told(facts)} and is {_told(found)}"
            if now is not tensor:
                return f"{name} is another tensor"
        return self._change_of_graph(module)

    def _change_of_graph(self, module: fx.GraphModule) -> str | None:
        nodes = list(module.graph.nodes)
        if module.graph is not self.graph or len(nodes) != len(self.nodes):
            return f"its graph is another, of {len(nodes)} nodes in the place of {len(self.nodes)}"
        for node, before in zip(nodes, self.nodes, strict=True):
            # By identity: the arguments of a node are replaced, not written to.
            if any(own is not other for own, other in zip(_described(module, node), before, strict=True)):
                return f"node {node.name!r} is another, or what it calls"
        return None


def _facts(tensor: Tensor) -> _Facts:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _told(facts: _Facts) -> str:
    shape, dtype, device = facts
    return f"{list(shape)} ({str(dtype).removeprefix('torch.')}, {device})"


def _described(module: fx.GraphModule, node: fx.Node) -> tuple[Any, ...]:
    called: nn.Module | None = None
    if node.op == "call_module":
        called = module
        for part in str(node.target).split("."):
            called = None if called is None else called._modules.get(part)
    return node, node.op, node.target, node.args, node.kwargs, called
