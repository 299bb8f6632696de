"""The table of costs that a budget can bound: each is a polynomial in the widths, registered by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from fxwidth.analysis.result import TensorSpec
from fxwidth.axes.factors import Factor
from fxwidth.axes.polynomials import Polynomial
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.recording.graph_meta import INPUTS, notes_of
from fxwidth.registration import refuse_name
from fxwidth.rewriting.looks import looking_at
from fxwidth.runtime.pytrees import flatten

CostFunction = Callable[[WidthGraph], Polynomial]
_Function = TypeVar("_Function", bound=CostFunction)


@dataclass(frozen=True)
class Cost:
    """One cost of a network.

    Attributes:
        name: what a budget calls it.
        unit: the unit that it is counted in, in the plural.
        polynomial: gives the cost of a graph at all widths.
    """

    name: str
    unit: str
    polynomial: CostFunction


COSTS: dict[str, Cost] = {}


def register(name: str, unit: str) -> Callable[[_Function], _Function]:
    """Register a function as a cost, as `fxwidth.cost` does, where this is told.

    Raises:
        FxwidthError: the name is no identifier, or taken.
    """
    refuse_name(COSTS, name, "cost", identifier=True)

    def registering(function: _Function) -> _Function:
        COSTS[name] = Cost(name, unit, function)
        return function

    return registering


def cost_polynomial(width_graph: WidthGraph, name: str) -> Polynomial:
    """Return a cost of a graph as a polynomial in the widths of its groups.

    Calling it with new widths by factor, `polynomial({group.factor: 8})`, gives the cost at these; what is not named
    stays as it is.

    Args:
        width_graph: the graph.
        name: "params", "flops", "activation_memory" (bytes), "latency" (microseconds), or one that was registered by
            `fxwidth.cost`.

    Raises:
        FxwidthError: there is no such cost, its function gives no polynomial or cannot know it of this model, or the
            graph has changed since it was analysed.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> graph = fxwidth.analyze(fxwidth.trace(net, torch.randn(2, 8)))
        >>> params = fxwidth.cost_polynomial(graph, "params")
        >>> params({}), params({graph.free[0].factor: 10})
        (212, 134)
    """
    width_graph.refuse_outdated()
    found = _known(name).polynomial
    result: Any = looking_at(width_graph.analysis.module, lambda: found(width_graph))
    if not isinstance(result, Polynomial):
        raise FxwidthError(
            f"the cost {name!r} gave {type(result).__name__}; return an fxwidth.Polynomial, as cost_polynomial gives."
        )
    return of_examples(width_graph, result)


def of_examples(width_graph: WidthGraph, polynomial: Polynomial) -> Polynomial:
    """Return a cost at the batch of the example inputs: a batch of one is analysed as one of two.

    The batch is a number in the result, and no factor any more.
    """
    given = _first_dims(notes_of(width_graph.analysis.module).get(INPUTS, ()), TensorSpec)
    if not given or given == _first_dims(width_graph.analysis.inputs, Tensor):
        return polynomial
    terms: dict[tuple[Factor, ...], float] = {}
    for monomial, coefficient in polynomial.terms.items():
        rest = tuple(factor for factor in monomial if not factor.is_batch)
        scaled = coefficient * given[0] ** (len(monomial) - len(rest))
        terms[rest] = terms.get(rest, 0) + scaled
    return Polynomial(terms)


def _first_dims(values: Sequence[Any], kind: type) -> list[int]:
    return [leaf.shape[0] for leaf in flatten(tuple(values), (kind,))[0] if len(leaf.shape)]


def _known(name: str) -> Cost:
    if name not in COSTS:
        raise FxwidthError(
            f"there is no cost {name!r}; they are {', '.join(map(repr, COSTS))}; fxwidth.cost registers another."
        )
    return COSTS[name]


def cost_unit(name: str) -> str:
    """Return the unit of a cost.

    Raises:
        FxwidthError: there is no such cost.
    """
    return _known(name).unit
