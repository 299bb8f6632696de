"""Plans that meet a bound of latency as the user measures it: planned, measured, and planned anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fxwidth.costs.budget import Budget
from fxwidth.costs.measured_latency import measured_polynomial, microseconds_at
from fxwidth.errors import FxwidthError, warn
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph

# How often a plan is measured, and how near to the bound from below is near enough.
_ROUNDS, _NEAR = 5, 0.97
# What is too slow is aimed somewhat below the bound then.
_MARGIN = 0.99
_Found = TypeVar("_Found")


def as_measured(
    width_graph: WidthGraph,
    budget: Budget,
    choose: Callable[[float], _Found],
    widths_of: Callable[[_Found], Mapping[ChannelGroup, int]],
) -> tuple[_Found, dict[str, Any]]:
    """Return what is chosen such that the network takes no longer than a bound as it is measured, and what was.

    What is predicted is fitted to a few measurements; so what is chosen by it is measured too. Where it takes longer
    than the bound, or is much quicker, it is chosen anew for a bound that is lower or higher by as much, a few times.

    Args:
        width_graph: the graph.
        budget: it bounds the latency, and says how that is measured.
        choose: returns what is chosen for a share of the bound.
        widths_of: the widths of what is chosen.

    Raises:
        FxwidthError: nothing can be chosen, or the function that measures fails.
    """
    assert budget.measure is not None
    assert budget.latency is not None
    present = measured_polynomial(width_graph, budget.measure)({})
    limit = budget.latency if isinstance(budget.latency, int) else budget.latency * present
    share, tried, best = 1.0, list[float](), None
    for _ in range(_ROUNDS):
        try:
            found = choose(share)
        except FxwidthError:
            if best is None:
                raise
            break
        widths = {group.name: width for group, width in widths_of(found).items() if width != group.width}
        time = microseconds_at(width_graph, budget.measure, widths, "at the planned widths")
        tried.append(time)
        if best is None or _is_better(time, best[1], limit):
            best = found, time
        if _NEAR * limit <= time <= limit or (len(tried) > 1 and time == tried[-2]):
            break
        share *= limit / time * (_MARGIN if time > limit else 1.0)
    assert best is not None
    result, planned = best
    if planned > limit:
        warn(
            f"latency={budget.latency} was not met: the planned network takes {planned:,.1f} microseconds as measured, "
            f"where {limit:,.1f} are allowed, and so or longer do the others that were tried. Ask for less, or measure "
            "over more calls if times vary."
        )
    return result, {"present": present, "planned": planned, "limit": limit, "tried": tried}


def _is_better(time: float, other: float, limit: float) -> bool:
    """Tell whether a time is nearer to the limit, of those that meet it, or else nearer to meeting it."""
    if time <= limit:
        return other > limit or time > other
    return limit < time < other
