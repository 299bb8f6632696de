"""The plans of many budgets from one look at a network: what each would cost, and lose."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import fx

from fxwidth.costs.budget import SHORTHANDS, Budget
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph, refuse_other_than_groups
from fxwidth.importance.estimates import Evidence
from fxwidth.matplotlib_figures import new_axes, refuse_other_pictures, save_figure
from fxwidth.option_keywords import PlanKeywordsBesideBudget
from fxwidth.options import PlanOptions, ResizeOptions, options_from, tells_options
from fxwidth.plain_numbers import plain_number
from fxwidth.planning.planner import plans_with_evidence
from fxwidth.plans import Plan
from fxwidth.resizing.resize import resize_analyzed
from fxwidth.statistics.calibration_data import replayed
from fxwidth.tables import Table
from fxwidth.tracing.analyze import analyze_module
from fxwidth.work_progress import Progress, each, listening

Bounds = Sequence[int | float] | int | float
Evaluate = Callable[[fx.GraphModule], Any]


@dataclass(frozen=True)
class Frontier:
    """The plans of several budgets; `print` it for a table.

    Attributes:
        budgets: what was asked for.
        plans: the plan of each, with its costs and predicted error in its notes.
        measured: what `evaluate` gave of the network resized to each; None where nothing was measured.
        present: what it gave of the network as it is.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> found = fxwidth.frontier(fxwidth.analyze(gm), params=[0.75, 0.5])
        >>> found
        <Frontier of 2 plans: 147 to 95 parameters>
        >>> [row["params"] for row in found.rows()]
        [147, 95]
    """

    budgets: tuple[Budget, ...]
    plans: tuple[Plan, ...]
    measured: tuple[float, ...] | None = None
    present: float | None = None

    def __repr__(self) -> str:
        counts = [row["params"] for row in self.rows()]
        told = f": {max(counts):,.0f} to {min(counts):,.0f} parameters" if counts else ""
        return f"<Frontier of {len(self.plans)} plans{told}{', measured' if self.measured is not None else ''}>"

    def __str__(self) -> str:
        """Return a table with a row for each budget."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict for each budget, fit for JSON.

        It has the budget by names of costs, each cost after the plan (params, flops, and what the budgets bound), the
        predicted error, what was measured, and the widths by group name.
        """
        measured = self.measured or (None,) * len(self.plans)
        return [
            {
                "budget": budget.bounds,
                **{name: after for name, (_, after) in plan.notes["cost"].items()},
                "error": plan.notes["error"],
                "measured": value,
                "widths": plan.widths,
            }
            for budget, plan, value in zip(self.budgets, self.plans, measured, strict=True)
        ]

    def table(self) -> Table:
        """Return a table with a row for each budget: costs, their shares of the present ones, and errors."""
        names = list(dict.fromkeys(name for plan in self.plans for name in plan.notes["cost"]))
        columns = ["budget", *(column for name in names for column in (name, "share")), "predicted error"]
        rows = []
        for budget, plan in zip(self.budgets, self.plans, strict=True):
            row = [", ".join(f"{name}={bound}" for name, bound in budget.bounds.items())]
            for name in names:
                before, after = plan.notes["cost"].get(name, (0, None))
                row += ["" if after is None else f"{after:,.0f}", f"{after / before:.1%}" if before else ""]
            rows.append([*row, f"{plan.notes['error']:.4g}"])
        sources = dict.fromkeys(plan.notes["evidence"] for plan in self.plans if plan.notes["evidence"])
        below = [f"errors predicted from {', '.join(sources)}"] if sources else []
        if self.measured is not None:
            columns.append("measured")
            rows = [[*row, f"{value:.4g}"] for row, value in zip(rows, self.measured, strict=True)]
            below.append(f"measured of the network as it is: {self.present:.4g}")
        return Table(tuple(columns), tuple(map(tuple, rows)), (), tuple(below))

    def to_json(self) -> str:
        """Return all of it as JSON text: the rows, and each plan as `Plan.from_json` takes it."""
        plans = [json.loads(plan.to_json()) for plan in self.plans]
        rows = [{**row, "plan": plan} for row, plan in zip(self.rows(), plans, strict=True)]
        return json.dumps({"present": self.present, "frontier": rows}, indent=2)

    def plot(self, path: str | Path | None = None, *, cost: str = "params") -> Any:
        """Draw what was measured over a cost, or the predicted error where nothing was.

        Args:
            path: a file to draw to: .svg, .png or .pdf.
            cost: the cost on the horizontal axis, by its name.

        Returns:
            The figure, a `matplotlib.figure.Figure`.

        Raises:
            FxwidthError: the plans do not tell of that cost, the path cannot be drawn to, or matplotlib is not
                installed.
        """
        refuse_other_pictures(path)
        if not self.plans or any(cost not in plan.notes["cost"] for plan in self.plans):
            known = ", ".join(map(repr, self.plans[0].notes["cost"])) if self.plans else "none"
            raise FxwidthError(f"cost={cost!r} is not known of every plan; known are {known}.")
        figure, axes = new_axes()
        at = [plan.notes["cost"][cost][1] for plan in self.plans]
        values = self.measured or tuple(plan.notes["error"] for plan in self.plans)
        pairs = sorted(zip(at, values, strict=True))
        axes.plot(*zip(*pairs, strict=True), marker="o")
        before = self.plans[0].notes["cost"][cost][0]
        axes.scatter([before], [self.present or 0.0], marker="s", color="0.4", label="as it is", zorder=3)
        axes.set(xlabel=cost, ylabel="measured" if self.measured is not None else "predicted error")
        axes.set_xlim(left=0)
        axes.legend()
        return save_figure(figure, path)


@tells_options(PlanOptions)
def frontier(
    width_graph: WidthGraph,
    *,
    params: Bounds | None = None,
    flops: Bounds | None = None,
    activation_memory: Bounds | None = None,
    latency: Bounds | None = None,
    budget: Budget | Sequence[Budget] | None = None,
    evaluate: Evaluate | None = None,
    progress: Progress = True,
    **options: Unpack[PlanKeywordsBesideBudget],
) -> Frontier:
    """Plan for many budgets from one look at a network: each plan is that of `fxwidth.plan` for its budget.

    The data are gone through once, and moments, spectra and sensitivities are taken once for all budgets. Without data,
    two runs of the network on noise are made for each budget besides, as `fxwidth.plan` makes them.

    Args:
        width_graph: the groups, from `fxwidth.analyze`.
        params: the bounds on parameters, one for each plan, as in `[0.9, 0.75, 0.5, 0.25]`.
        flops: those on operations, likewise; a number is for all plans, and lists go together place by place.
        activation_memory: those on bytes kept for the backward pass, likewise.
        latency: those on microseconds, likewise.
        budget: budgets, in the place of these.
        evaluate: called with a copy of the graph for each plan, resized by it as `fxwidth.resize` does with the same
            data, in the mode that the graph is in, and with one as it is; returns a number, such as the accuracy. It
            may train the copy.
        progress: whether to show in a terminal, or else to log, after a second, how far the work has come; or a
            function that is called with a `ProgressUpdate` each time. An exception of it ends the work as Ctrl-C does.
        options: those of `fxwidth.plan`.

    Raises:
        FxwidthError: an option or the data cannot be used, a budget is out of reach, lists differ in length, or
            `evaluate` returns no number; the graph is as it was.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> found = fxwidth.frontier(fxwidth.analyze(gm), params=[0.75, 0.5], flops=0.8)
        >>> [dict(plan) for plan in found.plans]
        [{'0': 11}, {'0': 7}]
        >>> x = torch.randn(64, 8)
        >>> found = fxwidth.frontier(fxwidth.analyze(gm), params=[0.5], evaluate=lambda gm: (gm(x) - net(x)).norm())
        >>> found.present, found.measured[0] > 0
        (0.0, True)
    """
    short = {"params": params, "flops": flops, "activation_memory": activation_memory, "latency": latency}
    budgets = _budgets(short, budget)
    if evaluate is not None and not callable(evaluate):
        raise FxwidthError(f"evaluate={evaluate!r} must be a function of the resized graph that returns a number.")
    options["data"] = replayed(options.get("data"))
    asked = [options_from(PlanOptions, {**options, "budget": one}) for one in budgets]
    refuse_other_than_groups(width_graph)

    def work() -> Frontier:
        found = plans_with_evidence(width_graph, asked)
        plans = tuple(plan for plan, _ in found)
        if evaluate is None:
            return Frontier(tuple(budgets), plans)
        present, *measured = _measured(width_graph.analysis.module, found, asked[0], evaluate)
        return Frontier(tuple(budgets), plans, tuple(measured), present)

    return listening(progress, work)


def _measured(
    module: fx.GraphModule, found: Sequence[tuple[Plan, Evidence | None]], planning: PlanOptions, evaluate: Evaluate
) -> Iterator[float]:
    """Yield what a function gives of a graph as it is, and resized by each plan."""
    for made in each([None, *found], "measuring"):
        own = copy.deepcopy(module) if made is None else _resized(module, *made, planning)
        # What the function does is not a part of this work.
        yield _number(listening(False, partial(evaluate, own)))


def _budgets(short: Mapping[str, Bounds | None], given: Budget | Sequence[Budget] | None) -> list[Budget]:
    """Return one budget for each plan.

    Raises:
        FxwidthError: there is none, there are two kinds, or lists differ in length.
    """
    bounds = {name: _listed(value) for name, value in short.items() if value is not None}
    if given is not None and bounds:
        raise FxwidthError(f"budget= and {next(iter(bounds))}= both bound the plans; put all bounds into the budgets.")
    if given is not None:
        budgets = [given] if isinstance(given, Budget) else list(given) if isinstance(given, Iterable) else [given]
        for one in budgets:
            if not isinstance(one, Budget):
                raise FxwidthError(f"budget= takes fxwidth.Budget, or a list of them, but received {one!r}.")
        if budgets:
            return budgets
    lengths = {name: len(value) for name, value in bounds.items() if isinstance(value, list)}
    if not lengths or 0 in lengths.values():
        names = ", ".join(f"{name}=" for name in SHORTHANDS)
        raise FxwidthError(f"a frontier needs bounds for each plan: a list for one of {names}, or budget=[...].")
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{count} in {name}=" for name, count in lengths.items())
        raise FxwidthError(f"bounds go together place by place, but there are {told}; give lists of one length.")
    count = next(iter(lengths.values()))
    rows = {name: value if isinstance(value, list) else [value] * count for name, value in bounds.items()}
    return [Budget(**{name: row[place] for name, row in rows.items()}) for place in range(count)]


def _listed(value: Any) -> Any:
    """Return a list of bounds as such, and a number as it is."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    return list(plain) if isinstance(plain, Iterable) and not isinstance(plain, (str, bytes)) else plain


def _resized(module: fx.GraphModule, plan: Plan, evidence: Evidence | None, planning: PlanOptions) -> fx.GraphModule:
    """Return a copy of a graph, resized by a plan from the evidence that this was made from."""
    own = copy.deepcopy(module)
    graph = WidthGraph(analyze_module(own))
    known = None
    if evidence is not None:
        # Moments are of ops by their places, and those of a copy are the same.
        known = Evidence(graph, evidence.moments, planning.selection, planning.rotate)
    options = ResizeOptions(
        data=planning.data, selection=planning.selection, rotate=planning.rotate, exact=planning.exact
    )
    resize_analyzed(graph, plan, options, evidence=known)
    return own


def _number(value: Any) -> float:
    plain = plain_number(value)
    if isinstance(plain, bool) or not isinstance(plain, (int, float)) or math.isnan(plain):
        raise FxwidthError(f"evaluate returned {value!r}; return one number, such as the accuracy.")
    return float(plain)
