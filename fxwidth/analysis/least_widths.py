"""Below which widths an op that reduces over channels has no result, or the same one for all inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Axis, Factor
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.recording.tape import OpCall

# A norm over one entry gives its bias or its sign, and a softmax gives one, whatever that entry is.
_OVER_ONE = ("layer norm", "RMS norm", "softmax", "group norm")


@dataclass(frozen=True)
class Least:
    """A least width, and why it is one."""

    width: int
    reason: str


@dataclass(frozen=True)
class _Demand:
    """How many entries an op must reduce over.

    Attributes:
        call: the op.
        axes: what it reduces over, all together.
        groups: into how many parts, each reduced alone, those are divided.
        count: how many entries each needs.
        kind: what it makes of them.
    """

    call: OpCall
    axes: tuple[Axis, ...]
    groups: Axis
    count: int
    kind: str

    def reason(self) -> str:
        """Say what the op needs."""
        return f"{self.kind} needs {self.count} entries ({self.call.place})"

    def entries(self, maps: IndexMaps) -> int:
        """Return how many entries there are in each part."""
        return prod(map(maps.size, self.axes)) // max(1, maps.size(self.groups))


def least_widths(analysis: Analysis) -> dict[Factor, Least]:
    """Return the least width of every factor that has one above one, the others at two or more."""
    result: dict[Factor, Least] = {}
    space = analysis.space
    # Most norms of a network go over the same few groups.
    demands = _demands(analysis)
    each_once = {(tuple(map(space.normalise, d.axes)), space.normalise(d.groups), d.count): d for d in demands}
    for demand in each_once.values():
        factors = {f for axis in demand.axes for f in analysis.space.factors(axis) if not f.is_batch}
        for factor in factors:
            others = {other: min(2, other.size) for other in factors if other is not factor}
            width = next(
                (w for w in range(1, factor.size) if _fits(analysis, demand, {**others, factor: w})), factor.size
            )
            if width > (result[factor].width if factor in result else 1):
                result[factor] = Least(width, demand.reason())
    return result


def why_too_narrow(analysis: Analysis, widths: Mapping[Factor, int]) -> str | None:
    """Return which op would reduce over too few entries at some new widths together, or None."""
    for demand in _demands(analysis):
        own = {f for axis in demand.axes for f in analysis.space.factors(axis)}
        if own & widths.keys() and not _fits(analysis, demand, widths):
            return demand.reason()
    return None


def _fits(analysis: Analysis, demand: _Demand, widths: Mapping[Factor, int]) -> bool:
    kept = {factor: np.arange(width) for factor, width in widths.items()}
    # What has too few entries as it is cannot become worse.
    needed = min(demand.count, demand.entries(IndexMaps(analysis.space, {})))
    return demand.entries(IndexMaps(analysis.space, kept)) >= needed


def _demands(analysis: Analysis) -> list[_Demand]:
    result = []
    for call in analysis.calls:
        reductions = [reduction for reduction in call.reductions if reduction.kind in ("variance", *_OVER_ONE)]
        if not reductions:
            continue
        axes = tuple(call.axes[reduction.tensor][reduction.dim] for reduction in reductions)
        kind = reductions[0].kind
        groups: Axis = call.output_axes[1][1] if kind == "group norm" else ((),)
        count = max(2, _correction(call) + 1) if kind == "variance" else 2
        result.append(_Demand(call, axes, groups, count, f"a {kind}"))
    return result


def _correction(call: OpCall) -> int:
    """Return what the op takes off the number of entries before it divides by it."""
    if "unbiased" in call.arguments:
        return int(bool(call.arguments["unbiased"]))
    given = call.arguments.get("correction")
    return 1 if given is None else int(given)
