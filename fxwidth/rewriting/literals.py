"""Patching the literal arguments of one fx node: the second rung of the repair ladder.

Wanted values come from the axes of the tape, never from the present values. An argument that is computed in the
graph and comes out right is left alone, so that what was dynamic stays dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverloadPacket

from fxwidth.axes.factors import axis_size
from fxwidth.recording.tape import Axes
from fxwidth.rewriting.frozen_numbers import frozen
from fxwidth.rewriting.node_arguments import NodeState, argument_of, function_name, merged, parts_of, set_argument
from fxwidth.rules.registry import resized_call

aten = torch.ops.aten


def patch(state: NodeState) -> bool:
    """Give a node's literal arguments their prescribed values; return whether anything was changed."""
    node = state.node
    before = (node.args, node.kwargs, node.target, node.op)
    name = function_name(node)
    if name.startswith("__"):
        name = name.strip("_")  # a method by which Python spells an operator
    if _is_one_op(state):
        _patch_aten(state)
    elif name in _PATCHES:
        _PATCHES[name](state)
    _freeze_scalars(state)
    if state.behind_values and not _computed(before[:2]) <= _computed((node.args, node.kwargs)):
        node.args, node.kwargs, node.target, node.op = before
    return (node.args, node.kwargs, node.target, node.op) != before


def _computed(arguments: Any) -> set[fx.Node]:
    """Return the nodes among a node's arguments."""
    found: set[fx.Node] = set()
    fx.node.map_arg(arguments, found.add)
    return found


def _is_one_op(state: NodeState) -> bool:
    if len(state.calls) != 1 or state.calls[0].func != state.node.target:
        return False
    # A split that becomes one into sections is another op.
    return resized_call(state.calls[0], state.maps)[0] == state.node.target


def _patch_aten(state: NodeState) -> None:
    """Take the arguments of a node that is one ATen op from that op's literal_rule."""
    node, call = state.node, state.calls[0]
    _, arguments = resized_call(call, state.maps)
    for position, parameter in enumerate(call.func._schema.arguments):
        if parameter.name not in arguments or isinstance(arguments[parameter.name], Tensor):
            continue
        wanted = arguments[parameter.name]
        if parameter.name in node.kwargs:
            node.update_kwarg(parameter.name, merged(state, node.kwargs[parameter.name], wanted))
        elif position < len(node.args):
            node.update_arg(position, merged(state, node.args[position], wanted))


def _sizes(first: int) -> Callable[[NodeState], None]:
    """Patch sizes given as one sequence or one by one from an argument position on."""

    def apply(state: NodeState) -> None:
        node = state.node
        if state.axes is None:
            return
        rest = node.args[first:]
        packed = len(rest) == 1 and not isinstance(state.now(rest[0]), int)
        current = state.now(rest[0]) if packed and isinstance(rest[0], fx.Node) else rest[0] if packed else rest
        wanted = state.sizes()
        if not isinstance(current, (list, tuple)) or len(current) != len(wanted):
            return
        if packed and isinstance(rest[0], fx.Node):
            if list(current) != wanted:
                parts = parts_of(state, rest[0])
                node.update_arg(first, [_size(state, own, k, wanted[k], parts) for k, own in enumerate(parts)])
            return
        sizes = [_size(state, own, k, wanted[k], current) for k, own in enumerate(current)]
        node.args = (*node.args[:first], sizes) if packed else (*node.args[:first], *sizes)

    return apply


def _size(state: NodeState, current: Any, position: int, wanted: int, others: Sequence[Any]) -> Any:
    value = state.now(current)
    if value in (wanted, -1):
        return current
    assert state.axes is not None
    axis = state.axes[position]
    if state.maps.size(axis) != state.maps.with_larger_batch().size(axis):
        # A size that holds the batch must not be baked in.
        if all(state.now(other) != -1 for other in others):
            return -1
        return merged(state, current, wanted)
    return wanted


def _unflattened(state: NodeState) -> None:
    """Patch the sizes that one dim is divided into."""
    sizes, dim = argument_of(state.node, 2, "sizes"), state.now(argument_of(state.node, 1, "dim"))
    if state.axes is None or not isinstance(sizes, (list, tuple)) or not isinstance(dim, int):
        return
    first = dim % (len(state.axes) - len(sizes) + 1)
    wanted = [state.maps.size(axis) for axis in state.axes[first : first + len(sizes)]]
    new = [_size(state, own, first + place, wanted[place], sizes) for place, own in enumerate(sizes)]
    set_argument(state.node, 2, "sizes", new)


def _literal(position: int, name: str, argument: str, *ops: OpOverloadPacket) -> Callable[[NodeState], None]:
    """Patch one argument with an argument of the ATen op that the function becomes."""

    def apply(state: NodeState) -> None:
        calls = [call for call in state.calls if call.func.overloadpacket in ops]
        if len(calls) == 1:
            _, arguments = resized_call(calls[0], state.maps)
            wanted = arguments[argument]
            current = argument_of(state.node, position, name)
            now = state.now(current)
            equal = list(now) == list(wanted) if isinstance(now, (list, tuple)) else now == wanted
            if current is not None and not equal:
                set_argument(state.node, position, name, merged(state, current, wanted))

    return apply


def _table(state: NodeState) -> None:
    """Give copies of channels the numbers that they read now: as many as there are channels by now."""
    (call,) = state.calls
    set_argument(state.node, 1, "table", resized_call(call, state.maps)[1]["table"])


def _norm(position: int, name: str, eps_position: int, *ops: OpOverloadPacket) -> Callable[[NodeState], None]:
    shape = _literal(position, name, "normalized_shape", *ops)

    def apply(state: NodeState) -> None:
        shape(state)
        calls = [call for call in state.calls if call.func.overloadpacket in ops]
        if len(calls) == 1 and state.maps.variance_ratio(calls[0].index) != 1.0:
            _, arguments = resized_call(calls[0], state.maps)
            set_argument(state.node, eps_position, "eps", arguments["eps"])

    return apply


def _split(state: NodeState) -> None:
    """Give a split its section sizes when they are no longer what its present arguments make."""
    node = state.node
    if not isinstance(state.old_value, (list, tuple)) or not state.old_value:
        return
    dim = state.now(argument_of(node, 2, "dim")) or 0
    sections: Any = [state.maps.size(state.axes_of(part)[dim]) for part in state.old_value]
    name = function_name(node)
    current = None if name == "chunk" else argument_of(node, 1, "split_size_or_sections", "split_size", "split_sizes")
    if isinstance(state.now(current), int) and _are_even(sections):
        # How many sections there are may depend on the batch.
        sections = merged(state, current, sections[0])
    elif isinstance(state.now(current), (list, tuple)):
        sections = merged(state, current, sections)
    elif state.holds_batch(argument_of(node, 0, "input", "tensor", "self"), dim):
        return
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (argument_of(node, 0, "input", "tensor", "self"), sections, dim), {}


def _are_even(sections: Sequence[int]) -> bool:
    """Tell whether all sections are of one size, but for a smaller rest."""
    return all(size == sections[0] for size in sections[:-1]) and 0 < sections[-1] <= sections[0]


def _getitem(state: NodeState) -> None:
    """Patch the index of what is read from a tensor, or written to a part of it."""
    node = state.node
    source, index = node.args[:2]
    tensor = state.before(source)
    is_read = len(node.args) == 2
    if not isinstance(tensor, Tensor) or (is_read and not isinstance(state.old_value, Tensor)):
        return
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(isinstance(state.before(item), (Tensor, list, bool)) for item in items):
        return
    axes = state.axes_of(tensor)
    named = sum(item is not None and item is not Ellipsis for item in items)
    dim = 0
    result: list[Any] = []
    for item in items:
        if item is None:
            result.append(item)
            continue
        if item is Ellipsis:
            dim += len(axes) - named
            result.append(item)
            continue
        result.append(_index(state, item, axes, dim))
        dim += 1
    node.update_arg(1, tuple(result) if isinstance(index, tuple) else result[0])


def _index(state: NodeState, item: Any, axes: Axes, dim: int) -> Any:
    axis = axes[dim]
    if isinstance(item, slice):
        if item.step not in (None, 1):
            return item
        start = _bound(state, item.start, axes, dim)
        return slice(start, _bound(state, item.stop, axes, dim), item.step)
    if isinstance(item, (int, fx.Node)):
        size, wanted = state.maps.size(axis), state.maps.prefix(axis, state.before(item) % axis_size(axis))
        return item if state.now(item) % size == wanted else _position(state, item, wanted, size)
    return item


def _bound(state: NodeState, bound: Any, axes: Axes, dim: int) -> Any:
    if bound is None:
        return None
    old_size, new_size = axis_size(axes[dim]), state.maps.size(axes[dim])
    old, now = state.before(bound), state.now(bound)
    position = min(max(old + old_size if old < 0 else old, 0), old_size)
    present = min(max(now + new_size if now < 0 else now, 0), new_size)
    wanted = state.maps.prefix(axes[dim], position)
    return bound if present == wanted else _position(state, bound, wanted, new_size)


def _position(state: NodeState, current: Any, wanted: int, size: int) -> Any:
    """Return what stands for a position in a dim of a size, counted from the end where it was."""
    counted = wanted - size if state.now(current) < 0 and wanted < size else wanted
    return merged(state, current, counted) if isinstance(current, fx.Node) else counted


def _attention(state: NodeState) -> None:
    """Keep the scale that attention was trained with: its default is computed from head_dim."""
    node = state.node
    query = state.before(argument_of(node, 0, "query"))
    if (
        argument_of(node, 6, "scale") is None
        and isinstance(query, Tensor)
        and state.maps.changes(state.axes_of(query)[-1])
    ):
        node.update_kwarg("scale", 1 / math.sqrt(query.shape[-1]))


def _freeze_scalars(state: NodeState) -> None:
    """Keep the trained value of numbers that the graph computes from a size and computes tensors with."""
    node = state.node
    if function_name(node).strip("_") not in _ARITHMETIC or not isinstance(state.old_value, Tensor):
        return
    for position, argument in enumerate(node.args):
        if not isinstance(argument, fx.Node) or not isinstance(state.before(argument), (int, float)):
            continue
        if state.before(argument) != state.now(argument):
            node.update_arg(position, frozen(argument, node, state, state.maps.space, state.axes_of))


_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "truediv", "pow", "floordiv"}) | frozenset(
    {"iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv"}
)

_PATCHES: dict[str, Callable[[NodeState], None]] = {
    "view": _sizes(1),
    "reshape": _sizes(1),
    "expand": _sizes(1),
    "unflatten": _unflattened,
    "split": _split,
    "chunk": _split,
    "split_with_sizes": _split,
    "getitem": _getitem,
    "setitem": _getitem,
    "scaled_dot_product_attention": _attention,
    "layer_norm": _norm(1, "normalized_shape", 4, aten.native_layer_norm),
    "rms_norm": _norm(1, "normalized_shape", 3, torch.ops.fxwidth.rms_norm),
    "group_norm": _literal(1, "num_groups", "group", aten.native_group_norm),
    "pad": _literal(1, "pad", "pad", aten.constant_pad_nd),
    "repeat": _literal(1, "repeats", "repeats", aten.repeat),
    "copied_channels": _table,
    "tile": _literal(1, "dims", "repeats", aten.repeat),
    **{f"conv{n}d": _literal(6, "groups", "groups", aten.convolution) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _literal(6, "groups", "groups", aten.convolution) for n in (1, 2, 3)},
}
