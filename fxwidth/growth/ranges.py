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
from torch.utils import _pytree as pytree

from fxwidth.growth.states import CallView, State
from fxwidth.recording.tape import OpCall, tensors_in, unbind

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
    known = {id(tensor): points.reshape(-1) for tensor, points in zip(own, grid, strict=True)}
    count = grid[0].numel()

    def number(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = torch.float64 if leaf.dtype.is_floating_point else leaf.dtype
        beside = torch.full((count,), _BESIDE if leaf.dtype.is_floating_point else 1, dtype=dtype, device="cpu")
        return known.get(id(leaf), beside).clone()

    args, kwargs = unbind(call.func, {name: pytree.tree_map(number, value) for name, value in call.arguments.items()})
    results = [result for result in tensors_in(call.func(*args, **kwargs)) if result.numel() == count]
    return torch.stack([result.reshape(-1).isfinite() for result in results]).all(0)


def _is_one_interval(finite: Sequence[bool]) -> bool:
    """Tell whether points with a result lie next to each other: a mean of some is among them then."""
    return [key for key, _ in groupby(finite)].count(True) == 1


# -- what ranges become ------------------------------------------------------------------------------------------------


def result_range(call: OpCall, range_of: Ranges) -> Range:
    """Return where the new entries of an op's first result lie, from where those of its operands do."""
    name = call.name
    if name in _FIXED:
        return _FIXED[name]
    tensors = call.inputs
    if not tensors:
        return ANYTHING
    first = range_of(tensors[0])
    if name in _KEPT:
        return first
    if name in _MONOTONE:
        return _monotone(name, first)
    if name in _TOGETHER:
        ranges = [range_of(tensor) for tensor in tensors]
        return min(low for low, _ in ranges), max(high for _, high in ranges)
    combine = _COMBINED.get(name)
    return ANYTHING if combine is None else combine(call, range_of)


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
    if call.name == "rsub":
        one, other = other, one
    return _added(one, _product(other, (-alpha, -alpha) if call.name in ("sub", "rsub") else (alpha, alpha)))


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
    pick = max if call.name == "maximum" else min
    return pick(one[0], other[0]), pick(one[1], other[1])


_UNIT: Range = (-1.0, 1.0)
_SHARE: Range = (0.0, 1.0)
_POSITIVE: Range = (0.0, _INF)
_FIXED: Mapping[str, Range] = {
    **dict.fromkeys(("sin", "cos", "tanh", "erf", "sign", "softsign"), _UNIT),
    **dict.fromkeys(("_softmax", "_safe_softmax", "softmax", "hardsigmoid"), _SHARE),
    **dict.fromkeys(("var", "std", "linalg_vector_norm", "norm"), _POSITIVE),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like", "zero"), (0.0, 0.0)),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), (1.0, 1.0)),
    "relu6": (0.0, 6.0),
}
_MONOTONE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "relu": torch.relu,
    "sqrt": torch.sqrt,
    "log1p": torch.log1p,
    "log": torch.log,
}
_NEVER_ZERO = frozenset({"exp", "exp2", "sigmoid", "softplus"})
_KEPT = frozenset(
    {
        "clone", "detach", "alias", "_to_copy", "contiguous", "view", "_unsafe_view", "reshape", "permute", "transpose",
        "t", "expand", "repeat", "unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes", "unbind",
        "chunk", "flip", "roll", "mean", "amax", "amin", "_adaptive_avg_pool2d", "avg_pool2d", "adaptive_max_pool2d",
        "upsample_nearest2d", "unfold", "index", "index_select", "gather", "cummax", "cummin",
    }
)  # fmt: skip
_TOGETHER = frozenset({"cat", "stack"})
_COMBINED: Mapping[str, Callable[[OpCall, Ranges], Range]] = {
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    "mul": _multiplied,
    "div": _divided,
    "reciprocal": _reciprocal,
    "square": _squared,
    "abs": _size,
    "pow": _power,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamped),
    **dict.fromkeys(("maximum", "minimum"), _larger),
}
