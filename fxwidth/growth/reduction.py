"""How new channels pass reductions: sums, means, extrema, orders, softmax."""

from __future__ import annotations

import torch

from fxwidth.growth.call_view import CallView
from fxwidth.growth.states import ALL_ZERO, State, passed
from fxwidth.growth.transfers import Result, family_transfer, follow, transfer
from fxwidth.rules.family_table import as_family
from fxwidth.rules.op_families import (
    Reduction,
)

_REDUCTIONS = {
    "sum": "it sums over new channels, which cannot be zero",
    "vector norm": "its vector norm sees new channels that cannot be zero",
    "mean": "it takes the mean over new channels, which cannot be at the mean of the others",
}

aten = torch.ops.aten


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


@transfer(aten.logcumsumexp)
def _summed_exponentials(c: CallView) -> Result:
    return follow(c, c["self"], State.ANY)


@transfer(aten.cumprod, aten.sort, aten.cummax, aten.cummin, aten.topk)
def _ordered(c: CallView) -> Result:
    return follow(c, c["self"], State.ZERO)
