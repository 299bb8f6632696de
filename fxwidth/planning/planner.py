"""Choosing widths: by each group's own spectrum, or all together under a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from fxwidth.axes.factors import Factor
from fxwidth.axes.polynomials import Polynomial
from fxwidth.costs.budget import Bound, bounds_of, growth_factor, out_of_reach
from fxwidth.costs.registry import cost_polynomial
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph, refuse_other_than_groups
from fxwidth.importance.estimates import Evidence, gather_evidence, spectral_errors
from fxwidth.importance.loss_sensitivity import calibrated
from fxwidth.importance.plan_simulation import has_inputs, output_errors
from fxwidth.modules.probing import module_holdings
from fxwidth.options import PlanKeywords, PlanOptions, options_from, tells_options
from fxwidth.planning.allocation import Choice, allocate
from fxwidth.planning.constraints import Class, Limits, chosen_groups, classes, tied_classes
from fxwidth.planning.thresholds import by_thresholds
from fxwidth.planning.width_multiplier import multiplied
from fxwidth.plans import BEFORE, FOR_MODULE, Plan
from fxwidth.rewriting.looks import looking_at
from fxwidth.runtime.finiteness import refuse_nan
from fxwidth.selection.error_curves import Errors, extended
from fxwidth.weights.readers import wiring_of

__all__ = ["Plan", "plan"]

# By which factor the outputs of a plan must be nearer for it to be preferred to that of least summed error.
_CLEARLY = 0.5


@tells_options(PlanOptions)
def plan(width_graph: WidthGraph, **options: Unpack[PlanKeywords]) -> Plan:
    """Choose new widths.

    Under a budget, all widths are chosen together such that its bounds are met, and readers keep as much of what they
    read as can be found. Where it allows more than the present cost, all groups grow by one factor; where it leaves no
    room for that, channels that bring next to nothing make room for others, by what the last ones of each group bring.
    Without one, each group goes by the singular spectrum of its writers: it shrinks while the tail of the singular
    values holds less than `shrink_energy` of their sum, and grows by `grow_step` when the smallest one times the width
    exceeds `grow_energy` of the sum.

    Args:
        width_graph: the groups, from `fxwidth.analyze`.
        budget: what the network may cost.
        params: short for `budget=Budget(params=...)`.
        data: under a budget, batches that begin with the graph's inputs, from which to see what readers read; without
            them, that is estimated from the weights and batch norm statistics, and plans are tried out on noise.
        loss: called with the output and what follows the inputs in a batch; errors then are in its unit, each group's
            brought there by probes on the first batches.
        selection: under a budget, the method by which channels are to be chosen, or a function that scores them, as for
            `fxwidth.resize`.
        shrink_energy: in [0, 1); 0 for no shrinking.
        grow_energy: in [0, 1]; a flat spectrum has 1, one with a zero singular value 0.
        grow_step: channels to add; 0 for no growing.
        min_width: no group shrinks below this.
        max_width: no group stays or grows above this.
        align: new widths are rounded up to multiples of this.
        same_width: a pattern (fnmatch) whose groups get one width, or a list of such, each a pattern or a list of
            patterns: `[["a", "b"], "c.*"]` is one width for a and b, and one for all in c.
        only: names or patterns of the groups that may change.
        keep: names or patterns of groups that must not.
        for_module: a module of the class that was traced, which is to hold the new widths (`fxwidth.write_back`): the
            model itself, a fresh one, or one on the meta device. Groups for which its code or its configuration has one
            number get widths that this can tell, and those that it cannot hold otherwise stay; that is learnt by
            probing it, and told in `notes["for_module"]`.
        exact: whether groups that cannot grow without changing the function are left alone, or may but shrink.
        rotate: under a budget, whether linear groups are to be brought to the basis of their spectrum, as
            `fxwidth.resize` does by default; their errors are smaller then.

    Returns:
        A plan that names only groups whose width changes. `notes["parameters"]` is the count before and after,
        `notes["cost"]` that and the flops and whatever the budget bounds, `notes["error"]` the predicted error,
        `notes["errors"]` each group's part in it, `notes["evidence"]` what it was predicted from, and
        `notes["before"]` the present width of each group. `print` it for a table.

    Raises:
        FxwidthError: an option is out of range, a pattern matches no group, options contradict each other, the
            budget is out of reach, a parameter holds NaN or infinity, or no groups were passed.

    Source: the thresholds are those of J. Dejaegher, SVD evolutive CNN (2021).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> dict(fxwidth.plan(fxwidth.analyze(gm), params=0.5))
        {'0': 7}
    """
    return plan_with_evidence(width_graph, options_from(PlanOptions, options))[0]


def plan_with_evidence(width_graph: WidthGraph, options: PlanOptions) -> tuple[Plan, Evidence | None]:
    """Return the plan that `plan` makes, and the evidence that it was made from; None without a budget.

    Raises:
        FxwidthError: as for `plan`, but for options, which have been checked.
    """
    refuse_other_than_groups(width_graph)
    refuse_nan(width_graph.analysis.module)
    found, evidence = looking_at(width_graph.analysis.module, lambda: _planned(width_graph, options))
    if options.for_module is not None:
        found.notes[FOR_MODULE] = module_holdings(width_graph, options.for_module).told()
    return found, evidence


def _planned(width_graph: WidthGraph, options: PlanOptions) -> tuple[Plan, Evidence | None]:
    units = _units(width_graph, options)
    if options.target is not None:
        widths, bounds, errors, evidence = _BudgetProblem(width_graph, units, options).solved(options)
        return _noted(width_graph, _settled(width_graph, widths, options), bounds, errors, evidence), evidence
    widths = {group: width for unit in units for group, width in by_thresholds(width_graph, unit, options).items()}
    widths = _settled(width_graph, widths, options)
    errors = {g: spectral_errors(width_graph, g) for g, width in widths.items() if width < g.width}
    return _noted(width_graph, widths, [], errors, None), None


def _settled(
    width_graph: WidthGraph, widths: Mapping[ChannelGroup, int], options: PlanOptions
) -> dict[ChannelGroup, int]:
    """Return widths that a module can hold for which the plan is: those given, or somewhat smaller ones.

    Raises:
        FxwidthError: it can hold none near these.
    """
    if options.for_module is None:
        return dict(widths)
    held = module_holdings(width_graph, options.for_module)
    limits = Limits.of(options)
    settled = held.settled(
        {group.name: width for group, width in widths.items()},
        lambda name, width: width in limits.allowed(width_graph[name], width),
    )
    return {group: settled[group.name] for group in widths}


def refuse_impossible(width_graph: WidthGraph, options: PlanOptions) -> None:
    """Check that options fit the groups, and that the budget, if there is one, can be met at all.

    Raises:
        FxwidthError: they do not, or it cannot.
    """
    units = _units(width_graph, options)
    if options.target is not None:
        _BudgetProblem(width_graph, units, options).refuse_out_of_reach()


def _units(width_graph: WidthGraph, options: PlanOptions) -> list[Class]:
    chosen = chosen_groups(width_graph, options.only, options.keep)
    if options.for_module is None:
        return classes(width_graph, chosen, options.same_width)
    held = module_holdings(width_graph, options.for_module)
    return tied_classes(width_graph, chosen, options.same_width, held)


def _held_by_module(width_graph: WidthGraph, options: PlanOptions) -> dict[str, str]:
    """Return the groups that may change but for the module which is to hold the widths, and why they stay there."""
    if options.for_module is None:
        return {}
    held = module_holdings(width_graph, options.for_module)
    chosen = {group.name for group in chosen_groups(width_graph, options.only, options.keep)}
    told = {name: f"{type(options.for_module).__name__} holds it: {why}" for name, why in held.staying.items()}
    found = {**held.bound(chosen - held.staying.keys()), **told}
    return {name: why for name, why in found.items() if name in chosen}


class _BudgetProblem:
    """Widths to be found for groups, some of them together, within bounds on costs."""

    def __init__(self, width_graph: WidthGraph, units: Sequence[Class], options: PlanOptions) -> None:
        assert options.target is not None
        self._width_graph = width_graph
        self.bounds = bounds_of(width_graph, options.target)
        self._groups = [group for unit in units for group in unit.groups]
        self._why = _held_by_module(width_graph, options)
        limits, growing = Limits.of(options), self._may_grow(units, options)
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

    def solved(
        self, options: PlanOptions
    ) -> tuple[dict[ChannelGroup, int], Sequence[Bound], Mapping[ChannelGroup, Errors], Evidence | None]:
        """Return the widths of least summed error, the bounds, the errors, and the evidence that these were made from.

        Raises:
            FxwidthError: a bound is out of reach, or the data or the loss cannot be used.
        """
        largest = self._at(-1)
        if all(bound.met(_by_factor(largest)) for bound in self.bounds):
            errors = {g: spectral_errors(self._width_graph, g) for g, width in largest.items() if width < g.width}
            return largest, self.bounds, errors, None
        if grown := self._grown():
            return grown, self.bounds, {}, None
        self.refuse_out_of_reach()
        evidence, errors = calibrated(
            self._width_graph, self._groups, options.data, options.loss, options.selection, options.rotate
        )
        widths = self._rehearsed(evidence, errors)
        if all(bound.met({}) for bound in self.bounds) and all(width <= g.width for g, width in widths.items()):
            # Channels go only to make room for others.
            widths = {group: group.width for group in widths}
        return widths, self.bounds, errors, evidence

    def refuse_out_of_reach(self) -> None:
        """Check that the smallest widths meet all bounds.

        Raises:
            FxwidthError: they do not; it tells how far down the cost can go, and what holds it up.
        """
        smallest = _by_factor(self._smallest)
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

    def _rehearsed(self, evidence: Evidence, errors: Mapping[ChannelGroup, Errors]) -> dict[ChannelGroup, int]:
        """Return the widths of least summed error, or those of another sum if they do far better on noise.

        What the readers of one group miss is the same, and in some networks it adds up; no reader's error tells.
        """
        widths = self._allocated(errors)
        if not has_inputs(evidence):
            return widths
        weighted_fan_out = wiring_of(self._width_graph).weighted_fan_out
        weighted = {
            group: errors[group] * max(1.0, weighted_fan_out.get(group.factor, 0.0)) ** 0.5 for group in self._groups
        }
        other = self._allocated(weighted)
        if other == widths:
            return widths
        error, other_error = output_errors(evidence, [widths, other])
        return other if other_error < _CLEARLY * error else widths

    def _joined(self, bound: Bound) -> Polynomial:
        heads = {factor: head for factor, head in self._heads.items() if factor is not head}
        return bound.cost.replaced(heads, self._ratios)


def _by_factor(widths: Mapping[ChannelGroup, int]) -> dict[Factor, int]:
    return {group.factor: width for group, width in widths.items()}


def _noted(
    width_graph: WidthGraph,
    widths: Mapping[ChannelGroup, int],
    bounds: Iterable[Bound],
    errors: Mapping[ChannelGroup, Errors],
    evidence: Evidence | None,
) -> Plan:
    """Return the plan with what it costs and what it is predicted to lose."""
    costs = {name: cost_polynomial(width_graph, name) for name in ("params", "flops")}
    costs |= {bound.name: bound.cost for bound in bounds}
    changed = {group: width for group, width in widths.items() if width != group.width}
    narrowed = {group: width for group, width in changed.items() if width < group.width and group in errors}
    parts = {group.name: float(errors[group][width]) for group, width in narrowed.items()}
    cost = {name: [polynomial({}), polynomial(_by_factor(widths))] for name, polynomial in costs.items()}
    source = evidence.moments.source if evidence is not None and evidence.moments is not None else None
    notes: dict[str, Any] = {"parameters": cost["params"], "cost": cost, "error": sum(parts.values()), "errors": parts}
    notes |= {"evidence": source, BEFORE: {group.name: group.width for group in changed}}
    return Plan({group.name: width for group, width in changed.items()}, notes)


def width_errors(width_graph: WidthGraph, group: ChannelGroup) -> Errors:
    """Return the predicted error of every width of a group from none to all, without data, [width + 1]."""
    return gather_evidence(width_graph, None, rotates=True).errors(group)
