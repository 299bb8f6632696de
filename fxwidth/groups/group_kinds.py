"""What the channels of each group are in the network: hidden, heads, a head's dimension, a residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum

from torch import Tensor

from fxwidth.analysis.free_outputs import output_dims
from fxwidth.analysis.result import Analysis
from fxwidth.analysis.roles import Role, Roles
from fxwidth.axes.factors import Axis, Factor
from fxwidth.axes.pins import INDEXED, OUTPUT, is_of_input
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import family_of
from fxwidth.rules.op_families import Arithmetic, Attention, Elementwise

# Fewer dims than a batch, rows and columns are no products as attention has them.
_BATCHED = 3


class Kind(StrEnum):
    """What the channels of a group are."""

    INPUT = "input"
    OUTPUT = "output"
    ENTRIES = "entries looked up"
    HEADS = "heads"
    HEAD_DIM = "head dim"
    RESIDUAL = "residual stream"
    HIDDEN = "hidden"


def group_kinds(analysis: Analysis, roles: Roles, groups: Iterable[ChannelGroup]) -> dict[str, Kind]:
    """Return what the channels of each group are, by its name.

    Heads are what products of activations are batched over, and a head's dimension is what such products sum over or
    make. A residual stream is what several modules write, whose results are added.
    """
    heads: set[Factor] = set()
    head_dims: set[Factor] = set()
    for shared, own in _products(analysis, roles):
        heads.update(*(analysis.space.factors(axis) for axis in shared))
        head_dims.update(*(analysis.space.factors(axis) for axis in own))
    sums = {factor for axis in _sums(analysis, roles) for factor in analysis.space.factors(axis)}
    outputs = {factor for _, axis in output_dims(analysis) for factor in analysis.space.factors(axis)}
    known = {Kind.OUTPUT: outputs, Kind.HEADS: heads, Kind.HEAD_DIM: head_dims, Kind.RESIDUAL: sums}
    return {group.name: _kind(group, known) for group in groups}


def _kind(group: ChannelGroup, known: Mapping[Kind, set[Factor]]) -> Kind:
    reason = "" if group.factor.pinned is None else group.factor.pinned.root.reason
    if is_of_input(reason):
        return Kind.INPUT
    if reason == OUTPUT:
        return Kind.OUTPUT
    if reason == INDEXED:
        return Kind.ENTRIES
    if not reason and group.factor in known[Kind.OUTPUT]:
        return Kind.OUTPUT
    if group.factor in known[Kind.HEADS]:
        return Kind.HEADS
    if group.factor in known[Kind.HEAD_DIM]:
        return Kind.HEAD_DIM
    writers = {site.parameter.rpartition(".")[0] for site in group.sites_as(Role.WRITER)}
    return Kind.RESIDUAL if len(writers) > 1 and group.factor in known[Kind.RESIDUAL] else Kind.HIDDEN


def _products(analysis: Analysis, roles: Roles) -> Iterator[tuple[list[Axis], list[Axis]]]:
    """Yield of each product of activations the axes that it is batched over, and all others of its operands."""
    for call in analysis.calls:
        if isinstance(family_of(call.func), Attention):
            for name in ("query", "key", "value"):
                axes = call.axes[call.arguments[name]]
                yield list(axes[:-2]), [axes[-1]]
            continue
        for contraction in roles.activation_products(call):
            left, right = contraction.left, contraction.right
            if min(left.dim(), right.dim()) >= _BATCHED:
                yield from (
                    _sides(call, left, contraction.left_dims),
                    _sides(call, right, contraction.right_dims),
                )


def _sides(call: OpCall, operand: Tensor, summed: tuple[int, ...]) -> tuple[list[Axis], list[Axis]]:
    """Return the axes of an operand but its last two, and the others with those summed over."""
    axes = call.axes[operand]
    batch = [dim for dim in range(len(axes) - 2) if dim not in summed]
    return [axes[dim] for dim in batch], [axis for dim, axis in enumerate(axes) if dim not in batch]


def _sums(analysis: Analysis, roles: Roles) -> Iterator[Axis]:
    """Yield the axes of sums of activations."""
    for call in analysis.calls:
        family = family_of(call.func)
        if isinstance(family, Elementwise) and family.kind is Arithmetic.SUM:
            summands = [tensor for tensor in call.inputs if not roles.is_parameter(tensor)]
            if len(summands) > 1:
                yield from call.output_axes[0]
