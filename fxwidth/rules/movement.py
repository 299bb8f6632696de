"""Ops that move elements without computing: views, permutations, cuts, joins, copies along a dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxwidth.axes.factors import ONE, Axis, axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import BY_STRIDES, ORDER, SHUFFLED_GROUPS, STRIDED, TAKEN_APART
from fxwidth.recording.tape import OpCall
from fxwidth.rules.op_families import Move, Movement
from fxwidth.rules.registry import ResizedCall, RuleContext, RuleDeclinedError, literal_rule, revised, rule

aten = torch.ops.aten

_VIEWS = (aten.view, aten._unsafe_view, aten._reshape_copy, aten.view_copy)


@rule(aten._reshape_alias, family=Movement(Move.RESHAPE_BY_STRIDES))
def _reshaped_by_strides(c: RuleContext) -> Sequence[Sequence[Axis]]:
    if not _is_reshape(c.call):
        raise RuleDeclinedError("a view by strides")
    return _view(c)


def _is_reshape(call: OpCall) -> bool:
    """Tell whether the strides of a `_reshape_alias` are those of a view of that size."""
    size, given = call.arguments["size"], call.arguments["stride"]
    try:
        return _same_strides(size, given, call.arguments["self"].view(size).stride())
    except RuntimeError:
        return False  # no view has that size


@rule(*_VIEWS, family=Movement(Move.RESHAPE))
def _view(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Match minimal blocks of dims with equal products: exactly the row-major meaning of a view."""
    signal, old, new = c.axes("self"), c.shape("self"), list(c.outputs[0].shape)
    if "size" not in c.call.arguments:
        return [signal]  # a view as another dtype
    if 0 in old:
        raise RuleDeclinedError("a view of an empty tensor")
    result: list[Axis] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1:
            i += 1
            continue
        if new[j] == 1:
            result.append(ONE)
            j += 1
            continue
        first_i, first_j = i, j
        i, j = _end_of_block(old, i, new, j)
        block = c.space.product(*signal[first_i:i])
        large = [size for size in new[first_j:j] if size > 1]
        parts = iter([block] if len(large) == 1 else c.factored(block, *large))
        result += [next(parts) if size > 1 else ONE for size in new[first_j:j]]
    return [result]


def _end_of_block(old: Sequence[int], i: int, new: Sequence[int], j: int) -> tuple[int, int]:
    """Return where the shortest runs of dims from i and j with equal products end."""
    size_i, size_j = old[i], new[j]
    i, j = i + 1, j + 1
    while size_i != size_j:
        if size_i < size_j:
            size_i *= old[i]
            i += 1
        else:
            size_j *= new[j]
            j += 1
    return i, j


def _sizes_of_result(call: OpCall, maps: IndexMaps) -> ResizedCall:
    if "size" not in call.arguments:
        return revised(call)
    return revised(call, size=[maps.size(axis) for axis in call.output_axes[0]])


literal_rule(*_VIEWS)(_sizes_of_result)


@literal_rule(aten._reshape_alias)
def _reshape(call: OpCall, maps: IndexMaps) -> ResizedCall:
    if not _is_reshape(call):
        return revised(call)
    # Its strides are those of the old sizes.
    sizes = [maps.size(axis) for axis in call.output_axes[0]]
    return torch.ops.aten.reshape.default, {"self": call.arguments["self"], "shape": sizes}


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


@rule(aten.expand, family=Movement(Move.EXPANSION))
def _expand(c: RuleContext) -> Sequence[Sequence[Axis]]:
    # A dim that is copied has no structure: it takes that of whatever it meets next.
    signal, shape = c.axes("self"), c.outputs[0].shape
    padded = [ONE] * (len(shape) - len(signal)) + signal
    return [[own if axis_size(own) == size else c.fresh(size) for own, size in zip(padded, shape, strict=True)]]


literal_rule(aten.expand)(_sizes_of_result)


@rule(aten.repeat, family=Movement(Move.REPETITION))
def _repeat(c: RuleContext) -> Sequence[Sequence[Axis]]:
    repeats = c["repeats"]
    signal = c.axes("self")
    padded = [ONE] * (len(repeats) - len(signal)) + signal
    # The copies are a factor of their own: a whole copy can be dropped or added.
    return [[c.space.product(c.fresh(count), own) for count, own in zip(repeats, padded, strict=True)]]


@literal_rule(aten.repeat)
def _repeat_counts(call: OpCall, maps: IndexMaps) -> ResizedCall:
    signal, result = call.axes[call.arguments["self"]], call.output_axes[0]
    padded = (ONE,) * (len(result) - len(signal)) + signal
    counts = [maps.size(new) // max(1, maps.size(own)) for new, own in zip(result, padded, strict=True)]
    return revised(call, repeats=counts)


@rule(aten.unsqueeze, family=Movement(Move.UNIT_DIMS))
def _unsqueeze(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    signal.insert(c["dim"] % (len(signal) + 1), ONE)
    return [signal]


@rule(aten.squeeze, family=Movement(Move.UNIT_DIMS))
def _squeeze(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, shape = c.axes("self"), c.shape("self")
    dims = c.call.arguments.get("dim")
    chosen = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {c.dim(dim, len(shape)) for dim in chosen}
    return [[axis for dim, axis in enumerate(signal) if dim not in gone or shape[dim] != 1]]


@literal_rule(aten.squeeze)
def _squeezed_dims(call: OpCall, maps: IndexMaps) -> ResizedCall:
    # A dim that is narrowed to one channel must not be squeezed for that.
    signal, dims = call.axes[call.arguments["self"]], call.arguments.get("dim")
    chosen = range(len(signal)) if dims is None else [dims] if isinstance(dims, int) else dims
    # Nor must one that was, before it had more.
    gone = [dim for dim in chosen if maps.space.normalise(signal[dim]) == ONE]
    if all(dim in gone or maps.size(signal[dim]) != 1 for dim in chosen):
        return revised(call)
    squeeze = torch.ops.aten.squeeze_ if call.func._schema.is_mutable else torch.ops.aten.squeeze
    return squeeze.dims, {"self": call.arguments["self"], "dim": gone}


@rule(aten.select, family=Movement(Move.PART))
def _select(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, shape = c.axes("self"), c.shape("self")
    dim = c.dim(c["dim"], len(shape))
    axis = signal.pop(dim)
    if not c.space.is_constant(axis):
        _, rest = c.split(axis, c["index"] % shape[dim])
        c.split(rest, 1)
    return [signal]


@literal_rule(aten.select)
def _select_index(call: OpCall, maps: IndexMaps) -> ResizedCall:
    signal = call.axes[call.arguments["self"]]
    axis = signal[call.arguments["dim"] % len(signal)]
    return revised(call, index=maps.prefix(axis, call.arguments["index"] % axis_size(axis)))


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


@rule(aten.slice_scatter)
def _slice_scatter(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, source, shape = c.axes("self"), c.axes("src"), c.shape("self")
    dim = c.dim(c["dim"], len(shape))
    start, end = _slice_bounds(c.call.arguments, shape[dim])
    if c["step"] != 1:
        raise RuleDeclinedError("a strided scatter")
    for k, axis in enumerate(signal):
        c.unify(c.cut(axis, start, end) if k == dim else axis, source[k])
    return [[c.space.normalise(axis) for axis in signal]]


literal_rule(aten.slice_scatter)(_slice_literals)


@rule(aten.as_strided, family=Movement(Move.STRIDES))
def _as_strided(c: RuleContext) -> Sequence[Sequence[Axis]]:
    if not _is_alias(c.call, c.shape("self")):
        c.pin([axis for tensor in c.in_memory_of("self") for axis in c.axes(tensor)], BY_STRIDES)
        result = [c.fixed(size, BY_STRIDES) for size in c.outputs[0].shape]
        return [[c.axes("self")[0], *result[1:]] if _is_inside_samples(c) else result]
    return [c.axes("self")]


def _is_inside_samples(c: RuleContext) -> bool:
    """Tell whether a view by strides shows a part of each entry of the first dim, such as a sample, in their order."""
    shape, size, given = c.shape("self"), c["size"], c["stride"]
    stride, own_offset = c.call.layouts[c["self"]]
    if not size or not shape or (size[0], given[0]) != (shape[0], stride[0]):
        return False
    first = 0 if c["storage_offset"] is None else c["storage_offset"] - own_offset
    last = first + sum((n - 1) * step for n, step in zip(size[1:], given[1:], strict=True))
    return bool(0 <= first <= last < stride[0])


def _is_alias(call: OpCall, shape: Sequence[int]) -> bool:
    """Tell whether a view by strides shows what its operand does: adaptive pooling restrides dims of size one."""
    stride, own_offset = call.layouts[call.arguments["self"]]
    size, given, offset = (call.arguments[name] for name in ("size", "stride", "storage_offset"))
    return offset in (None, own_offset) and list(size) == list(shape) and _same_strides(size, given, stride)


def _same_strides(size: Sequence[int], first: Sequence[int], second: Sequence[int]) -> bool:
    """Tell whether strides lead to the same places; that of a single position says nothing."""
    return all(n == 1 or one == other for n, one, other in zip(size, first, second, strict=True))


@literal_rule(aten.as_strided)
def _as_alias(call: OpCall, maps: IndexMaps) -> ResizedCall:
    if not _is_alias(call, [axis_size(axis) for axis in call.axes[call.arguments["self"]]]):
        return revised(call)
    return torch.ops.aten.alias.default, {"self": call.arguments["self"]}


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
