"""How new channels pass ops that act on each element of their broadcast operands alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxwidth.growth.call_view import CallView
from fxwidth.growth.states import ALL_ZERO, CONSTANT, State, meet, multiplied, of_number
from fxwidth.recording.tape import tensors_in, unbind
from fxwidth.rules.op_names import op_name, rule_name

aten = torch.ops.aten


@dataclass(frozen=True)
class PointwiseCall:
    """One dim of a pointwise op, counted from the end."""

    view: CallView
    from_end: int

    def state(self, name: str) -> State:
        """Return the state of an argument along the dim; numbers and tensors without the dim are constant."""
        return self.state_of(self.view[name])

    def state_of(self, value: Any) -> State:
        """Return the state of a value along the dim."""
        if not isinstance(value, Tensor):
            return of_number(value)
        states = self.view.states(value)
        return states[-self.from_end] if self.from_end <= len(states) else CONSTANT


def pass_pointwise(c: CallView) -> Sequence[Sequence[State]]:
    """Return the states of a pointwise op's results."""
    combine = _COMBINATIONS.get(rule_name(c.call.func), _by_trial)
    rank = len(c.outputs[0][1])
    return c.each_output(lambda dim: combine(PointwiseCall(c, rank - dim)))


def _by_trial(at: PointwiseCall) -> State:
    """Settle an op without an entry by running it once, with zeros for new entries that are zero."""
    c = at.view
    states = {tensor: at.state_of(tensor) for tensor in tensors_in(c.call.arguments)}
    if not states or torch.Tag.nondeterministic_seeded in c.call.func.tags:
        return State.ANY
    # Entries that are all equal stay so.
    common = meet(states.values())
    result = CONSTANT if common & State.UNIFORM else State.ANY
    zero = {key for key, state in states.items() if state & State.ZERO}
    if not zero:
        return result
    values = _trial(c, zero)
    if not all(bool(value.isfinite().all()) for value in values):
        c.refuse("it is not finite where new channels are zero")
    return result | State.ZERO if common & State.ZERO and not any(value.any() for value in values) else result


def _trial(c: CallView, zero: set[Tensor]) -> list[Tensor]:
    """Run an op on single numbers: zero for some tensors, one half (or one, for integers) for the others."""

    def number(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        other = 0.5 if leaf.dtype.is_floating_point or leaf.dtype.is_complex else 1
        return torch.full((1,), 0 if leaf in zero else other, dtype=leaf.dtype, device="cpu")

    arguments = {name: pytree.tree_map(number, value) for name, value in c.call.arguments.items()}
    args, kwargs = unbind(c.call.func, arguments)
    try:
        return tensors_in(c.call.func(*args, **kwargs))
    except (RuntimeError, TypeError) as error:
        c.refuse(f"it cannot be tried on single numbers: {str(error).splitlines()[0]}")


def _sum(at: PointwiseCall) -> State:
    return at.state("self") & at.state("other")


def _source(at: PointwiseCall) -> State:
    return at.state("self")


def _of_parts(at: PointwiseCall) -> State:
    return at.state("real") & at.state("imag")


def _written(at: PointwiseCall) -> State:
    return at.state("src")


def _multiplied(at: PointwiseCall) -> State:
    one, other = at.state("self"), at.state("other")
    result = multiplied(one, other)
    if result & State.MEAN:
        return result
    signal, scale = at.view["self"], at.view["other"]
    for left, right, left_state in ((signal, scale, one), (scale, signal, other)):
        averaged = left_state & (State.MEAN | State.WEIGHTED) and not left_state & State.UNIFORM
        if averaged and isinstance(left, Tensor) and isinstance(right, Tensor) and at.view.observer.scaled(left, right):
            result |= State.MEAN
    return result


def _divided(at: PointwiseCall) -> State:
    numerator, denominator = at.state("self"), at.state("other")
    if denominator & State.ZERO:
        at.view.refuse("it divides by new channels that are zero")
    if at.view.call.arguments.get("rounding_mode") is not None:
        return numerator & denominator & CONSTANT if numerator & denominator & State.UNIFORM else numerator & State.ZERO
    return numerator if denominator & State.UNIFORM else numerator & State.ZERO


def _chosen(at: PointwiseCall) -> State:
    return _choice(at.state("condition"), at.state("self"), at.state("other"))


def _masked(at: PointwiseCall) -> State:
    return _choice(at.state("mask"), at.state("self"), at.state("value"))


def _choice(condition: State, one: State, other: State) -> State:
    return one & other if condition & State.UNIFORM else one & other & State.ZERO


def _filled(at: PointwiseCall) -> State:
    return at.state_of(at.view.call.arguments.get("value", at.view.call.arguments.get("fill_value", 1)))


def _zeros(_: PointwiseCall) -> State:
    return ALL_ZERO


def _dropped(at: PointwiseCall) -> State:
    name = "self" if "self" in at.view.call.arguments else "input"
    return at.state(name) & State.ZERO


def _activated(at: PointwiseCall) -> State:
    # A parametric rectifier: zero at zero whatever its slope.
    return at.state("self") & State.ZERO


_COMBINATIONS: dict[str, Callable[[PointwiseCall], State]] = {
    op_name(op): combine
    for combine, ops in {
        _source: (
            *(aten.clone, aten.detach, aten.alias, aten._to_copy, aten.lift_fresh, aten.lift_fresh_copy, aten.neg),
            *(aten._conj, aten._conj_physical, aten._neg_view),
        ),
        _of_parts: (aten.complex,),
        _written: (aten.copy,),
        _sum: (aten.add, aten.sub, aten.rsub),
        _multiplied: (aten.mul,),
        _divided: (aten.div,),
        _chosen: (aten.where,),
        _masked: (aten.masked_fill,),
        _filled: (aten.fill, aten.full_like, aten.ones_like),
        _zeros: (aten.zero, aten.zeros_like, aten.empty_like),
        _dropped: (aten.native_dropout,),
        _activated: (aten.prelu, aten._prelu_kernel),
    }.items()
    for op in ops
}
