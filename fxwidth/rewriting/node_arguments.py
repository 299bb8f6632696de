"""The arguments of one fx node: what they were, what they are, and how a computed one gets another value.

What is computed from the size of the batch stays computed, whatever else changes in it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.axes.index_maps import IndexMaps
from fxwidth.recording.tape import Axes, OpCall
from fxwidth.rewriting.frozen_numbers import rescaled


@dataclass(frozen=True)
class NodeState:
    """One node, what it did and returned on the tape, and the values its arguments have now.

    Where a node is behind values, an argument that is computed holds what was found, and must stay computed.
    """

    node: fx.Node
    calls: Sequence[OpCall]
    old_value: Any
    axes: Axes | None
    old_values: Mapping[fx.Node, Any]
    new_values: dict[fx.Node, Any]
    maps: IndexMaps
    axes_of: Callable[[Tensor], Axes]
    behind_values: bool = False

    def now(self, argument: Any) -> Any:
        """Return the present value of an argument."""
        return self.new_values[argument] if isinstance(argument, fx.Node) else argument

    def before(self, argument: Any) -> Any:
        """Return the value of an argument on the tape, that of the node in whose place another has come too."""
        return self.old_values.get(argument) if isinstance(argument, fx.Node) else argument

    def holds_batch(self, argument: Any, dim: int) -> bool:
        """Tell whether a dim of a tensor holds the batch."""
        axis = self.axes_of(self.before(argument))[dim]
        return any(factor.is_batch for factor in self.maps.space.factors(axis))

    def sizes(self) -> list[int]:
        """Return the shape the node's result must have."""
        assert self.axes is not None
        return [self.maps.size(axis) for axis in self.axes]


def function_name(node: fx.Node) -> str:
    """Return by what name a node calls its function, method or op."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        # Exported graphs call composite ops of ATen, which have the arguments of the functions of that name.
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def argument_of(node: fx.Node, position: int, *names: str) -> Any:
    """Return an argument by its position or one of its names, None where it is not given."""
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return node.args[position] if position < len(node.args) else None


def set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    """Give an argument another value, by its position where it has one."""
    if position < len(node.args) and name not in node.kwargs:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def merged(state: NodeState, current: Any, wanted: Any) -> Any:
    """Return the wanted value, with those parts of the current one that come out right left as they are."""
    if isinstance(current, fx.Node):
        return _computed_anew(state, current, wanted)
    if isinstance(current, (list, tuple)) and isinstance(wanted, (list, tuple)) and len(current) == len(wanted):
        if any(isinstance(state.now(part), (Tensor, type(None))) for part in current):
            return current
        return [merged(state, own, other) for own, other in zip(current, wanted, strict=True)]
    if isinstance(wanted, (int, float)) and isinstance(current, (int, float)) and current != -1:
        return wanted
    return current


def _computed_anew(state: NodeState, current: fx.Node, wanted: Any) -> Any:
    """Return what stands for a number that is computed, or for several of them; what holds the batch stays computed."""
    now = state.now(current)
    if isinstance(now, (list, tuple)) and isinstance(wanted, (list, tuple)):
        if list(now) == list(wanted) or len(now) != len(wanted):
            return current if list(now) == list(wanted) else wanted
        return [merged(state, part, other) for part, other in zip(parts_of(state, current), wanted, strict=True)]
    if now == wanted or not isinstance(now, int) or not isinstance(wanted, int):
        return current if now == wanted else wanted
    return rescaled(current, wanted, state.node, state, state.maps.space, state.axes_of)


def parts_of(state: NodeState, sequence: fx.Node) -> list[fx.Node]:
    """Return one node for each entry of a sequence that is computed."""
    result = []
    for k, value in enumerate(state.now(sequence)):
        with state.node.graph.inserting_before(state.node):
            result.append(state.node.graph.call_function(operator.getitem, (sequence, k)))
        state.new_values[result[-1]] = value
    return result
