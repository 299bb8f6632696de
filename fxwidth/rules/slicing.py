"""Rules for parts of a dim: one position, a range, or all of it in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxwidth.axes.factors import Axis, axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import BY_SIZE, STRIDED, TAKEN_APART
from fxwidth.recording.tape import OpCall
from fxwidth.rules.op_families import Move, Movement
from fxwidth.rules.registry import ResizedCall, RuleContext, RuleDeclinedError, literal_rule, revised, rule

aten = torch.ops.aten


@rule(aten.select, family=Movement(Move.PART))
def _select(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, shape = c.axes("self"), c.shape("self")
    dim = c.dim(c["dim"], len(shape))
    axis = signal.pop(dim)
    _pin_if_computed(c, axis, [c["index"]])
    if not c.space.is_constant(axis):
        _, rest = c.split(axis, c["index"] % shape[dim])
        c.split(rest, 1)
    return [signal]


@literal_rule(aten.select)
def _select_index(call: OpCall, maps: IndexMaps) -> ResizedCall:
    signal = call.axes[call.arguments["self"]]
    axis = signal[call.arguments["dim"] % len(signal)]
    return revised(call, index=maps.prefix(axis, call.arguments["index"] % axis_size(axis)))


def _pin_if_computed(c: RuleContext, axis: Axis, places: Sequence[Any]) -> None:
    """Pin a dim that is cut at places which the graph computes: for inputs of other sizes these are others."""
    if not c.call.computed.isdisjoint(places) and not any(factor.is_batch for factor in c.space.factors(axis)):
        c.pin([axis], BY_SIZE)


def _slice_bounds(arguments: dict[str, Any], size: int) -> tuple[int, int]:
    start = arguments["start"] or 0
    end = size if arguments["end"] is None else arguments["end"]
    start = max(0, start + size) if start < 0 else min(start, size)
    end = max(0, end + size) if end < 0 else min(end, size)
    return start, end


@rule(aten.slice, aten.slice_copy, family=Movement(Move.PART))
def _slice(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, shape = c.axes("self"), c.shape("self")
    dim = c.dim(c["dim"], len(shape))
    size, step = shape[dim], c["step"]
    start, end = _slice_bounds(c.call.arguments, size)
    _pin_if_computed(c, signal[dim], [c["start"], c["end"]])
    if step == 1:
        if end - start != size:
            signal[dim] = c.cut(signal[dim], start, end)
    elif c.space.is_constant(signal[dim]):
        signal[dim] = c.fixed_like(c.outputs[0].shape[dim], signal[dim])
    elif size % step == 0 and start < step and end == size:
        signal[dim], _ = _strided_parts(c, signal[dim], size // step, step)
    else:
        c.pin([signal[dim]], STRIDED)
        signal[dim] = c.fixed(c.outputs[0].shape[dim], STRIDED)
    return [signal]


def _strided_parts(c: RuleContext, axis: Axis, count: int, step: int) -> tuple[Axis, Axis]:
    major = c.fresh(count)
    c.unify(axis, ((major, step),))
    return c.space.normalise(major), c.fixed(step)


@literal_rule(aten.slice, aten.slice_copy)
def _slice_literals(call: OpCall, maps: IndexMaps) -> ResizedCall:
    signal = call.axes[call.arguments["self"]]
    axis = signal[call.arguments["dim"] % len(signal)]
    if not maps.changes(axis):
        return revised(call)  # the last so many positions are others at another length
    start, end = _slice_bounds(call.arguments, axis_size(axis))
    if call.arguments["step"] != 1:
        return revised(call, end=maps.size(axis) if end == axis_size(axis) else end)
    return revised(call, start=maps.prefix(axis, start), end=maps.prefix(axis, end))


_SPLITS = (
    aten.split,
    aten.unsafe_split,
    aten.split_with_sizes,
    aten.unsafe_split_with_sizes,
    aten.split_with_sizes_copy,
)


@rule(*_SPLITS, family=Movement(Move.SPLIT))
def _split(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    dim = c.dim(c["dim"], len(signal))
    rest, parts = signal[dim], []
    sizes = c.call.arguments.get("split_size", c.call.arguments.get("split_sizes"))
    _pin_if_computed(c, rest, sizes if isinstance(sizes, (list, tuple)) else [sizes])
    for output in c.outputs:
        part, rest = c.split(rest, output.shape[dim])
        parts.append(part)
    return [[*signal[:dim], c.space.normalise(part), *signal[dim + 1 :]] for part in parts]


@literal_rule(*_SPLITS)
def _split_sizes(call: OpCall, maps: IndexMaps) -> ResizedCall:
    dim = call.arguments["dim"]
    sizes = [maps.size(axes[dim]) for axes in call.output_axes]
    arguments = {"self": call.arguments["self"], "split_sizes": sizes, "dim": dim}
    # What is written to in place afterwards must not be one of several views, for autograd's sake.
    safe = call.func.overloadpacket not in (aten.unsafe_split, aten.unsafe_split_with_sizes)
    return (torch.ops.aten.split_with_sizes if safe else torch.ops.aten.unsafe_split_with_sizes).default, arguments


@rule(aten.unbind, family=Movement(Move.PART))
def _unbind(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    c.pin([signal.pop(c.dim(c["dim"], len(signal)))], TAKEN_APART)
    return [signal] * len(c.outputs)


@rule(aten.slice_scatter)
def _slice_scatter(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, source, shape = c.axes("self"), c.axes("src"), c.shape("self")
    dim = c.dim(c["dim"], len(shape))
    start, end = _slice_bounds(c.call.arguments, shape[dim])
    if c["step"] != 1:
        raise RuleDeclinedError("a strided scatter")
    _pin_if_computed(c, c.axes("self")[dim], [c["start"], c["end"]])
    for k, axis in enumerate(signal):
        c.unify(c.cut(axis, start, end) if k == dim else axis, source[k])
    return [[c.space.normalise(axis) for axis in signal]]


literal_rule(aten.slice_scatter)(_slice_literals)
