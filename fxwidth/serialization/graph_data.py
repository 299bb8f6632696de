"""A graph as plain data: its nodes one by one, as pickle can write them and any version of torch can read them.

torch.fx pickles the code that a graph has generated and traces it anew when it reads it. What that code does not
compute from the inputs is run once then: masks become constants, and random numbers are drawn for good.
"""

from __future__ import annotations

import pkgutil
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx.graph import CodeGen
from torch.fx.passes.shape_prop import TensorMetadata

from fxwidth.errors import FxwidthError

# What there is of node metadata besides these belongs to the trace: places in the model's code, and fake tensors.
_SHAPES, _VALUE, WRAPPED = "tensor_meta", "val", "is_wrapped"
_PLAIN = (bool, int, float, str)
# Where the types of annotations may come from: others need the code of the model.
_COMMON = frozenset({"builtins", "typing", "types", "collections", "torch"})


@dataclass(frozen=True)
class NodeReference:
    """Stands for the result of a node, by its number."""

    number: int


@dataclass(frozen=True)
class Named:
    """Stands for what pickle cannot find by itself, as operators of `torch.ops`, by its path."""

    path: str

    def resolved(self) -> Any:
        """Return what is there.

        Raises:
            FxwidthError: nothing is.
        """
        try:
            return pkgutil.resolve_name(self.path)
        except (AttributeError, ImportError, ValueError) as error:
            raise FxwidthError(
                f"the graph calls {self.path}, which is not there; import the module that defines it first."
            ) from error


@dataclass(frozen=True)
class NodeData:
    """A node of a graph; others among its arguments are `NodeReference`s."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    name: str
    type: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphData:
    """A graph: its nodes in order, and how its code is generated where that is not the usual way."""

    nodes: tuple[NodeData, ...]
    codegen: CodeGen | None


def data_of(graph: fx.Graph) -> GraphData:
    """Return a graph as plain data."""
    numbers = {node: NodeReference(number) for number, node in enumerate(graph.nodes)}

    def stated(leaf: Any) -> Any:
        return numbers[leaf] if isinstance(leaf, fx.Node) else named_target(leaf)

    nodes = tuple(
        NodeData(
            node.op,
            named_target(node.target),
            fx.node.map_aggregate(node.args, stated),
            fx.node.map_aggregate(node.kwargs, stated),
            node.name,
            node.type if _is_common(node.type) else None,
            dict(_lasting(node.meta)),
        )
        for node in graph.nodes
    )
    codegen = graph._codegen
    is_usual = type(codegen) is CodeGen and codegen._body_transformer is None
    return GraphData(nodes, None if is_usual else codegen)


def graph_of(data: GraphData, tracer: type[fx.Tracer] | None = None) -> fx.Graph:
    """Return the graph that some data tell of.

    Args:
        data: as `data_of` returned them.
        tracer: the kind of tracer that the graph is noted to be by.
    """
    graph = fx.Graph(tracer_cls=tracer)
    made: list[fx.Node] = []

    def found(leaf: Any) -> Any:
        if isinstance(leaf, NodeReference):
            return made[leaf.number]
        return leaf.resolved() if isinstance(leaf, Named) else leaf

    for entry in data.nodes:
        args, kwargs = (fx.node.map_aggregate(part, found) for part in (entry.args, entry.kwargs))
        node = graph.create_node(entry.op, found(entry.target), args, kwargs, entry.name, entry.type)
        # A name that it would not get by itself, as that of a builtin.
        node.name = entry.name
        node.meta = {key: _with_layout(value, found) for key, value in entry.meta.items()}
        made.append(node)
    if data.codegen is not None:
        graph.set_codegen(data.codegen)
    return graph


def named_target(value: Any) -> Any:
    """Return what pickle is to write for a target or a leaf of arguments."""
    path = None
    if isinstance(value, OpOverload):
        namespace, name = value._schema.name.split("::")
        path = f"torch.ops.{namespace}.{name}.{value._overloadname}"
    elif isinstance(value, OpOverloadPacket):
        namespace, name = value._qualified_op_name.split("::")
        path = f"torch.ops.{namespace}.{name}"
    elif isinstance(value, HigherOrderOperator):
        path = f"torch.ops.higher_order.{value._name}"
    elif isinstance(value, torch.memory_format):
        path = str(value)
    elif isinstance(value, types.FunctionType) and "<locals>" in value.__qualname__:
        # Some functions of torch are made inside of another one, and go by the name that they are given afterwards.
        path = f"{value.__module__}.{value.__name__}"
    return Named(path) if path is not None and _leads_to(path, value) else value


def _leads_to(path: str, value: Any) -> bool:
    try:
        return pkgutil.resolve_name(path) is value
    except (AttributeError, ImportError, ValueError):
        return False


def _lasting(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is to be kept of a node's metadata: its shape, or the number that it is; how its code is written."""
    kept: dict[str, Any] = {}
    shapes, value = meta.get(_SHAPES), meta.get(_VALUE)
    if isinstance(shapes, TensorMetadata) and all(type(size) is int for size in (*shapes.shape, *shapes.stride)):
        kept[_SHAPES] = _with_layout(shapes, named_target)
    if type(value) in _PLAIN:
        kept[_VALUE] = value
    if meta.get(WRAPPED):
        kept[WRAPPED] = True
    return kept


def _with_layout(value: Any, change: Any) -> Any:
    if not isinstance(value, TensorMetadata):
        return value
    return value._replace(memory_format=change(value.memory_format))


def _is_common(annotation: Any) -> bool:
    """Tell whether a type can be read without the code of a model."""
    kind = typing.get_origin(annotation) or annotation
    module = getattr(kind, "__module__", None) or type(kind).__module__
    return module.partition(".")[0] in _COMMON and all(map(_is_common, typing.get_args(annotation)))
