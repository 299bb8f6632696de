"""Growth under a budget: all widths times one factor."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from fxwidth.axes.factors import Factor
from fxwidth.costs.budget import Bound
from fxwidth.planning.constraints import Class


def multiplied(allowed: Mapping[Class, Sequence[int]], bounds: Sequence[Bound]) -> dict[Class, int] | None:
    """Return the widths that are the largest multiple of the present ones within some bounds; None where none is.

    What a channel more would bring is not known before it is trained, and estimates of it feed some groups and starve
    the others: so all grow alike, and what the factor leaves of the budget goes to those that are furthest behind it.

    Args:
        allowed: the widths that groups may take, ascending; those that may not grow have no larger one.
        bounds: on costs, which grow with the widths.

    Source: the width multiplier of A. Gordon et al., MorphNet: Fast & Simple Resource-Constrained Structure Learning of
        Deep Networks (2018), which grows back by it what has been shrunk.
    """
    growing = {unit: _not_below(unit, widths) for unit, widths in allowed.items()}
    ratios = sorted({width / _present(unit) for unit, widths in growing.items() for width in widths})
    if not ratios or not _met(bounds, _at(growing, ratios[0])):
        return None
    low, high = 0, len(ratios)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _met(bounds, _at(growing, ratios[middle])) else (low, middle)
    widths = _at(growing, ratios[low])
    following = {unit: _next(own, widths[unit]) for unit, own in growing.items()}
    for unit in sorted(growing, key=lambda unit: following[unit] / _present(unit)):
        more = {**widths, unit: following[unit]}
        if _met(bounds, more):
            widths = more
    return widths


def _present(unit: Class) -> int:
    return unit.present


def _not_below(unit: Class, widths: Sequence[int]) -> list[int]:
    """Return those of some widths at which no group of a class loses channels, or the widest."""
    return [width for width in widths if width >= _present(unit)] or [widths[-1]]


def _at(growing: Mapping[Class, Sequence[int]], ratio: float) -> dict[Class, int]:
    """Return for each class the largest width up to its present one times a ratio, or its smallest."""
    return {
        unit: widths[max(0, bisect_right(widths, ratio * _present(unit) * (1 + 1e-9)) - 1)]
        for unit, widths in growing.items()
    }


def _next(widths: Sequence[int], width: int) -> int:
    return widths[min(bisect_right(widths, width), len(widths) - 1)]


def _met(bounds: Iterable[Bound], widths: Mapping[Class, int]) -> bool:
    by_factor: dict[Factor, int] = {
        group.factor: own for unit, width in widths.items() for group, own in unit.of_groups(width).items()
    }
    return all(bound.met(by_factor) for bound in bounds)
