"""Matrix products and convolutions: sums of products over a shared dimension."""

from __future__ import annotations

from collections.abc import Sequence

from fxwidth.axes.factors import Axis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import KERNEL, POSITION, SORTED_ROWS
from fxwidth.recording.tape import OpCall
from fxwidth.rules.registry import (
    Prescribed,
    RuleContext,
    RuleDeclinedError,
    prescription,
    revised,
    rule,
)


@rule("mm", "bmm")
def _mm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    return [_product(c, "self", "mat2")]


@rule("addmm")
def _addmm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    return [c.broadcast([c.axes("self"), _product(c, "mat1", "mat2")])]


@rule("baddbmm")
def _baddbmm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    return [c.broadcast([c.axes("self"), _product(c, "batch1", "batch2")])]


def _product(c: RuleContext, left: str, right: str) -> list[Axis]:
    """Couple [..., N, K] with [..., K, M]; return the axes of the matrix product."""
    *batch, rows, inner = c.axes(left)
    *other_batch, other_inner, columns = c.axes(right)
    for own, other in zip(batch, other_batch, strict=True):
        c.unify(own, other)
    c.unify(inner, other_inner)
    c.contract(left, (len(batch) + 1,), right, (len(batch),))
    return [*batch, rows, columns]


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def _grouped_mm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Couple rows [S, K], sorted by expert, with weights [experts, K, M]: each row is multiplied by one of them."""
    rows, weights = (c.axes(tensor) for tensor in c.call.inputs[:2])
    if len(rows) != 2 or len(weights) != 3 or c["offs"] is None or c.call.arguments.get("bias") is not None:
        raise RuleDeclinedError("a grouped product that is not of rows with one matrix per group")
    c.unify(rows[1], weights[1])
    c.pin([rows[0], weights[0], *c.axes("offs")], SORTED_ROWS)
    left, right = ("self", "mat2") if "self" in c else ("input", "weight")
    c.contract(left, (1,), right, (1,))
    return [[rows[0], weights[2]]]


@rule("mv")
def _mv(c: RuleContext) -> Sequence[Sequence[Axis]]:
    left, right = c.axes("self"), c.axes("vec")
    c.unify(left[1], right[0])
    c.contract("self", (1,), "vec", (0,))
    return [[left[0]]]


@rule("dot", "vdot")
def _dot(c: RuleContext) -> Sequence[Sequence[Axis]]:
    other = "tensor" if "tensor" in c else "other"
    c.unify(c.axes("self")[0], c.axes(other)[0])
    c.contract("self", (0,), other, (0,))
    return [[]]


@rule("convolution", "_convolution")
def _convolution(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Couple in = G * I and out = G * O with weight [G * O, I, *kernel], or [G * I, O, *kernel] when transposed."""
    signal, weight = c.axes("input"), c.axes("weight")
    if len(signal) != len(weight):
        raise RuleDeclinedError("a convolution without a batch dimension")
    positions = _positions(c, signal)
    c.pin(weight[2:], KERNEL)
    groups = c["groups"]
    read, written = (0, 1) if c["transposed"] else (1, 0)
    c.contract("input", (1,), "weight", (read,))
    if groups == 1:
        c.unify(signal[1], weight[read])
        channels = weight[written]
    else:
        group = c.fresh(groups, "groups")
        into = c.fresh(c.shape("input")[1] // groups, "in per group")
        out = c.fresh(c.outputs[0].shape[1] // groups, "out per group")
        c.unify(signal[1], ((group, into),))
        c.unify(weight[read], ((group, into),) if c["transposed"] else into)
        c.unify(weight[written], out if c["transposed"] else ((group, out),))
        channels = c.space.product(group, out)
    if "bias" in c:
        c.unify(channels, c.axes("bias")[0])
    return [[signal[0], c.space.normalise(channels), *positions]]


def _positions(c: RuleContext, signal: list[Axis]) -> list[Axis]:
    """Return the axes of the result's positions: those of the signal where nothing reaches from one to another."""
    result = []
    kernel = c.shape("weight")[2:]
    for i, axis in enumerate(signal[2:]):
        if kernel[i] == c["stride"][i] == 1 and c["padding"][i] == c["output_padding"][i] == 0:
            result.append(axis)
        else:
            c.pin([axis], POSITION)
            result.append(c.fixed(c.outputs[0].shape[2 + i], POSITION))
    return result


@prescription("convolution", "_convolution")
def _convolution_groups(call: OpCall, maps: IndexMaps) -> Prescribed:
    arguments = call.arguments
    signal, weight = call.axes[id(arguments["input"])], call.axes[id(arguments["weight"])]
    channels = call.output_axes[0][1] if arguments["transposed"] else signal[1]
    return revised(call, groups=maps.size(channels) // maps.size(weight[1]))
