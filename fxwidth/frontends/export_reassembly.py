"""An exported graph with the arguments and the answer of its model."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.frontends.call_signature import (
    INPUTS_MODULE,
    OUTPUTS_MODULE,
    Argument,
    Inputs,
    Outputs,
    native,
)
from fxwidth.frontends.generated_signature import set_kinds
from fxwidth.frontends.tracer_proxies import CodeTracer
from fxwidth.runtime.module_state import GraphPart
from fxwidth.runtime.pytrees import Leaf, Structure
from fxwidth.runtime.trace_guards import UntraceableError

aten = torch.ops.aten
_ONE_SIZE = re.compile(r"leaves\[(?P<leaf>\d+)\]\.size\(\)\[(?P<dim>\d+)\] == (?P<size>\d+)")
# What the exporter has checked about dtypes, which another precision or autocast need not fulfil.
_DROPPED = (aten._assert_tensor_metadata.default,)


@dataclass(frozen=True)
class Program:
    """An exported graph, and the conditions on `leaves`, its inputs, under which it is the model.

    Those in `of_ones` are that some sizes are not one, with the dims that have them.
    """

    module: fx.GraphModule
    guards: Sequence[str]
    of_ones: Mapping[str, Sequence[tuple[int, int]]]


class Region(GraphPart):
    """A part of an exported graph that runs under autocast or without gradients, as the model wanted it."""

    def __init__(
        self, body: fx.GraphModule, context: Callable[..., AbstractContextManager[Any]], *settings: Any
    ) -> None:
        super().__init__()
        self.body = body
        self.context = context
        self.settings = settings

    def forward(self, *values: Any) -> Any:
        """Run the part."""
        with self.context(*self.settings):
            return self.body(*values)


class Reassembly:
    """A graph with the arguments and the answer of the model, made from one with tensors alone."""

    def __init__(
        self,
        program: Program,
        arguments: Sequence[Argument],
        structures: Sequence[Structure],
        answer: Structure,
    ) -> None:
        self._exported = program.module
        self._guards = program.guards
        self._arguments = arguments
        self._structures = structures
        self._answer = answer
        self._graph = fx.Graph(tracer_cls=CodeTracer)
        self._modules: dict[str, nn.Module] = {}

    def run(self) -> fx.GraphModule:
        """Return the graph with its module."""
        placeholders = self._exported.graph.find_nodes(op="placeholder")
        known: dict[fx.Node, Any] = dict(zip(placeholders, self._inputs(placeholders), strict=True))
        result = self._copy(self._exported, known)
        plain, value = native(self._answer, result)
        self._graph.output(value if plain else self._call(OUTPUTS_MODULE, Outputs(self._answer), result))
        _put_numbers_where_used(self._graph)
        for name, module in self._modules.items():
            self._exported.add_submodule(name, module)
        return fx.GraphModule(self._exported, self._graph, "Exported")

    def _inputs(self, leaves: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the node of each tensor among the arguments."""
        names = [argument.name for argument in self._arguments]
        nodes = [
            self._graph.create_node("placeholder", argument.name, argument.default, name=argument.name)
            for argument in self._arguments
        ]
        set_kinds(self._graph, ((argument.name, argument.kind) for argument in self._arguments))
        shapes = [_known_shape(leaf.meta["val"]) for leaf in leaves]
        guards = _without_sizes(self._guards, shapes)
        checked = self._call(INPUTS_MODULE, Inputs(names, self._structures, shapes, guards), nodes)
        direct = {part.position: i for i, part in enumerate(self._structures) if isinstance(part, Leaf)}
        return [
            nodes[direct[i]] if i in direct else self._graph.call_function(operator.getitem, (checked, i))
            for i in range(len(leaves))
        ]

    def _call(self, name: str, module: nn.Module, arguments: Sequence[fx.Node]) -> fx.Node:
        self._modules[name] = module
        return self._graph.create_node("call_module", name, tuple(arguments))

    def _copy(self, source: fx.GraphModule, known: dict[fx.Node, Any]) -> Sequence[Any]:
        """Copy the nodes of a graph and return what it returns."""
        for node in source.graph.nodes:
            if node.op == "output":
                result: Sequence[Any] = fx.node.map_arg(node.args[0], known.__getitem__)
                return result
            is_guard = node.op == "call_module" and node.target == "_guards_fn"
            if node.op == "placeholder" or is_guard or node.target in _DROPPED or _is_unused_attribute(source, node):
                continue
            operand = known.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
            if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
                known[node] = self._region(source, node, known)
            elif node.target is operator.getitem and isinstance(operand, (list, tuple)):
                known[node] = operand[node.args[1]]
            else:
                known[node] = self._graph.node_copy(node, known.__getitem__)
        return ()

    def _region(self, source: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """Take a part that runs in a context of its own: copy its nodes where that does the same."""
        name = node.target.__name__ if callable(node.target) else str(node.target)
        graphs = [part for part in node.args if isinstance(part, fx.Node) and _is_graph(source, part)]
        if name not in _CONTEXTS or len(graphs) != 1:
            raise UntraceableError(f"the exported graph has a part of the kind {name}")
        place = node.args.index(graphs[0])
        settings = node.args[:place]
        operands: list[Any] = [fx.node.map_arg(part, known.__getitem__) for part in node.args[place + 1 :]]
        body = source.get_submodule(str(graphs[0].target))
        assert isinstance(body, fx.GraphModule)
        if name == "wrap_with_set_grad_enabled" and not _writes(body):
            own = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
            results = self._copy(body, own)
            return results if settings[0] else [self._graph.call_function(aten.detach.default, (r,)) for r in results]
        _drop_checks(body)
        region = Region(body, _CONTEXTS[name], *settings)
        return self._call(f"fxwidth_region_{len(self._modules)}", region, operands)


_CONTEXTS: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "wrap_with_set_grad_enabled": torch.set_grad_enabled,
    "wrap_with_autocast": torch.autocast,
}


def _put_numbers_where_used(graph: fx.Graph) -> None:
    """Let numbers be computed right before they are first used.

    The exporter computes them as soon as something asks, in one mode of a model here and in the other there.
    """
    last, placed = graph._root, set[fx.Node]()

    def place(node: fx.Node) -> None:
        nonlocal last
        for source in node.all_input_nodes:
            if source not in placed:
                place(source)
        placed.add(node)
        last.append(node)
        last = node

    for node in list(graph.nodes):
        if node not in placed and not _is_of_numbers(node):
            place(node)
    for node in reversed(list(graph.nodes)):
        if node not in placed:
            graph.erase_node(node)


def _is_of_numbers(node: fx.Node) -> bool:
    """Tell whether a node computes a number from numbers."""
    is_number = isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
    return is_number and node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload)


def _is_graph(source: fx.GraphModule, part: Any) -> bool:
    return (
        isinstance(part, fx.Node)
        and part.op == "get_attr"
        and isinstance(getattr(source, str(part.target), None), fx.GraphModule)
    )


def _is_unused_attribute(source: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and (not node.users or _is_graph(source, node))


def _writes(body: fx.GraphModule) -> bool:
    """Tell whether a part writes to what gradients may flow through, or may do so in a part of its own."""
    return any(
        isinstance(node.target, torch._ops.HigherOrderOperator)
        or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and not _counts(node))
        for node in body.graph.nodes
    )


def _counts(node: fx.Node) -> bool:
    """Tell whether a node writes to whole numbers alone, as the counter of a batch norm, which have no gradients."""
    if node.target is not aten.add_.Tensor or not isinstance(node.args[0], fx.Node):
        return False
    value = node.args[0].meta.get("val")
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _drop_checks(body: fx.GraphModule) -> None:
    for node in list(body.graph.nodes):
        if node.target in _DROPPED:
            body.graph.erase_node(node)
    for part in body.children():
        if isinstance(part, fx.GraphModule):
            _drop_checks(part)
    body.recompile()


def _without_sizes(guards: Sequence[str], shapes: Sequence[list[int | None] | None]) -> list[str]:
    """Return conditions without those that a size is some number, which shapes take."""
    rest = []
    for guard in guards:
        found = _ONE_SIZE.fullmatch(guard)
        shape = shapes[int(found["leaf"])] if found else None
        if found is None or shape is None:
            rest.append(guard)
        else:
            shape[int(found["dim"])] = int(found["size"])
    return rest


def _known_shape(value: Any) -> list[int | None] | None:
    if not isinstance(value, Tensor):
        return None
    return [size if isinstance(size, int) else None for size in value.shape]
