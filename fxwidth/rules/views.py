"""Rules for reshaping: a view divides dims and puts them together, and size-one dims come and go."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxwidth.axes.factors import ONE, Axis, axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import BY_STRIDES
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
        i, j = end_of_block(old, i, new, j)
        block = c.space.product(*signal[first_i:i])
        large = [size for size in new[first_j:j] if size > 1]
        parts = iter([block] if len(large) == 1 else c.factored(block, *large))
        result += [next(parts) if size > 1 else ONE for size in new[first_j:j]]
    return [result]


def end_of_block(old: Sequence[int], i: int, new: Sequence[int], j: int) -> tuple[int, int]:
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


@rule(aten.resize, family=Movement(Move.COPY))
def _resize(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Leave a tensor as it is: observers resize what they have observed to what they observe, once it is as large."""
    if list(c.outputs[0].shape) != c.shape("self"):
        raise RuleDeclinedError("a tensor of another size in the same memory")
    return [c.axes("self")]


literal_rule(aten.resize)(_sizes_of_result)


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
        # Of more samples it shows the same part of each.
        size = list(call.arguments["size"])
        return revised(call, size=[*map(maps.size, call.output_axes[0][:1]), *size[1:]])
    return torch.ops.aten.alias.default, {"self": call.arguments["self"]}
