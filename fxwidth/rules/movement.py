"""Rules for ops that move entries: permutations, joins, padding, strides, other orders."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxwidth.axes.factors import Axis, axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import ORDER, SHUFFLED_GROUPS
from fxwidth.recording.tape import OpCall
from fxwidth.rules.op_families import Move, Movement
from fxwidth.rules.registry import ResizedCall, RuleContext, literal_rule, revised, rule

aten = torch.ops.aten


@rule(aten.permute, family=Movement(Move.PERMUTATION))
def _permute(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    return [[signal[dim] for dim in c["dims"]]]


@rule(aten.t, family=Movement(Move.PERMUTATION))
def _transposed(c: RuleContext) -> Sequence[Sequence[Axis]]:
    return [c.axes("self")[::-1]]


@rule(aten.transpose, family=Movement(Move.PERMUTATION))
def _transpose(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, i, j = c.axes("self"), c["dim0"], c["dim1"]
    signal[i], signal[j] = signal[j], signal[i]
    return [signal]


@rule(aten.cat, family=Movement(Move.JOIN))
def _cat(c: RuleContext) -> Sequence[Sequence[Axis]]:
    rank = c.outputs[0].dim()
    # Legacy: empty one-dimensional tensors are skipped by cat.
    parts = [c.axes(tensor) for tensor in c["tensors"] if tensor.dim() == rank and tensor.shape != (0,)]
    dim = c.dim(c["dim"], rank)
    result = []
    for k in range(rank):
        if k == dim:
            result.append(c.space.concatenation(part[k] for part in parts if axis_size(part[k])))
        else:
            for part in parts[1:]:
                c.unify(parts[0][k], part[k])
            result.append(parts[0][k])
    return [result]


@rule(aten.stack, family=Movement(Move.JOIN))
def _stack(c: RuleContext) -> Sequence[Sequence[Axis]]:
    parts = [c.axes(tensor) for tensor in c["tensors"]]
    for part in parts[1:]:
        for first, other in zip(parts[0], part, strict=True):
            c.unify(first, other)
    result = list(parts[0])
    result.insert(c["dim"] % c.outputs[0].dim(), c.fixed(len(parts)))
    return [result]


@rule(aten.constant_pad_nd)
def _pad(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, pad, shape = c.axes("self"), c["pad"], c.outputs[0].shape
    for k in range(len(pad) // 2):
        dim = len(signal) - 1 - k
        before, after = pad[2 * k : 2 * k + 2]
        if before == after == 0:
            continue
        axis = signal[dim]
        if c.space.is_constant(axis):
            signal[dim] = c.fixed_like(shape[dim], axis)
            continue
        axis = c.cut(axis, max(0, -before), axis_size(axis) - max(0, -after))
        left = c.fresh(before, "padding before") if before > 0 else ()
        right = c.fresh(after, "padding after") if after > 0 else ()
        signal[dim] = c.space.concatenation([left, axis, right])
    return [signal]


@literal_rule(aten.constant_pad_nd)
def _pad_widths(call: OpCall, maps: IndexMaps) -> ResizedCall:
    signal, result, pad = call.axes[call.arguments["self"]], call.output_axes[0], list(call.arguments["pad"])
    for k in range(len(pad) // 2):
        dim = len(signal) - 1 - k
        old, new = signal[dim], result[dim]
        before, after = pad[2 * k : 2 * k + 2]
        pad[2 * k] = maps.prefix(new, before) if before > 0 else -maps.prefix(old, -before)
        pad[2 * k + 1] = (
            maps.size(new) - maps.prefix(new, axis_size(new) - after)
            if after > 0
            else maps.prefix(old, axis_size(old) + after) - maps.size(old)
        )
    return revised(call, pad=pad)


@rule(aten.flip, aten.roll, family=Movement(Move.REORDERING))
def _reordered(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    dims = c["dims"] or range(len(signal))
    c.pin([signal[dim] for dim in dims], ORDER)
    return [signal]


@rule(aten.tril, aten.triu)
def _triangle(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    c.pin(signal[-2:], ORDER)
    return [signal]


@rule(aten.glu)
def _glu(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    dim = c.dim(c["dim"], len(signal))
    value, gate = c.split(signal[dim], axis_size(signal[dim]) // 2)
    c.unify(value, gate)
    signal[dim] = c.space.normalise(value)
    return [signal]


@rule(aten.native_channel_shuffle, aten.channel_shuffle, family=Movement(Move.REORDERING))
def _channel_shuffle(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    groups, inner = c.factored(signal[1], c["groups"], c.shape("self")[1] // c["groups"])
    c.pin([groups], SHUFFLED_GROUPS)
    signal[1] = c.space.product(inner, groups)
    return [signal]
