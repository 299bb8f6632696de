"""Replacing a node by the ATen ops it must run: the last rung of the repair ladder, and one that always exists."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxwidth.analysis import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.index_maps import IndexMaps
from fxwidth.rules.registry import prescribed
from fxwidth.tape import OpCall, unbind
from fxwidth.whole_ops import PLAIN_FUNCTIONS

# A view prescribed for contiguous tensors may meet others: reshape does the same to both.
_AS_RESHAPE = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}


def as_tuple(*values: Any) -> tuple[Any, ...]:
    """Return the arguments as a tuple: the result of a lowered node with several outputs."""
    return values


class Lowering:
    """Lowers nodes of one graph."""

    def __init__(
        self,
        analysis: Analysis,
        maps: IndexMaps,
        graph: fx.Graph,
        add_constant: Callable[[Tensor], str],
    ) -> None:
        self._analysis = analysis
        self._maps = maps
        self._larger = maps.with_larger_batch()
        self._graph = graph
        self._add_constant = add_constant
        self._parameter_names = {id(entry.fake): name for name, entry in analysis.parameters.items()}

    def lower(self, node: fx.Node, old_name: str, old_values: dict[fx.Node, Any]) -> tuple[fx.Node, list[fx.Node]]:
        """Insert the prescribed ops before a node; return the node of its result and all inserted nodes, in order."""
        last = node.prev
        self._known: dict[int, fx.Node] = {}
        with self._graph.inserting_before(node):
            for source in node.all_input_nodes:
                self._remember(old_values[source], source)
            for call in self._analysis.calls_of(old_name):
                if call.name != "_assert_tensor_metadata":
                    self._emit(call)
            result = self._result(self._analysis.node_values[old_name], old_name)
        inserted, current = [], last.next
        while current is not node:
            inserted.append(current)
            current = current.next
        return result, inserted

    def _remember(self, value: Any, node: fx.Node) -> None:
        if isinstance(value, Tensor):
            self._known.setdefault(id(value), node)
        elif isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                if isinstance(part, (Tensor, tuple, list)) and id(part) not in self._known:
                    self._remember(part, self._graph.call_function(operator.getitem, (node, i)))

    def _emit(self, call: OpCall) -> None:
        func, arguments = prescribed(call, self._maps)
        _, larger = prescribed(call, self._larger)
        arguments = {name: self._argument(value, larger[name]) for name, value in arguments.items()}
        if func in _AS_RESHAPE:
            func = torch.ops.aten.reshape.default
            arguments = {"self": arguments["self"], "shape": arguments["size"]}
        args, kwargs = unbind(func, arguments)
        node = self._graph.call_function(PLAIN_FUNCTIONS.get(func, func), args, kwargs)
        self._remember(call.result, node)
        if isinstance(call.result, Tensor):
            self._known[id(call.result)] = node

    def _argument(self, value: Any, larger: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            return [self._argument(own, other) for own, other in zip(value, larger, strict=True)]
        if isinstance(value, int) and not isinstance(value, bool) and value != larger:
            return self._with_batch(value, larger - value)
        return value

    def _with_batch(self, value: int, slope: int) -> fx.Node:
        """Compute a size that is linear in the batch from the batch of the moment."""
        batch = self._analysis.batch
        assert batch is not None
        node = self._batch_node()
        if slope != 1:
            node = self._graph.call_function(operator.mul, (node, slope))
        offset = value - slope * batch.size
        return self._graph.call_function(operator.add, (node, offset)) if offset else node

    def _batch_node(self) -> fx.Node:
        for placeholder, example in zip(self._graph.find_nodes(op="placeholder"), self._analysis.inputs, strict=True):
            if isinstance(example, Tensor) and example.dim():
                return self._graph.call_function(torch.ops.aten.sym_size.int, (placeholder, 0))
        raise FxwidthError("the graph has no tensor input to take the batch size from.")

    def _tensor(self, value: Tensor) -> fx.Node:
        known = self._known.get(id(value))
        if known is None:
            name = self._parameter_names.get(id(value)) or self._add_constant(value)
            known = self._known[id(value)] = self._graph.get_attr(name)
        return known

    def _result(self, value: Any, name: str) -> fx.Node:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            parts = [self._result(part, name) if pytree.tree_leaves(part) != [None] else None for part in value]
            return self._graph.call_function(as_tuple, tuple(parts))
        raise FxwidthError(
            f"node {name!r} returns a {type(value).__name__}, which cannot be rebuilt from ATen ops; "
            "trace the model so that this module is taken apart, or keep its groups with keep=."
        )
