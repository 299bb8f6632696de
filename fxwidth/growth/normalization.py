"""How new channels pass norms."""

from __future__ import annotations

from fxwidth.growth.call_view import CallView
from fxwidth.growth.states import ALL_ZERO, CONSTANT, DirectionlessError, State, passed
from fxwidth.growth.transfers import Result, family_transfer
from fxwidth.rules.family_table import as_family
from fxwidth.rules.normalization import weight_norm_dim
from fxwidth.rules.op_families import (
    Norm,
    NormKind,
    WeightNorm,
)


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
    mean = ALL_ZERO if family.by_own_batch(c.call.arguments) else c.entry(family.mean)
    kept = c.states("input")[1] & c.entry(family.bias) & mean & State.ZERO
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
