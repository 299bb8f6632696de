"""Look-ups by index tensors: the indexed dim is pinned, the others go through; and ops that make tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxwidth.axes.factors import Axis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import FOUND, GATHERED, INDEXED, MASKED
from fxwidth.recording.tape import OpCall
from fxwidth.rules.op_families import Bags, LookUp
from fxwidth.rules.registry import ResizedCall, RuleContext, RuleDeclinedError, literal_rule, revised, rule

aten = torch.ops.aten

MASKS = (torch.bool, torch.uint8)
"""What an index holds that is a mask, and no list of numbers."""


@rule(aten.index, aten._unsafe_index, family=LookUp("self", "indices"))
def _index(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, indices = c.axes("self"), list(c["indices"])
    if any(index is not None and index.dtype in MASKS for index in indices):
        return [_masked(c, signal, indices)]
    return [looked_up(c, signal, indices)]


def looked_up(c: RuleContext, signal: list[Axis], indices: list[torch.Tensor | None]) -> list[Axis]:
    """Return the axes of what is looked up in a tensor by lists of numbers, whose dims are pinned."""
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    c.pin([signal[dim] for dim in dims], INDEXED)
    found = c.broadcast([c.axes(index) for index in indices if index is not None])
    rest = [axis for dim, axis in enumerate(signal) if dim not in dims]
    # Index dims that stand together are replaced in place, others go to the front.
    place = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    return [*rest[:place], *found, *rest[place:]]


def _masked(c: RuleContext, signal: list[Axis], indices: list[torch.Tensor | None]) -> list[Axis]:
    """Replace the dims under a mask by one, the places where it is true."""
    (first, *others) = [dim for dim, index in enumerate(indices) if index is not None]
    mask = indices[first]
    if others or mask is None:
        raise RuleDeclinedError("an index by a mask and by something else")
    last = first + mask.dim()
    c.pin([*signal[first:last], *c.axes(mask)], MASKED)
    return [*signal[:first], c.fixed(c.outputs[0].shape[first], FOUND), *signal[last:]]


@rule(aten.nonzero, aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.masked_select)
def _found(c: RuleContext) -> Sequence[Sequence[Axis]]:
    for operand in c.call.inputs:
        c.pin(c.axes(operand), FOUND)
    return [[c.fixed(size, FOUND) for size in output.shape] for output in c.outputs]


@rule(aten.index_select, family=LookUp("self", "index"))
def _index_select(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, index = c.axes("self"), c.axes("index")
    dim = c.dim(c["dim"], len(signal))
    c.pin([signal[dim]], INDEXED)
    signal[dim] = index[0] if index else c.fixed(1)
    return [signal]


@rule(aten.embedding, family=LookUp("weight", "indices"))
def _embedding(c: RuleContext) -> Sequence[Sequence[Axis]]:
    table = c.axes("weight")
    c.pin([table[0]], INDEXED)
    return [[*c.axes("indices"), table[1]]]


@rule(aten._embedding_bag, aten._embedding_bag_forward_only, family=Bags("weight", "indices"))
def _embedding_bag(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Sum up rows of a table, one bag after the other; offsets tell where each begins, and may tell where all end."""
    table, offsets, result = c.axes("weight"), c.axes("offsets"), c.outputs[0].shape
    if c["include_last_offset"] and c.call.func.overloadpacket is aten._embedding_bag_forward_only:
        raise RuleDeclinedError("bags whose end is told, of a table without gradient")
    weights = c.axes("per_sample_weights") if "per_sample_weights" in c else []
    c.pin([table[0], *c.axes("indices"), *offsets, *weights], INDEXED)
    bags = c.fixed(result[0], INDEXED) if c["include_last_offset"] else offsets[0]
    # The others are kept for the backward pass: of the largest entries of each bag, where they were.
    return [
        [bags, table[1]] if output.shape == result else [c.fixed(size) for size in output.shape] for output in c.outputs
    ]


@rule(aten.gather, family=LookUp("self", "index", slices=False))
def _gather(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, index = c.axes("self"), c.axes("index")
    dim = c.dim(c["dim"], len(signal))
    shape, index_shape = c.shape("self"), c.shape("index")
    c.pin([signal[dim]], INDEXED)
    for k in range(len(signal)):
        if k != dim and shape[k] == index_shape[k]:
            c.unify(signal[k], index[k])
        elif k != dim:
            c.pin([signal[k], index[k]], GATHERED)
    return [index]


_FILLED = (
    aten.full,
    aten.zeros,
    aten.ones,
    aten.empty,
    aten.rand,
    aten.randn,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
)


@rule(*_FILLED)
def _filled(c: RuleContext) -> Sequence[Sequence[Axis]]:
    # Every entry is made alike, so the tensor may take the size of whatever it meets.
    return [[c.fresh(size) for size in c.outputs[0].shape]]


@literal_rule(*_FILLED)
def _filled_size(call: OpCall, maps: IndexMaps) -> ResizedCall:
    return revised(call, size=[maps.size(axis) for axis in call.output_axes[0]])


@rule(
    aten.arange,
    aten.eye,
    aten.linspace,
    aten.randperm,
    aten.scalar_tensor,
    aten.empty_strided,
    aten.tril_indices,
    aten.triu_indices,
)
def _made_once(c: RuleContext) -> Sequence[Sequence[Axis]]:
    return [[c.fixed(size) for size in output.shape] for output in c.outputs]
