"""Choosing widths: by each group's own spectrum, or all together under a budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Unpack

from fxwidth.costs.budget import Bound
from fxwidth.costs.registry import cost_polynomial
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph, refuse_other_than_groups
from fxwidth.importance.estimates import Evidence, gather_evidence, spectral_errors
from fxwidth.importance.loss_sensitivity import calibrated
from fxwidth.importance.plan_simulation import Rehearsals, has_inputs
from fxwidth.modules.probing import module_holdings
from fxwidth.option_keywords import PlanKeywords
from fxwidth.options import PlanOptions, options_from, tells_options
from fxwidth.planning.budget_problem import BudgetProblem, by_factor
from fxwidth.planning.constraints import Class, Limits, classes, tied_classes
from fxwidth.planning.group_choice import chosen_groups
from fxwidth.planning.measured_budgets import as_measured
from fxwidth.planning.thresholds import by_thresholds
from fxwidth.planning.uniform_ratio import by_ratio
from fxwidth.plans import BEFORE, FOR_MODULE, MEASURED, Plan
from fxwidth.rewriting.looks import looking_at
from fxwidth.runtime.finiteness import refuse_nan
from fxwidth.selection.error_curves import Errors
from fxwidth.work_progress import Progress, each, listening, tell

__all__ = ["Plan", "plan"]

_LOGGER = logging.getLogger(__name__)


@tells_options(PlanOptions)
def plan(width_graph: WidthGraph, *, progress: Progress = True, **options: Unpack[PlanKeywords]) -> Plan:
    """Choose new widths.

    Under a budget, all widths are chosen together such that its bounds are met, and readers keep as much of what they
    read as can be found. Where it allows more than the present cost, all groups grow by one factor; where it leaves no
    room for that, channels that bring next to nothing make room for others, by what the last ones of each group bring.
    With a ratio, each group keeps that part of its channels. Without either, each group goes by the singular spectrum
    of its writers: it shrinks while the tail of the singular values holds less than `shrink_energy` of their sum, and
    grows by `grow_step` when the smallest one times the width exceeds `grow_energy` of the sum.

    Args:
        width_graph: the groups, from `fxwidth.analyze`.
        budget: what the network may cost.
        params: short for `budget=Budget(params=...)`; together with the next three for one budget of several bounds.
        flops: likewise.
        activation_memory: likewise.
        latency: likewise.
        data: under a budget, batches that begin with the graph's inputs, from which to see what readers read; without
            them, that is estimated from the weights and batch norm statistics, and plans are tried out on noise.
        loss: called with the output and what follows the inputs in a batch; errors then are in its unit, each group's
            brought there by probes on the first batches.
        selection: under a budget, the method by which channels are to be chosen, or a function that scores them, as for
            `fxwidth.resize`.
        shrink_energy: in [0, 1); 0 for no shrinking.
        grow_energy: in [0, 1]; a flat spectrum has 1, one with a zero singular value 0.
        grow_step: channels to add; 0 for no growing.
        ratio: in the place of a budget, the part of its channels that every group keeps, as near as limits allow; above
            1 groups grow.
        min_width: no group shrinks below this; a float, such as 0.1, is a part of the width that the group had before
            all resizes.
        max_width: no group stays or grows above this.
        align: new widths are rounded up to multiples of this.
        same_width: a pattern (fnmatch) whose groups get one width, or a list of such, each a pattern or a list of
            patterns: `[["a", "b"], "c.*"]` is one width for a and b, and one for all in c.
        only: names of the groups that may change, patterns (fnmatch) such as "layer1.*", or folded names of repeated
            blocks such as "layers.0..3.fc", as tables show them; or modules, of the model or the graph, which stand for
            the groups that they write.
        keep: likewise of groups that must not.
        within: paths or patterns of modules, such as "layer3" or "blocks.1?", or modules: groups may change that occur
            in these alone, so that what is outside stays as it is.
        for_module: a module of the class that was traced, which is to hold the new widths (`fxwidth.write_back`): the
            model itself, a fresh one, or one on the meta device. Groups for which its code or its configuration has one
            number get widths that this can tell, and those that it cannot hold otherwise stay; that is learnt by
            probing it, and told in `notes["for_module"]`.
        exact: whether groups that cannot grow without changing the function are left alone, or may but shrink.
        rotate: under a budget, whether linear groups are to be brought to the basis of their spectrum, as
            `fxwidth.resize` does by default; their errors are smaller then.
        progress: whether to show in a terminal, or else to log, after a second, how far the work has come; or a
            function that is called with a `ProgressUpdate` each time. An exception of it ends the work as Ctrl-C does.

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
    checked = options_from(PlanOptions, options)
    return listening(progress, lambda: plan_with_evidence(width_graph, checked)[0])


def plan_with_evidence(width_graph: WidthGraph, options: PlanOptions) -> tuple[Plan, Evidence | None]:
    """Return the plan that `plan` makes, and the evidence that it was made from; None without a budget.

    Raises:
        FxwidthError: as for `plan`, but for options, which have been checked.
    """
    return plans_with_evidence(width_graph, [options])[0]


def plans_with_evidence(width_graph: WidthGraph, asked: Sequence[PlanOptions]) -> list[tuple[Plan, Evidence | None]]:
    """Return the plans of options that differ in their budgets alone, from one look at the graph.

    Raises:
        FxwidthError: as for `plan`, but for options, which have been checked.
    """
    refuse_other_than_groups(width_graph)
    refuse_nan(width_graph.analysis.module)
    found = looking_at(width_graph.analysis.module, lambda: _planned(width_graph, asked))
    for (made, _), options in zip(found, asked, strict=True):
        if options.for_module is not None:
            made.notes[FOR_MODULE] = module_holdings(width_graph, options.for_module).told()
        before, after = made.notes["parameters"]
        _LOGGER.info("planned new widths for %d groups: %d -> %d parameters", len(made), before, after)
    return found


def _planned(width_graph: WidthGraph, asked: Sequence[PlanOptions]) -> list[tuple[Plan, Evidence | None]]:
    units = _units(width_graph, asked[0])
    if asked[0].target is not None:
        return _under_budgets(width_graph, units, asked)
    return [(_by_spectra(width_graph, units, options), None) for options in asked]


def _by_spectra(width_graph: WidthGraph, units: Sequence[Class], options: PlanOptions) -> Plan:
    widths: dict[ChannelGroup, int] = {}
    way = by_thresholds if options.ratio is None else by_ratio
    for unit in each(units, "looking at spectra"):
        widths |= way(width_graph, unit, options)
    widths = _settled(width_graph, widths, options)
    errors = {g: spectral_errors(width_graph, g) for g, width in widths.items() if width < g.width}
    return _noted(width_graph, widths, [], errors, None)


def _under_budgets(
    width_graph: WidthGraph, units: Sequence[Class], asked: Sequence[PlanOptions]
) -> list[tuple[Plan, Evidence | None]]:
    problems = [_problem(width_graph, units, options) for options in asked]
    # What is out of reach is refused before the data are looked at.
    for problem in problems:
        problem.at_hand()

    @cache
    def looked() -> tuple[Evidence, dict[ChannelGroup, Errors], Rehearsals | None]:
        groups, first = [group for unit in units for group in unit.groups], asked[0]
        evidence, errors = calibrated(width_graph, groups, first.data, first.loss, first.selection, first.rotate)
        return evidence, errors, Rehearsals(evidence) if has_inputs(evidence) else None

    result: list[tuple[Plan, Evidence | None]] = []
    for problem, options in each(list(zip(problems, asked, strict=True)), "choosing widths"):
        choose = partial(_chosen_at, width_graph, units, options, problem, looked)
        target, told = options.target, dict[str, Any]()
        if target is not None and target.measure is not None:
            found, told[MEASURED] = as_measured(width_graph, target, choose, _widths_of)
        else:
            found = choose(1.0)
        made = _noted(width_graph, found.widths, problem.bounds, found.errors, found.evidence)
        made.notes.update(told)
        result.append((made, found.evidence))
    return result


@dataclass(frozen=True)
class _Chosen:
    """Widths with the errors that they were chosen by, and the evidence for these; None where there was no choice."""

    widths: Mapping[ChannelGroup, int]
    errors: Mapping[ChannelGroup, Errors]
    evidence: Evidence | None


def _widths_of(chosen: _Chosen) -> Mapping[ChannelGroup, int]:
    return chosen.widths


def _chosen_at(
    width_graph: WidthGraph,
    units: Sequence[Class],
    options: PlanOptions,
    problem: BudgetProblem,
    looked: Callable[[], tuple[Evidence, dict[ChannelGroup, Errors], Rehearsals | None]],
    of_latency: float,
) -> _Chosen:
    """Return the widths for a share of the bound on latency; those of the whole bound solve the given problem."""
    if of_latency != 1:
        problem = _problem(width_graph, units, options, of_latency)
    ready = problem.at_hand()
    if ready is not None:
        return _Chosen(_settled(width_graph, ready[0], options), ready[1], None)
    evidence, errors, rehearsals = looked()
    widths = problem.chosen(errors, rehearsals)
    return _Chosen(_settled(width_graph, widths, options), errors, evidence)


def _problem(
    width_graph: WidthGraph, units: Sequence[Class], options: PlanOptions, of_latency: float = 1.0
) -> BudgetProblem:
    return BudgetProblem(width_graph, units, options, _held_by_module(width_graph, options), of_latency)


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
    limits = Limits.of(options, width_graph)
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
        _problem(width_graph, units, options).refuse_out_of_reach()


def _chosen(width_graph: WidthGraph, options: PlanOptions) -> list[ChannelGroup]:
    return chosen_groups(width_graph, options.only, options.keep, options.within)


def _units(width_graph: WidthGraph, options: PlanOptions) -> list[Class]:
    chosen = _chosen(width_graph, options)
    if options.for_module is None:
        return classes(width_graph, chosen, options.same_width)
    tell("probing the module")
    held = module_holdings(width_graph, options.for_module)
    return tied_classes(width_graph, chosen, options.same_width, held)


def _held_by_module(width_graph: WidthGraph, options: PlanOptions) -> dict[str, str]:
    """Return the groups that may change but for the module which is to hold the widths, and why they stay there."""
    if options.for_module is None:
        return {}
    held = module_holdings(width_graph, options.for_module)
    chosen = {group.name for group in _chosen(width_graph, options)}
    told = {name: f"{type(options.for_module).__name__} holds it: {why}" for name, why in held.staying.items()}
    found = {**held.bound(chosen - held.staying.keys()), **told}
    return {name: why for name, why in found.items() if name in chosen}


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
    cost = {name: [polynomial({}), polynomial(by_factor(widths))] for name, polynomial in costs.items()}
    source = evidence.moments.source if evidence is not None and evidence.moments is not None else None
    notes: dict[str, Any] = {"parameters": cost["params"], "cost": cost, "error": sum(parts.values()), "errors": parts}
    notes |= {"evidence": source, BEFORE: {group.name: group.width for group in changed}}
    return Plan({group.name: width for group, width in changed.items()}, notes)


def width_errors(width_graph: WidthGraph, group: ChannelGroup) -> Errors:
    """Return the predicted error of every width of a group from none to all, without data, [width + 1]."""
    return gather_evidence(width_graph, None, rotates=True).errors(group)
