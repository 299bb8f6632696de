"""Where the numbers of new channels lie, and whether an op has a finite result for all of these.

A reader does not read new channels: it multiplies them by zero. That leaves the function as it was only if they are
finite, which the logarithm of a number that may be negative is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.utils import _pytree as pytree

from fxwidth.growth.call_view import CallView
from fxwidth.growth.states import State
from fxwidth.recording.tape import OpCall, tensors_in, unbind
from fxwidth.rules.family_table import family_of, is_arithmetic, is_move
from fxwidth.rules.op_families import Arithmetic, Family, LookUp, Move, Movement, Positions, Reduction
from fxwidth.rules.op_names import op_name, rule_name

aten = torch.ops.aten

Range = tuple[float, float]
"""The least and the largest that the new entries of a tensor can be."""

_INF = float("inf")
ANYTHING: Range = (-_INF, _INF)
_POINTS = (-8.0, -3.7, -2.0, -1.5, -1.0, -0.7, -0.3, -1e-3, 0.0, 1e-3, 0.3, 0.7, 1.0, 1.5, 2.0, 3.7, 8.0)
_TINY = 1e-30
_BESIDE = 0.5
"""What stands for operands of which old and new channels see the same."""
_MOST_OPERANDS = 3

Ranges = Callable[[Any], Range]


def refuse_not_finite(c: CallView, range_of: Ranges) -> None:
    """Refuse a pointwise op that has no finite result for some number that new channels may hold.

    Args:
        c: the op.
        range_of: where the new entries of each operand lie.

    Raises:
        RefusedError: it has none.
    """
    own = [tensor for tensor in dict.fromkeys(c.call.inputs) if _differs(c, tensor)]
    if not own or torch.Tag.nondeterministic_seeded in c.call.func.tags:
        return
    if len(own) > _MOST_OPERANDS:
        c.refuse("too many of its operands have new channels to tell whether it is finite there")
    lines = [_points(c, tensor, range_of(tensor)) for tensor in own]
    try:
        finite = _tried(c.call, own, lines)
    except (RuntimeError, TypeError, NotImplementedError):
        # What cannot be tried on single numbers is told of where its states are found.
        return
    averaged = all(state & State.MEAN for tensor in own for state in _states(c, tensor))
    if finite.all() or (averaged and len(own) == 1 and _is_one_interval(finite.tolist())):
        return
    c.refuse("it may have no finite result for new channels, and zero times that is not zero")


def _states(c: CallView, tensor: Tensor) -> list[State]:
    states = c.states(tensor)
    return [states[dim] for dim in c.carrying(tensor)]


def _differs(c: CallView, tensor: Tensor) -> bool:
    """Tell whether new channels may hold what no old one does."""
    return tensor.dtype.is_floating_point and any(not state & State.UNIFORM for state in _states(c, tensor))


def _points(c: CallView, tensor: Tensor, own: Range) -> list[float]:
    # What is made of parameters is not zero by accident.
    apart = c.observer.is_parameter(tensor)
    inside = [point for point in _POINTS if own[0] <= point <= own[1] and not (apart and point == 0)]
    return inside + [end for end in dict.fromkeys(own) if abs(end) < _INF and end not in inside]


def _tried(call: OpCall, own: Sequence[Tensor], lines: Sequence[Sequence[float]]) -> Tensor:
    """Run an op on all combinations of numbers for some operands and tell for which its results are finite."""
    grid = torch.meshgrid(*(torch.tensor(line, dtype=torch.float64, device="cpu") for line in lines), indexing="ij")
    known = {tensor: points.reshape(-1) for tensor, points in zip(own, grid, strict=True)}
    count = grid[0].numel()

    def number(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = torch.float64 if leaf.dtype.is_floating_point else leaf.dtype
        beside = torch.full((count,), _BESIDE if leaf.dtype.is_floating_point else 1, dtype=dtype, device="cpu")
        return known.get(leaf, beside).clone()

    args, kwargs = unbind(call.func, {name: pytree.tree_map(number, value) for name, value in call.arguments.items()})
    results = [result for result in tensors_in(call.func(*args, **kwargs)) if result.numel() == count]
    return torch.stack([result.reshape(-1).isfinite() for result in results]).all(0)


def _is_one_interval(finite: Sequence[bool]) -> bool:
    """Tell whether points with a result lie next to each other: a mean of some is among them then."""
    return [key for key, _ in groupby(finite)].count(True) == 1


# -- what ranges become ------------------------------------------------------------------------------------------------


def result_range(call: OpCall, range_of: Ranges) -> Range:
    """Return where the new entries of an op's first result lie, from where those of its operands do."""
    name = rule_name(call.func)
    if name in _FIXED:
        return _FIXED[name]
    tensors = call.inputs
    if not tensors:
        return ANYTHING
    first = range_of(tensors[0])
    if _stays_within(family_of(call.func), len(call.outputs)) or name in _KEPT:
        return first
    if name in _MONOTONE:
        return _monotone(name, first)
    if is_move(call.func, Move.JOIN):
        ranges = [range_of(tensor) for tensor in tensors]
        return min(low for low, _ in ranges), max(high for _, high in ranges)
    combine = _COMBINED.get(name)
    return ANYTHING if combine is None else combine(call, range_of)


def _stays_within(family: Family | None, results: int) -> bool:
    """Tell whether all results of an op lie between entries of its first operand."""
    match family:
        case Movement(kind):
            # By strides other entries of the same memory may come into sight.
            return kind not in (Move.JOIN, Move.STRIDES)
        case Reduction(kind=kind, extremum=extremum):
            return results == 1 and (kind == "mean" or extremum)
        case Positions(within=within):
            return within
        case LookUp():
            return True
        case _:
            return False


def _monotone(name: str, own: Range) -> Range:
    function = _MONOTONE[name]
    low, high = (float(function(torch.tensor(end, dtype=torch.float64, device="cpu"))) for end in own)
    # Where these underflow is a matter of scale, in which new channels are like old ones.
    low = max(low, _TINY) if name in _NEVER_ZERO else low
    return low if low == low else -_INF, high if high == high else _INF


def _operands(call: OpCall, range_of: Ranges) -> tuple[Range, Range]:
    return range_of(call.arguments["self"]), range_of(call.arguments["other"])


def _sum(call: OpCall, range_of: Ranges) -> Range:
    one, other = _operands(call, range_of)
    alpha = call.arguments.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return ANYTHING
    if call.func.overloadpacket is aten.rsub:
        one, other = other, one
    scale = -alpha if is_arithmetic(call.func, Arithmetic.DIFFERENCE) else alpha
    return _added(one, _product(other, (scale, scale)))


def _added(one: Range, other: Range) -> Range:
    return one[0] + other[0], one[1] + other[1]


def _product(one: Range, other: Range) -> Range:
    ends = [0.0 if 0 in (left, right) else left * right for left in one for right in other]
    return min(ends), max(ends)


def _multiplied(call: OpCall, range_of: Ranges) -> Range:
    if call.arguments["self"] is call.arguments["other"]:
        return _squared(call, range_of)
    return _product(*_operands(call, range_of))


def _divided(call: OpCall, range_of: Ranges) -> Range:
    one, other = _operands(call, range_of)
    if call.arguments.get("rounding_mode") is not None or other[0] <= 0:
        return ANYTHING
    return _product(one, (1 / other[1], 1 / other[0]))


def _reciprocal(call: OpCall, range_of: Ranges) -> Range:
    own = range_of(call.arguments["self"])
    return (1 / own[1], 1 / own[0]) if own[0] > 0 else ANYTHING


def _squared(call: OpCall, range_of: Ranges) -> Range:
    low, high = range_of(call.arguments["self"])
    largest = max(low * low, high * high)
    return (0.0 if low <= 0 <= high else min(low * low, high * high)), largest


def _size(call: OpCall, range_of: Ranges) -> Range:
    low, high = range_of(call.arguments["self"])
    return (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))


def _power(call: OpCall, range_of: Ranges) -> Range:
    exponent = call.arguments["exponent"]
    base = call.arguments["self"]
    if isinstance(base, (int, float)) or not isinstance(exponent, (int, float)):
        return (0.0, _INF) if isinstance(base, (int, float)) and base > 0 else ANYTHING
    even = exponent > 0 and exponent % 2 == 0
    return (0.0, _INF) if even or range_of(base)[0] >= 0 else ANYTHING


def _clamped(call: OpCall, range_of: Ranges) -> Range:
    low, high = range_of(call.arguments["self"])
    least, most = call.arguments.get("min"), call.arguments.get("max")
    least = range_of(least)[0] if isinstance(least, Tensor) else -_INF if least is None else float(least)
    most = range_of(most)[1] if isinstance(most, Tensor) else _INF if most is None else float(most)
    return min(max(low, least), most), min(max(high, least), most)


def _larger(call: OpCall, range_of: Ranges) -> Range:
    one, other = _operands(call, range_of)
    pick = max if call.func.overloadpacket is aten.maximum else min
    return pick(one[0], other[0]), pick(one[1], other[1])


_UNIT: Range = (-1.0, 1.0)
_SHARE: Range = (0.0, 1.0)
_POSITIVE: Range = (0.0, _INF)
_FIXED: Mapping[str, Range] = {
    op_name(op): own
    for own, ops in {
        _UNIT: (aten.sin, aten.cos, aten.tanh, aten.erf, aten.sign),
        _SHARE: (aten._softmax, aten._safe_softmax, aten.hardsigmoid),
        _POSITIVE: (aten.var, aten.std, aten.linalg_vector_norm, aten.norm),
        (0.0, 0.0): (aten.zeros, aten.new_zeros, aten.zeros_like, aten.zero),
        (1.0, 1.0): (aten.ones, aten.new_ones, aten.ones_like),
    }.items()
    for op in ops
}
_INCREASING: Mapping[OpOverloadPacket, Callable[[Tensor], Tensor]] = {
    aten.exp: torch.exp,
    aten.exp2: torch.exp2,
    aten.expm1: torch.expm1,
    aten.sigmoid: torch.sigmoid,
    aten.softplus: torch.nn.functional.softplus,
    aten.relu: torch.relu,
    aten.sqrt: torch.sqrt,
    aten.log1p: torch.log1p,
    aten.log: torch.log,
}
_MONOTONE = {op_name(op): function for op, function in _INCREASING.items()}
_NEVER_ZERO = frozenset(map(op_name, (aten.exp, aten.exp2, aten.sigmoid, aten.softplus)))
_KEPT = frozenset(map(op_name, (aten.cummax, aten.cummin)))
_COMBINED: Mapping[str, Callable[[OpCall, Ranges], Range]] = {
    op_name(op): combine
    for combine, ops in {
        _sum: (aten.add, aten.sub, aten.rsub),
        _multiplied: (aten.mul,),
        _divided: (aten.div,),
        _reciprocal: (aten.reciprocal,),
        _squared: (aten.square,),
        _size: (aten.abs,),
        _power: (aten.pow,),
        _clamped: (aten.clamp, aten.clamp_min, aten.clamp_max),
        _larger: (aten.maximum, aten.minimum),
    }.items()
    for op in ops
}
