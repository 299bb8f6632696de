"""Matrix products and convolutions: sums of products over a shared dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxwidth.axes.factors import ONE, Axis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import KERNEL, POSITION, SORTED_ROWS, SPARSE
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import as_family
from fxwidth.rules.op_families import Convolution, Distances, GroupedProduct, Product, SampledConvolution
from fxwidth.rules.op_names import Op
from fxwidth.rules.registry import (
    ResizedCall,
    RuleContext,
    RuleDeclinedError,
    literal_rule,
    revised,
    rule,
)

aten = torch.ops.aten


def product(op: Op, left: str, right: str, formula: str, added: str | None = None) -> None:
    """Register an op that sums products of two operands: rule, growth, costs and roles follow from its formula.

    Args:
        op: the op, or the qualified name of one of another library.
        left: the name of its first operand.
        right: the name of its second operand.
        formula: which dims they share and which are summed over, as in einsum, "ik,kj->ij".
        added: the name of an operand that is added to the result.

    Raises:
        ValueError: the formula is none of a sum of products, or there is a rule for the op already.
    """
    family = Product(left, right, formula, added)

    def axes(c: RuleContext) -> Sequence[Sequence[Axis]]:
        result = _product(c, family)
        return [result if family.added is None else c.broadcast([c.axes(family.added), result])]

    rule(op, family=family)(axes)


def _product(c: RuleContext, family: Product) -> list[Axis]:
    """Couple the dims that two operands share; return the axes of their product."""
    _pin_sparse(c, family.left, family.right)
    left, right, result = family.terms
    own = dict(zip(left, c.axes(family.left), strict=True))
    other = dict(zip(right, c.axes(family.right), strict=True))
    for letter in left:
        if letter in other:
            c.unify(own[letter], other[letter])
    left_dims, right_dims = family.summed_dims
    c.contract(family.left, left_dims, family.right, right_dims)
    return [own[letter] if letter in own else other[letter] for letter in result]


def _pin_sparse(c: RuleContext, *operands: str) -> None:
    """Pin the dims of sparse operands: their entries are known by their places."""
    for operand in operands:
        if c[operand].layout is not torch.strided:
            c.pin(c.axes(operand), SPARSE)


product(aten.mm, "self", "mat2", "ik,kj->ij")
product(aten.bmm, "self", "mat2", "bik,bkj->bij")
product(aten.addmm, "mat1", "mat2", "ik,kj->ij", added="self")
product(aten.baddbmm, "batch1", "batch2", "bik,bkj->bij", added="self")
product(aten.addbmm, "batch1", "batch2", "bik,bkj->ij", added="self")
product(aten._sparse_addmm, "mat1", "mat2", "ik,kj->ij", added="self")
product(aten.mv, "self", "vec", "ik,k->i")
product(aten.addmv, "mat", "vec", "ik,k->i", added="self")
product(aten.dot, "self", "tensor", "k,k->")
product(aten.vdot, "self", "other", "k,k->")


def _grouped_product(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Couple rows [S, K], sorted by expert, with weights [experts, K, M]: each row is multiplied by one of them."""
    family = as_family(c.call.func, GroupedProduct)
    assert family is not None
    rows, weights = c.axes(family.left), c.axes(family.right)
    if len(rows) != 2 or len(weights) != 3 or c["offs"] is None or c.call.arguments.get("bias") is not None:
        raise RuleDeclinedError("a grouped product that is not of rows with one matrix per group")
    c.unify(rows[1], weights[1])
    c.pin([rows[0], weights[0], *c.axes("offs")], SORTED_ROWS)
    c.contract(family.left, (1,), family.right, (1,))
    return [[rows[0], weights[2]]]


rule(aten._grouped_mm, family=GroupedProduct("self", "mat2"))(_grouped_product)
rule("transformers::grouped_mm_fallback", family=GroupedProduct("input", "weight"))(_grouped_product)


@rule(aten.convolution, aten._convolution, family=Convolution())
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


@rule("torchvision::deform_conv2d", family=SampledConvolution())
def _deformed(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Couple as a convolution does; how far from its place each entry of the kernel reads is told for all channels."""
    if c["groups"] != 1 or c["offset_groups"] != 1:
        raise RuleDeclinedError("a deformed convolution in groups")
    signal, weight, others = c.axes("input"), c.axes("weight"), [c.axes(name) for name in ("offset", "mask")]
    c.pin([*signal[2:], *(axis for other in others for axis in other[1:])], POSITION)
    c.pin(weight[2:], KERNEL)
    for other in others:
        c.broadcast([signal[:1], other[:1]])
    c.unify(signal[1], weight[1])
    c.contract("input", (1,), "weight", (1,))
    c.unify(weight[0], c.axes("bias")[0])
    return [[signal[0], weight[0], *(c.fixed(size, POSITION) for size in c.outputs[0].shape[2:])]]


@rule(aten._trilinear)
def _trilinear(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Multiply three operands, broadcast after each got dims of size one, and sum over dims that two of them have."""
    names, rows = ("i1", "i2", "i3"), []
    for k, name in enumerate(names, 1):
        row = c.axes(name)
        for dim in sorted(c[f"expand{k}"]):
            row.insert(dim, ONE)
        rows.append(row)
    if len({len(row) for row in rows}) > 1:
        raise RuleDeclinedError("operands of several ranks")
    whole = c.broadcast(rows)
    for dim in c["sumdim"]:
        having = [k for k in range(3) if dim not in c[f"expand{k + 1}"]]
        if len(having) != 2:
            raise RuleDeclinedError("a sum of products of another number of operands than two")
        left, right = having
        own = [dim - sum(place < dim for place in c[f"expand{k + 1}"]) for k in having]
        c.contract(names[left], (own[0],), names[right], (own[1],))
    return [[axis for dim, axis in enumerate(whole) if dim not in c["sumdim"]]]


@rule(aten._cdist_forward, family=Distances())
def _distances(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Couple [*lead, P, M] with [*lead, R, M] to [*lead, P, R]: distances over M of each row from each other."""
    one, other = c.axes("x1"), c.axes("x2")
    c.unify(one[-1], other[-1])
    for name, own in (("x1", one), ("x2", other)):
        c.mix(name, len(own) - 1, "distance")
    return [[*c.broadcast([one[:-2], other[:-2]]), one[-2], other[-2]]]


@literal_rule(aten.convolution, aten._convolution)
def _convolution_groups(call: OpCall, maps: IndexMaps) -> ResizedCall:
    arguments = call.arguments
    signal, weight = call.axes[arguments["input"]], call.axes[arguments["weight"]]
    channels = call.output_axes[0][1] if arguments["transposed"] else signal[1]
    return revised(call, groups=maps.size(channels) // maps.size(weight[1]))
