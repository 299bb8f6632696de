"""How new channels pass products that sum over some dims: here they may reach old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.growth.call_view import AxisFacts, CallView
from fxwidth.growth.states import ALL_ZERO, CONSTANT, State, meet, multiplied, passed
from fxwidth.growth.transfers import Result, family_transfer, transfer
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import as_family
from fxwidth.rules.op_families import (
    Attention,
    Cell,
    Convolution,
    Distances,
    GroupedProduct,
    Product,
    SampledConvolution,
)

aten = torch.ops.aten


@family_transfer(Product)
def _product(c: CallView) -> Result:
    """Return the states of a sum of products, and of what is added to it."""
    family = as_family(c.call.func, Product)
    assert family is not None
    left, right, result = family.terms
    left_states, right_states = c.states(family.left), c.states(family.right)
    for left_dim, right_dim in zip(*family.summed_dims, strict=True):
        c.contract(family.left, left_dim, family.right, right_dim)
    row = []
    for letter in result:
        sides = [s[term.index(letter)] for s, term in ((left_states, left), (right_states, right)) if letter in term]
        row.append(multiplied(*sides) if len(sides) == 2 else sides[0])
    if family.added is not None:
        added = c.states(family.added)
        added = [CONSTANT] * (len(row) - len(added)) + added
        row = [state & other for state, other in zip(row, added, strict=True)]
    return [row]


@family_transfer(GroupedProduct)
def _grouped_product(c: CallView) -> Result:
    family = as_family(c.call.func, GroupedProduct)
    assert family is not None
    c.contract(family.left, 1, family.right, 1)
    return [[c.states(family.left)[0], c.states(family.right)[2]]]


@family_transfer(Convolution)
def _convolution(c: CallView) -> Result:
    """Tell the groups, which are not summed over, from the channels read and written per group."""
    reads, writes = (0, 1) if c["transposed"] else (1, 0)
    groups, read, written = convolution_parts(c.call, c.facts)
    if read:
        c.contract("input", 1, "weight", reads)
    signals, weights = c.states("input"), c.states("weight")
    channels = multiplied(signals[1], weights[0]) if groups else ALL_ZERO
    channels &= weights[writes] if written else ALL_ZERO
    channels &= c.entry("bias")
    # Samples, and positions under a kernel of size one, are treated alike; a bias adds the same to all of them.
    kept = CONSTANT if "bias" in c else ALL_ZERO
    return c.each_output(lambda dim: channels if dim == 1 else signals[dim] & kept)


def convolution_parts(call: OpCall, facts: AxisFacts) -> tuple[int, int, int]:
    """Return how often the factor is in a convolution's groups, and in what it reads and writes per group.

    What comes in is groups * read, what goes out groups * written; the weight's dim 1 holds one of the latter alone.
    """
    arguments = call.arguments
    into = facts.multiplicity(call.axes[arguments["input"]][1])
    out = facts.multiplicity(call.output_axes[0][1])
    own = facts.multiplicity(call.axes[arguments["weight"]][1])
    groups = out - own if arguments.get("transposed") else into - own
    return groups, into - groups, out - groups


@family_transfer(SampledConvolution)
def _deformed(c: CallView) -> Result:
    c.contract("input", 1, "weight", 1)
    channels = c.states("weight")[0] & c.entry("bias")
    samples = meet(c.states(name)[0] for name in ("input", "offset", "mask"))
    return c.each_output(lambda dim: channels if dim == 1 else samples & CONSTANT if dim == 0 else State.ANY)


@transfer(aten._trilinear)
def _trilinear(c: CallView) -> Result:
    for contraction in c.call.contractions:
        c.contract(contraction.left, contraction.left_dims[0], contraction.right, contraction.right_dims[0])
    whole: list[State | None] = []
    for k in (1, 2, 3):
        row: list[State | None] = list(c.states(f"i{k}"))
        for dim in sorted(c[f"expand{k}"]):
            row.insert(dim, None)
        both = zip(whole or [None] * len(row), row, strict=True)
        whole = [one if other is None else other if one is None else multiplied(one, other) for one, other in both]
    kept = [CONSTANT if state is None else state for state in whole]
    return [[state for dim, state in enumerate(kept) if dim not in c["sumdim"]]]


@family_transfer(Distances)
def _distances(c: CallView) -> Result:
    """Let new rows be anything; where new channels are zero on both sides, they are no further apart."""
    for name in ("x1", "x2"):
        last = len(c.axes(name)) - 1
        if c.facts.carries(c.axes(name)[last]):
            c.need_zero(name, last, "it measures distances over new channels, which cannot be zero")
    one, other = c.states("x1"), c.states("x2")

    def beside(from_end: int) -> State:
        own = (
            one[-2:-1]
            if from_end == 2
            else other[-2:-1]
            if from_end == 1
            else [row[-from_end] for row in (one, other) if from_end <= len(row)]
        )
        return passed(meet(own), State.ZERO if from_end > 2 else State.ANY)

    rank = len(c.outputs[0][1])
    return c.each_output(lambda dim: beside(rank - dim))


@family_transfer(Attention)
def _attention(c: CallView) -> Result:
    """Let new channels of values through, which are summed alike; those of queries and keys must meet zeros."""
    operands = [c[name] for name in ("query", "key", "value", "attn_mask", "attn_bias") if _is_given(c, name)]
    if any(c.facts.carries(c.axes(tensor)[dim]) for tensor, dim in _summed_positions(c)):
        c.refuse("its softmax sees new entries")
    c.contract("query", len(c.axes("query")) - 1, "key", len(c.axes("key")) - 1)
    value = c.states("value")
    output, *rest = c.everywhere(State.ANY)

    def beside(dim: int) -> State:
        """Return the state along a dim that is not summed over: what all operands agree on, or values of zero."""
        from_end = len(output) - dim
        common = meet(_from_end(c.states(tensor), from_end) for tensor in operands)
        return passed(common, State.ANY) | (_from_end(value, from_end) & State.ZERO if from_end > 2 else State.ANY)

    return [(*map(beside, range(len(output) - 1)), value[-1]), *rest]


@family_transfer(Cell)
def _cell(c: CallView) -> Result:
    """Let new units through: each sees itself alone, and stays zero where its gates and its past are."""
    operands = c.call.inputs
    *_, workspace = c.everywhere(State.ANY)

    def unit(dim: int) -> State:
        return passed(meet(_from_end(c.states(tensor), 2 - dim) for tensor in operands), State.ZERO)

    return [*c.each_output(unit)[:-1], workspace]


def _is_given(c: CallView, name: str) -> bool:
    return c.call.arguments.get(name) is not None


def _summed_positions(c: CallView) -> list[tuple[Tensor, int]]:
    """Return the dims over which the softmax runs and the values are summed."""
    masks = [c[name] for name in ("attn_mask", "attn_bias") if _is_given(c, name)]
    places = [(c["key"], len(c.axes("key")) - 2), (c["value"], len(c.axes("value")) - 2)]
    return places + [(mask, len(c.axes(mask)) - 1) for mask in masks if c.axes(mask)]


def _from_end(states: list[State], place: int) -> State:
    return states[-place] if place <= len(states) else CONSTANT
