"""Budgets: how much of what a network may cost, and what holds it above that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxwidth.axes.factors import Factor
from fxwidth.axes.polynomials import Polynomial, entries_polynomial
from fxwidth.costs import activation_memory, latency  # noqa: F401  (register their costs)
from fxwidth.costs.counts import call_flops
from fxwidth.costs.measured_latency import Measure, measured_polynomial
from fxwidth.costs.registry import cost_polynomial, cost_unit
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.plain_numbers import plain_number
from fxwidth.weights.readers import wiring_of

# Those that are fields of a budget, and options of their own where a budget goes.
SHORTHANDS = ("params", "flops", "activation_memory", "latency")
# A float beyond this is a count that was meant to be an int.
_LARGEST_RATIO = 100


@dataclass(frozen=True)
class Budget:
    """What a network may cost: each bound an absolute int, or a float, its ratio to the present cost.

    A plan spends it: below the present cost groups shrink, above it they grow.

    Attributes:
        params: entries of the parameters, shared ones once.
        flops: floating-point operations of one forward pass on the example inputs, their whole batch, as
            `torch.utils.flop_counter` counts them.
        activation_memory: bytes that autograd keeps of one forward pass in training mode on the example inputs, as
            `torch.autograd.graph.saved_tensors_hooks` shows them; parameters and buffers are not counted.
        latency: microseconds of one forward pass in eval mode on the example inputs, predicted from times measured on
            the device that the parameters are on.
        costs: bounds on costs of your own, by the names that `fxwidth.cost` has registered them under.
        measure: with `latency`, a function by which to measure it where the network is to run, such as another device
            or run time: called with a copy of the graph at other widths, in evaluation mode, it returns the seconds of
            a forward pass. A plan is measured, and made anew if it misses the bound; `notes["measured"]` tells the
            times.

    Raises:
        FxwidthError: nothing is bounded, there is no such cost, a bound is out of range, or `measure` is no function.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> plan = fxwidth.plan(fxwidth.analyze(gm), budget=fxwidth.Budget(params=0.5, flops=0.6))
        >>> dict(plan)
        {'0': 7}
    """

    params: int | float | None = None
    flops: int | float | None = None
    activation_memory: int | float | None = None
    latency: int | float | None = None
    costs: Mapping[str, int | float] = field(default_factory=dict, hash=False)
    measure: Measure | None = None

    def __post_init__(self) -> None:
        _check_own(self.costs)
        for name in SHORTHANDS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        object.__setattr__(self, "costs", {name: plain_number(bound) for name, bound in self.costs.items()})
        if not self.bounds:
            names = ", ".join(f"{name}=" for name in (*SHORTHANDS, "costs"))
            raise FxwidthError(f"a budget bounds at least one of {names}")
        for name, value in self.bounds.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise FxwidthError(f"{name}={value!r} must be an int, the count to reach, or a float, its ratio.")
            if isinstance(value, float) and not 0 < value <= _LARGEST_RATIO:
                raise FxwidthError(
                    f"{name}={value} as a ratio of the present cost must lie in (0, {_LARGEST_RATIO}]; give an int for "
                    "an absolute count."
                )
            if isinstance(value, int) and value < 1:
                raise FxwidthError(f"{name}={value} must be at least 1.")
        if self.measure is not None and not callable(self.measure):
            raise FxwidthError(
                f"measure={self.measure!r} must be a function of a graph that returns the seconds of a forward pass."
            )
        if self.measure is not None and self.latency is None:
            raise FxwidthError("measure= measures latency; give latency= too, or leave it out.")

    @classmethod
    def of(cls, bounds: Mapping[str, int | float]) -> Budget:
        """Return the budget of some bounds, by the names of costs."""
        own = {name: bound for name, bound in bounds.items() if name not in SHORTHANDS}
        short: dict[str, Any] = {name: bound for name, bound in bounds.items() if name in SHORTHANDS}
        return cls(**short, costs=own)

    @property
    def bounds(self) -> dict[str, int | float]:
        """The bounds that are set, by name."""
        own = {name: getattr(self, name) for name in SHORTHANDS}
        return {name: value for name, value in {**own, **self.costs}.items() if value is not None}


@dataclass(frozen=True)
class Bound:
    """One cost of a network and what it may be at most.

    Attributes:
        name: the option of `Budget`.
        given: what the user gave.
        cost: the cost in the unit of `Budget`.
        limit: the largest value allowed.
    """

    name: str
    given: int | float
    cost: Polynomial
    limit: float

    def met(self, widths: Mapping[Factor, int]) -> bool:
        """Tell whether a network of some widths stays within the bound."""
        return self.cost(widths) <= self.limit


def _check_own(costs: Any) -> None:
    if not isinstance(costs, Mapping):
        raise FxwidthError(f"costs={costs!r} must be a dict of bounds by the names of costs.")
    for name in costs:
        cost_unit(name)
        if name in SHORTHANDS:
            raise FxwidthError(f"costs={dict(costs)!r}: write Budget({name}=...) for {name!r}.")


# What pinned groups are part of can be counted for these; for the others flops say where the work is.
_COUNTED = ("params", "flops")


def bounds_of(width_graph: WidthGraph, budget: Budget, of_latency: float = 1.0) -> list[Bound]:
    """Return what a budget means for one graph.

    Args:
        width_graph: the graph.
        budget: the budget.
        of_latency: the share of the bound on latency that is to be met.

    Raises:
        FxwidthError: a cost cannot be known of this model.
    """
    result = []
    for name, given in budget.bounds.items():
        is_latency = name == "latency"
        if is_latency and budget.measure is not None:
            cost = measured_polynomial(width_graph, budget.measure)
        else:
            cost = cost_polynomial(width_graph, name)
        limit = given if isinstance(given, int) else given * cost({})
        result.append(Bound(name, given, cost, of_latency * limit if is_latency else int(limit)))
    return result


def growth_factor(bounds: Iterable[Bound], groups: Iterable[ChannelGroup]) -> float:
    """Return a power of two by which all of some groups together grow beyond a bound; the widest of them may become so.

    That leaves room to any one of them: to grow by less than half of it together meets all bounds.
    """
    bounds, groups, factor = list(bounds), list(groups), 1.0
    while groups and factor < _LARGEST_RATIO:
        if not all(bound.met({group.factor: int(factor * group.width) for group in groups}) for bound in bounds):
            break
        factor *= 2
    return factor


def out_of_reach(
    width_graph: WidthGraph,
    free: Iterable[ChannelGroup],
    smallest: Mapping[Factor, int],
    bound: Bound,
    why: Mapping[str, str],
) -> str:
    """Tell how far down a cost can go and which groups that stay hold it up.

    Args:
        width_graph: the groups.
        free: those that may change.
        smallest: the least widths that they may get.
        bound: what cannot be met.
        why: by group name, why it stays, of groups that are neither pinned nor left out by an option.
    """
    chosen = {group.factor for group in free}
    staying = [group for group in width_graph.groups if group.factor not in chosen]
    held = sorted(((_presence(width_graph, group, smallest, bound), group) for group in staying), key=lambda e: -e[0])
    texts = []
    for presence, group in held[:3]:
        reason = f"pinned: {group.pinned}" if group.pinned else why.get(group.name, "left out by only= or keep=")
        where = "of them" if bound.name in _COUNTED else "flops"
        texts.append(f"{group.name!r} is in {presence:.0f} {where} ({reason})")
    detail = f" Groups that stay: {'; '.join(texts)}." if texts else ""
    # A share in percent is a likely slip, and is no share.
    is_percent = bound.name in _COUNTED and isinstance(bound.given, int) and 1 < bound.given < 100
    slip = f" {bound.given} is a count; for {bound.given} % pass {bound.given / 100}." if is_percent else ""
    return (
        f"{bound.name}={bound.given} is out of reach: with every free group at its smallest width "
        f"{bound.cost(smallest):.0f} {cost_unit(bound.name)} remain.{slip}{detail} "
        f"Raise {bound.name}, lower min_width or align, or free groups."
    )


def _presence(width_graph: WidthGraph, group: ChannelGroup, widths: Mapping[Factor, int], bound: Bound) -> float:
    """Return of how many parameters a group is a dim, or how many flops the ops take that use those."""
    parameters = {site.parameter for site in group.sites}
    if bound.name == "params":
        entries = (width_graph.analysis.parameters[name] for name in parameters)
        tensors = [entry.axes for entry in entries if isinstance(entry.tensor, nn.Parameter)]
        return entries_polynomial(width_graph.analysis.space, tensors)(widths)
    uses = wiring_of(width_graph).uses
    calls = {call for name in parameters for call, _ in uses.get(name, [])}
    return sum(call_flops(width_graph, call)(widths) for call in calls)
