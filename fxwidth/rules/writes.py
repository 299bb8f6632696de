"""Writes to places that index tensors or masks tell: the dims they tell places in stay, the others go through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxwidth.axes.factors import ONE, Axis, axis_size
from fxwidth.axes.pins import GATHERED, INDEXED, MASKED
from fxwidth.rules.indexing import MASKS, looked_up
from fxwidth.rules.registry import RuleContext, RuleDeclinedError, rule

aten = torch.ops.aten

# -- whole slices, by a list of numbers ----------------------------------------------------------------------------


@rule(aten.index_add, aten.index_copy, aten.index_reduce)
def _index_add(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Write slices of `source` to those of `self` that `index` numbers, [k] for k slices."""
    signal, source = c.axes("self"), c.axes("source")
    if not signal or len(source) != len(signal):
        raise RuleDeclinedError("numbers written to a tensor without dims, or from one")
    dim = c.dim(c["dim"], len(signal))
    for k, (own, other) in enumerate(zip(signal, source, strict=True)):
        if k != dim:
            c.unify(own, other)
    return [_numbered(c, signal, dim, [source[dim]])]


@rule(aten.index_fill)
def _index_fill(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    if not signal:
        raise RuleDeclinedError("a number written to a tensor without dims")
    return [_numbered(c, signal, c.dim(c["dim"], len(signal)), [])]


def _numbered(c: RuleContext, signal: list[Axis], dim: int, sources: list[Axis]) -> list[Axis]:
    """Pin the dim whose slices are numbered, and the numbers: of two writes to one slice the order may matter."""
    numbers = c.axes("index") or [c.fixed(1)]
    for source in sources:
        c.unify(numbers[0], source)
    c.pin([signal[dim], *numbers, *sources], INDEXED)
    return [c.space.normalise(axis) for axis in signal]


# -- single entries, by numbers of their own -----------------------------------------------------------------------


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def _scatter(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Write entries of `src` along `dim` to where `index` says, each beside its own in all other dims."""
    operands = [c.axes(name) for name in ("self", "index", "src") if name in c]
    signal, rank = operands[0], len(operands[0])
    if rank == 0 or any(len(axes) != rank for axes in operands):
        raise RuleDeclinedError("numbers written to a tensor without dims, or from one")
    dim = c.dim(c["dim"], rank)
    for k in range(rank):
        others = [axes[k] for axes in operands]
        if k == dim:
            _pair(c, others[1:])
            c.pin(others, INDEXED)
        elif not _pair(c, others):
            c.pin(others, GATHERED)
    return [[c.space.normalise(axis) for axis in signal]]


def _pair(c: RuleContext, axes: list[Axis]) -> bool:
    """Couple axes if they are of one size; tell whether they are. Of a longer one only the first part is taken."""
    if len({axis_size(axis) for axis in axes}) > 1:
        return False
    for other in axes[1:]:
        c.unify(axes[0], other)
    return True


@rule(aten.segment_reduce)
def _segment_reduce(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Reduce neighbouring rows of [rows, *rest] to one each; how many are in each, or where they begin, is told."""
    data = c.axes("data")
    told = next((name for name in ("lengths", "offsets") if name in c), "")
    if not told or c["axis"] != 0 or len(c.shape(told)) != 1 or "indices" in c:
        raise RuleDeclinedError("segments along another dim than the first")
    c.pin([data[0], *c.axes(told)], INDEXED)
    first = c.axes(told)[0] if told == "lengths" else c.fixed(c.outputs[0].shape[0], INDEXED)
    return [[c.space.normalise(first), *data[1:]]]


# -- places by lists of numbers in several dims, and by masks ------------------------------------------------------


@rule(aten.index_put, aten._unsafe_index_put)
def _index_put(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Write values, broadcast to what a look-up by the same indices would give."""
    signal, indices = c.axes("self"), list(c["indices"])
    if any(index is not None and index.dtype in MASKS for index in indices):
        _write_under_mask(c, signal, indices)
    else:
        # Of two writes to one place the later wins, or both are summed up.
        c.pin([axis for index in indices if index is not None for axis in c.axes(index)], INDEXED)
        c.broadcast([looked_up(c, signal, indices), c.axes("values")])
    return [[c.space.normalise(axis) for axis in signal]]


def _write_under_mask(c: RuleContext, signal: list[Axis], indices: list[Tensor | None]) -> None:
    """Couple the dims of a mask with those under it, and the values with the rest."""
    (first, *others) = [dim for dim, index in enumerate(indices) if index is not None]
    mask = indices[first]
    if others or mask is None:
        raise RuleDeclinedError("writing under a mask and by something else")
    last = first + mask.dim()
    for own, other in zip(signal[first:last], c.axes(mask), strict=True):
        c.unify(own, other)
    values, rest = c.axes("values"), signal[last:]
    found = values[-len(rest) - 1] if len(values) > len(rest) else ONE
    if axis_size(found) != 1:
        # One value for each place under the mask: which is whose depends on all of them.
        c.pin([found, *signal[first:last], *c.axes(mask)], MASKED)
    c.broadcast([[*signal[:first], found, *rest], values])


@rule(aten.masked_scatter)
def _masked_scatter(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Write the entries of `source`, in order, to where a mask is true; whole rows where the mask is one for each."""
    signal, source, mask = c.axes("self"), c.axes("source"), c["mask"]
    shape, rank = c.shape("self"), len(signal)
    padded = (1,) * (rank - mask.dim()) + tuple(mask.shape), (0,) * (rank - mask.dim()) + mask.stride()
    if any(size != 1 and size != own for size, own in zip(padded[0], shape, strict=False)) or mask.dim() > rank:
        raise RuleDeclinedError("a mask that has more entries than what is under it")
    rows = 0
    # What is one number shown several times is the same for all of a row.
    while rows < min(rank, len(source)) and (padded[0][-rows - 1] == 1 or padded[1][-rows - 1] == 0):
        if axis_size(source[-rows - 1]) != shape[-rows - 1]:
            break
        rows += 1
    c.broadcast([signal, c.axes("mask")])
    for own, other in zip(signal[rank - rows :], source[len(source) - rows :], strict=True):
        c.unify(own, other)
    c.pin([*signal[: rank - rows], *source[: len(source) - rows]], MASKED)
    return [[c.space.normalise(axis) for axis in signal]]
