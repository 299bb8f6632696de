"""Widths under a budget: what bounds allow, and which of it loses least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fxwidth.axes.factors import Factor
from fxwidth.axes.polynomials import Polynomial
from fxwidth.costs.budget import Bound, bounds_of, growth_factor, out_of_reach
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import spectral_errors
from fxwidth.importance.plan_simulation import Rehearsals
from fxwidth.options import PlanOptions
from fxwidth.planning.allocation import Choice, allocate
from fxwidth.planning.constraints import Class, Limits
from fxwidth.planning.width_multiplier import multiplied
from fxwidth.selection.error_curves import Errors, extended
from fxwidth.weights.readers import wiring_of

# By which factor the outputs of a plan must be nearer for it to be preferred to that of least summed error.
_CLEARLY = 0.5


class BudgetProblem:
    """Widths to be found for groups, some of them together, within bounds on costs."""

    def __init__(
        self,
        width_graph: WidthGraph,
        units: Sequence[Class],
        options: PlanOptions,
        why: Mapping[str, str],
        of_latency: float = 1.0,
    ) -> None:
        """Pose the problem that options pose.

        Args:
            width_graph: the groups.
            units: those that may change, some of them together.
            options: with a target.
            why: by group name, why it stays, of groups that are neither pinned nor left out by an option.
            of_latency: the share of the bound on latency that is to be met.
        """
        assert options.target is not None
        self._width_graph = width_graph
        self._why = why
        self.bounds = bounds_of(width_graph, options.target, of_latency)
        self._groups = [group for unit in units for group in unit.groups]
        limits, growing = Limits.of(options, width_graph), self._may_grow(units, options)
        factor = growth_factor(self.bounds, [group for unit in growing for group in unit.groups])
        self._allowed = {unit: unit.widths(limits, factor if unit in growing else 1.0) for unit in units}
        # Groups that go together are one to the solver: the first stands for all.
        self._heads = {group.factor: unit.groups[0].factor for unit in units for group in unit.groups}
        # Its width is that of the class then, of which those of the groups are multiples.
        self._ratios = {group.factor: float(n) for unit in units for group, n in unit.of_groups(1).items() if n != 1}

    def _may_grow(self, units: Sequence[Class], options: PlanOptions) -> list[Class]:
        """Return the units that may grow: none where a bound asks the network to shrink, nor any without a cost."""
        if any(not bound.met({}) for bound in self.bounds):
            return []
        return [
            unit
            for unit in units
            if not (options.exact and any(group.inexact_growth for group in unit.groups))
            and any(len(bound.cost.along(group.factor, {})) > 1 for bound in self.bounds for group in unit.groups)
        ]

    def _grown(self) -> dict[ChannelGroup, int]:
        """Return the widths at which all groups have grown alike; none where there is no room for that."""
        found = multiplied(self._allowed, self.bounds) or {}
        widths = {group: own for unit, width in found.items() for group, own in unit.of_groups(width).items()}
        return widths if any(width > group.width for group, width in widths.items()) else {}

    def at_hand(self) -> tuple[dict[ChannelGroup, int], dict[ChannelGroup, Errors]] | None:
        """Return widths and errors where the bounds leave no choice to evidence: the largest, or all grown alike.

        Raises:
            FxwidthError: a bound is out of reach.
        """
        largest = self._at(-1)
        if all(bound.met(by_factor(largest)) for bound in self.bounds):
            return largest, {
                g: spectral_errors(self._width_graph, g) for g, width in largest.items() if width < g.width
            }
        if grown := self._grown():
            return grown, {}
        self.refuse_out_of_reach()
        return None

    def chosen(self, errors: Mapping[ChannelGroup, Errors], rehearsals: Rehearsals | None) -> dict[ChannelGroup, int]:
        """Return the widths of least summed error.

        Args:
            errors: of every width of each group.
            rehearsals: where plans can be tried out; None where there is nothing to try them on.
        """
        widths = self._rehearsed(errors, rehearsals)
        if all(bound.met({}) for bound in self.bounds) and all(width <= g.width for g, width in widths.items()):
            # Channels go only to make room for others.
            return {group: group.width for group in widths}
        return widths

    def refuse_out_of_reach(self) -> None:
        """Check that the smallest widths meet all bounds.

        Raises:
            FxwidthError: they do not; it tells how far down the cost can go, and what holds it up.
        """
        smallest = by_factor(self._smallest)
        for bound in self.bounds:
            if not bound.met(smallest):
                raise FxwidthError(out_of_reach(self._width_graph, self._groups, smallest, bound, self._why))

    @property
    def _smallest(self) -> dict[ChannelGroup, int]:
        return self._at(0)

    def _at(self, place: int) -> dict[ChannelGroup, int]:
        pairs = (unit.of_groups(widths[place]).items() for unit, widths in self._allowed.items())
        return {group: width for one in pairs for group, width in one}

    def _allocated(self, errors: Mapping[ChannelGroup, Errors]) -> dict[ChannelGroup, int]:
        choices = []
        for unit, widths in self._allowed.items():
            units = zip(unit.groups, unit.each_unit, strict=True)
            curves = [extended(errors[g], n * widths[-1])[[n * width for width in widths]] for g, n in units]
            summed = sum(curves, np.zeros(len(widths)))
            choices.append(Choice(unit.groups[0].factor, np.array(widths), summed))
        result = allocate(choices, [(self._joined(bound), bound.limit) for bound in self.bounds])
        return {
            group: width
            for unit in self._allowed
            for group, width in unit.of_groups(result[unit.groups[0].factor]).items()
        }

    def _rehearsed(
        self, errors: Mapping[ChannelGroup, Errors], rehearsals: Rehearsals | None
    ) -> dict[ChannelGroup, int]:
        """Return the widths of least summed error, or those of another sum if they do far better on noise.

        What the readers of one group miss is the same, and in some networks it adds up; no reader's error tells.
        """
        widths = self._allocated(errors)
        if rehearsals is None:
            return widths
        weighted_fan_out = wiring_of(self._width_graph).weighted_fan_out
        weighted = {
            group: errors[group] * max(1.0, weighted_fan_out.get(group.factor, 0.0)) ** 0.5 for group in self._groups
        }
        other = self._allocated(weighted)
        if other == widths:
            return widths
        error, other_error = rehearsals.output_errors([widths, other])
        return other if other_error < _CLEARLY * error else widths

    def _joined(self, bound: Bound) -> Polynomial:
        heads = {factor: head for factor, head in self._heads.items() if factor is not head}
        return bound.cost.replaced(heads, self._ratios)


def by_factor(widths: Mapping[ChannelGroup, int]) -> dict[Factor, int]:
    """Return widths by the factors of groups, as costs take them."""
    return {group.factor: width for group, width in widths.items()}
