"""How long a forward pass takes where the user measures it: on another device, or in another run time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import fx

from fxwidth.axes.factors import Factor
from fxwidth.axes.polynomials import Polynomial
from fxwidth.costs.counts import call_flops
from fxwidth.costs.latency import SHARES, nonnegative_fit, traffic
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.plain_numbers import plain_number
from fxwidth.runtime.process_groups import ranks_at_work
from fxwidth.work_progress import each, listening

# Given a graph that is resized to some widths, how many seconds it takes.
Measure = Callable[[fx.GraphModule], float]
# A copy of a graph, with other widths by the names of groups.
Resized = Callable[[fx.GraphModule, Mapping[str, int]], fx.GraphModule]
_MICROSECONDS = 1e6
_RESIZED: list[Resized] = []


def gives_copies(function: Resized) -> Resized:
    """Have copies of other widths made by a function: resizes know costs, and not the other way round."""
    _RESIZED[:] = [function]
    return function


def measured_polynomial(width_graph: WidthGraph, measure: Measure) -> Polynomial:
    """Return the microseconds of a forward pass, fitted to what a function measures.

    Copies of the network with all free widths at 100, 75, 50 and 25 % are measured. The time is taken to be a constant,
    plus so much per floating-point operation, plus so much per byte that ops read and write, none of them negative,
    and is scaled so that it agrees with what was measured of the network as it is.

    Raises:
        FxwidthError: the function fails, or gives no time.

    Source: the form is that of `latency_polynomial`.
    """
    # By identity, which lasts as long as the function is kept beside what it has found.
    key = (measured_polynomial, id(measure))
    if key not in width_graph.memo:
        width_graph.memo[key] = measure, _fitted(width_graph, measure)
    found: Polynomial = width_graph.memo[key][1]
    return found


def microseconds_at(width_graph: WidthGraph, measure: Measure, widths: Mapping[str, int], which: str) -> float:
    """Return what a function measures of a copy of a graph with some widths: on rank 0, where several work together.

    Args:
        width_graph: the graph, which stays as it is.
        measure: called with the copy, in evaluation mode.
        widths: by the names of groups.
        which: what the copy is, as an error tells it.

    Raises:
        FxwidthError: the function fails, or gives no time.
    """
    own = _RESIZED[0](width_graph.analysis.module, widths)
    try:
        # What the function does is not a part of this work.
        given: Any = listening(False, partial(measure, own))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise FxwidthError(
            f"measure= failed on a copy of the graph {which}: {type(error).__name__}: {lines[0]}. It is called with a "
            "GraphModule in evaluation mode, and returns seconds."
        ) from error
    seconds = plain_number(given)
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not math.isfinite(seconds) or seconds <= 0:
        raise FxwidthError(
            f"measure= returned {given!r} for a copy of the graph {which}; return the seconds of one forward pass, a "
            "finite number above zero."
        )
    time, ranks = _MICROSECONDS * float(seconds), ranks_at_work()
    return time if ranks is None else ranks.first("a measured time", time)


def _fitted(width_graph: WidthGraph, measure: Measure) -> Polynomial:
    calls = width_graph.analysis.calls
    work = [
        Polynomial({(): 1}),
        Polynomial.sum((1, call_flops(width_graph, call)) for call in calls),
        Polynomial.sum((1, traffic(width_graph.analysis, call)) for call in calls),
    ]
    rows, times = [], []
    for share in each(SHARES, "measuring"):
        widths = {group: max(1, round(share * group.width)) for group in width_graph.free}
        by_factor: dict[Factor, int] = {group.factor: width for group, width in widths.items()}
        by_name = {group.name: width for group, width in widths.items() if width != group.width}
        rows.append([part(by_factor) for part in work])
        times.append(microseconds_at(width_graph, measure, by_name, f"at {share:.0%} of its widths"))
    rates = nonnegative_fit(np.array(rows, dtype=np.float64), np.array(times)).tolist()
    total = Polynomial.sum(zip(rates, work, strict=True))
    return Polynomial.sum([(times[0] / total({}), total)]) if total({}) > 0 else Polynomial({(): times[0]})
