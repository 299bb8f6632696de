"""How new channels pass ops that sum over some dims: products, norms, reductions. Here they may reach old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.growth.states import (
    ALL_ZERO,
    CONSTANT,
    AxisFacts,
    CallView,
    DirectionlessError,
    Result,
    State,
    family_transfer,
    follow,
    meet,
    multiplied,
    passed,
    transfer,
)
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import as_family
from fxwidth.rules.normalization import weight_norm_dim
from fxwidth.rules.op_families import (
    Attention,
    Cell,
    Convolution,
    GroupedProduct,
    Norm,
    NormKind,
    Product,
    Reduction,
    WeightNorm,
)

aten = torch.ops.aten

# -- matrix products and convolutions ------------------------------------------------------------------------------


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
    groups = out - own if arguments["transposed"] else into - own
    return groups, into - groups, out - groups


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


# -- norms ---------------------------------------------------------------------------------------------------------


@family_transfer(Norm)
def _norm(c: CallView) -> Result:
    family = as_family(c.call.func, Norm)
    assert family is not None
    return _NORMS[family.kind](c)


def _batch_norm(c: CallView) -> Result:
    for reduction in c.call.reductions:
        if c.facts.carries(c.axes(reduction.tensor)[reduction.dim]):
            c.refuse("its batch norm normalises over new entries")
    family = as_family(c.call.func, Norm)
    assert family is not None
    kept = c.states("input")[1] & c.entry(family.bias) & c.entry(family.mean) & State.ZERO
    own = [kept if dim == 1 and c.facts.carries(a) else State.ANY for dim, a in enumerate(c.axes("input"))]
    _, *saved = c.everywhere(State.ANY)
    return [tuple(own), *saved]


def _normalised_dims(c: CallView) -> range:
    rank = len(c.axes("input"))
    return range(rank - len(c["normalized_shape"]), rank)


def _rescale(c: CallView, kind: str) -> None:
    weight = c.call.arguments.get("weight")
    conflict = "has no gain that could be rescaled" if weight is None else c.observer.gain_conflict(weight)
    if conflict is not None:
        c.refuse(f"its {kind} {conflict}")
    if any(map(c.observer.is_used, c.call.outputs[1:])):
        c.refuse(f"the statistics of its {kind} are used elsewhere")
    c.observer.gain_rescaled(c.call)


def _layer_norm(c: CallView) -> Result:
    """Keep the mean by new entries at the mean; the variance falls by n / n', gain and eps make up for it."""
    states, axes, dims = c.states("input"), c.axes("input"), _normalised_dims(c)
    inside = [dim for dim in dims if c.facts.carries(axes[dim])]
    for dim in inside:
        if c.facts.is_sum(axes[dim]):
            c.refuse("its layer norm sees several concatenated parts")
        if not c.facts.is_bare(axes[dim]) or any(c.tensor("input").shape[d] != 1 for d in dims if d != dim):
            c.refuse("its layer norm runs over more than these channels")
        if not states[dim] & State.MEAN:
            c.refuse("its layer norm sees new channels that cannot be at the mean of the others")
        _rescale(c, "layer norm")
    bias = c["bias"]

    def normalised(dim: int) -> State:
        if dim in inside:
            return State.ZERO & (ALL_ZERO if bias is None else c.states(bias)[dim - dims[0]])
        return passed(states[dim], State.ANY)

    return c.each_output(normalised)


def _rms_norm(c: CallView) -> Result:
    """Keep the sum of squares by new entries of zero; the mean square falls, gain and eps make up for it."""
    states, axes = c.states("input"), c.axes("input")
    for dim in _normalised_dims(c):
        if c.facts.carries(axes[dim]):
            c.need_zero("input", dim, "its RMS norm sees new channels that cannot be zero")
            _rescale(c, "RMS norm")
    return c.each_output(lambda dim: passed(states[dim], State.ZERO))


@family_transfer(WeightNorm)
def _weight_norm(c: CallView) -> Result:
    """Let zeros in where the norm runs over them; a slice of zeros has no direction, but its length may be zero."""
    own = weight_norm_dim(c.call)
    directions = c.states("v")
    for dim in c.carrying("v"):
        if dim != own:
            c.need_zero_weight("v", dim, "its weight norm sees new channels that cannot be zero")
        elif directions[dim] & State.ZERO:
            reason = "it divides new channels that are zero by their norm"
            raise DirectionlessError(f"{reason} ({c.place})", c["v"], c["g"], dim)
    row = [CONSTANT if state & State.UNIFORM else state & State.ZERO for state in directions]
    if own is not None:
        row[own] = c.states("g")[own] & State.ZERO if c.facts.carries(c.axes("v")[own]) else CONSTANT
    return [row, *c.everywhere(State.ANY)[1:]]


def _group_norm(c: CallView) -> Result:
    """Let whole groups in; more channels per group change the statistics of that group."""
    states, axes = c.states("input"), c.axes("input")
    grows_groups = c.facts.carries(c.outputs[1][1][1])
    if c.facts.repeats(axes[1]) or (c.facts.carries(axes[1]) and not grows_groups):
        c.refuse("its group norm reduces over new channels together with old ones of their group")
    if any(map(c.facts.carries, axes[2:])):
        c.refuse("its group norm reduces over new entries")
    kept = State.ZERO & states[1] & c.entry("bias") if grows_groups else State.ANY
    output, *statistics = c.everywhere(State.ANY)
    return [(output[0], kept, *output[2:]), *statistics]


_NORMS = {
    NormKind.BATCH: _batch_norm,
    NormKind.LAYER: _layer_norm,
    NormKind.RMS: _rms_norm,
    NormKind.GROUP: _group_norm,
}

# -- reductions ----------------------------------------------------------------------------------------------------

_REDUCTIONS = {
    "sum": "it sums over new channels, which cannot be zero",
    "vector norm": "its vector norm sees new channels that cannot be zero",
    "mean": "it takes the mean over new channels, which cannot be at the mean of the others",
}


@family_transfer(Reduction)
def _reduction(c: CallView) -> Result:
    family = as_family(c.call.func, Reduction)
    assert family is not None
    for reduction in c.call.reductions:
        if c.facts.carries(c.axes(reduction.tensor)[reduction.dim]):
            _check_reduction(c, family, reduction.dim)
    gone = {reduction.dim for reduction in c.call.reductions}
    kept = ALL_ZERO if family.linear else State.ZERO if family.zero_of_zeros else State.ANY
    states = c.states("self")
    keeps_dims = len(c.outputs[0][1]) == len(states)
    row = [passed(state, kept) for dim, state in enumerate(states) if keeps_dims or dim not in gone]
    return [row] * len(c.outputs)


def _check_reduction(c: CallView, family: Reduction, dim: int) -> None:
    kind, axis = family.kind, c.axes("self")[dim]
    if kind == "mean":
        if not c.facts.is_product(axis):
            c.refuse("it takes the mean over several concatenated parts")
        if not c.states("self")[dim] & State.MEAN:
            c.refuse(_REDUCTIONS[kind])
    elif kind == "sum" or (kind == "vector norm" and _ignores_zeros(c)):
        c.need_zero("self", dim, _REDUCTIONS[kind])
    elif c.call.func.overloadpacket is aten.any:
        c.need_zero("self", dim, "it asks whether any new channel is set")
    elif not (family.extremum and c.states("self")[dim] & State.MEAN):
        # A mean is never beyond the extremes.
        c.refuse(f"it takes a {kind} over new channels")


def _ignores_zeros(c: CallView) -> bool:
    order = c.call.arguments.get("ord", c.call.arguments.get("p", 2))
    return order is None or (isinstance(order, (int, float)) and order >= 0)


@transfer(aten.max, aten.min, aten.argmax, aten.argmin)
def _extremum(c: CallView) -> Result:
    if c.call.reductions:
        return _reduction(c)
    if "other" in c:
        return c.everywhere(State.ANY)
    return follow(c, c["self"], State.ZERO)


@transfer(aten._softmax, aten._log_softmax, aten._safe_softmax)
def _softmax(c: CallView) -> Result:
    dim = c["dim"] % max(1, len(c.axes("self")))
    if c.facts.carries(c.axes("self")[dim]):
        c.refuse("its softmax sees new channels")
    return follow(c, c["self"], State.ANY)


@transfer(aten.cumprod, aten.sort, aten.cummax, aten.cummin, aten.topk)
def _ordered(c: CallView) -> Result:
    return follow(c, c["self"], State.ZERO)
