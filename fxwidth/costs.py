"""What a network of given widths costs, as exact polynomials in the widths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

from torch import nn

from fxwidth.factors import Axis, Factor, FactorSpace, Term
from fxwidth.groups import WidthGraph

Monomial = tuple[Factor, ...]


class Polynomial:
    """A sum of products of widths with integer coefficients.

    The number of entries of a tensor is the product of its axes' sizes, and an axis's size is a sum of products of
    widths: so is every count of entries of a network.
    """

    def __init__(self, terms: Mapping[Monomial, int]) -> None:
        self.terms = dict(terms)
        self._by_factor: dict[Factor, list[tuple[Monomial, int, int]]] = {}
        for monomial, coefficient in self.terms.items():
            for factor, degree in Counter(monomial).items():
                rest = tuple(other for other in monomial if other is not factor)
                self._by_factor.setdefault(factor, []).append((rest, coefficient, degree))

    def __call__(self, widths: Mapping[Factor, int]) -> int:
        """Return the value at some widths; factors that are not named have their present size."""
        return sum(coefficient * _product(monomial, widths) for monomial, coefficient in self.terms.items())

    def along(self, factor: Factor, widths: Mapping[Factor, int]) -> list[int]:
        """Return the coefficients, by degree, of the part that one factor's width changes, the others given."""
        parts = self._by_factor.get(factor, [])
        result = [0] * (1 + max((degree for _, _, degree in parts), default=0))
        for rest, coefficient, degree in parts:
            result[degree] += coefficient * _product(rest, widths)
        return result

    def neighbours(self, factor: Factor) -> set[Factor]:
        """Return the factors whose part depends on the width of this one."""
        return {other for rest, _, _ in self._by_factor.get(factor, []) for other in rest} - {factor}


def parameter_polynomial(width_graph: WidthGraph) -> Polynomial:
    """Return the number of entries of a graph's parameters, each distinct one counted once; buffers are left out."""
    found = _PARAMETERS.get(width_graph)
    if found is None:
        entries = width_graph.analysis.parameters.values()
        tensors = [entry.axes for entry in entries if isinstance(entry.tensor, nn.Parameter)]
        found = _PARAMETERS[width_graph] = entries_polynomial(width_graph.analysis.space, tensors)
    return found


_PARAMETERS: WeakKeyDictionary[WidthGraph, Polynomial] = WeakKeyDictionary()


def parameter_count(width_graph: WidthGraph, widths: Mapping[Factor, int]) -> int:
    """Return how many parameters a graph has once its factors have the given widths; others stay as they are."""
    return parameter_polynomial(width_graph)(widths)


def buffer_count(width_graph: WidthGraph, widths: Mapping[Factor, int]) -> int:
    """Return how many entries a graph's buffers have once its factors have the given widths."""
    entries = width_graph.analysis.parameters.values()
    tensors = [entry.axes for entry in entries if not isinstance(entry.tensor, nn.Parameter)]
    return entries_polynomial(width_graph.analysis.space, tensors)(widths)


def entries_polynomial(space: FactorSpace, tensors: Iterable[Iterable[Axis]]) -> Polynomial:
    """Return the number of entries of tensors with the given axes."""
    total: Counter[Monomial] = Counter()
    for axes in tensors:
        product: Mapping[Monomial, int] = {(): 1}
        for axis in axes:
            product = _times(product, _axis_terms(space.normalise(axis)))
        total.update(product)
    return Polynomial(total)


def _axis_terms(axis: Axis) -> Mapping[Monomial, int]:
    total: Counter[Monomial] = Counter()
    for term in axis:
        total.update(_term_terms(term))
    return total


def _term_terms(term: Term) -> Mapping[Monomial, int]:
    product: Mapping[Monomial, int] = {(): 1}
    for element in term:
        if isinstance(element, tuple):
            product = _times(product, _axis_terms(element))
        else:
            product = _times(product, {(): element} if isinstance(element, int) else {(element,): 1})
    return product


def _times(first: Mapping[Monomial, int], second: Mapping[Monomial, int]) -> Mapping[Monomial, int]:
    result: Counter[Monomial] = Counter()
    for one, coefficient in first.items():
        for other, factor in second.items():
            result[tuple(sorted(one + other, key=id))] += coefficient * factor
    return result


def _product(monomial: Monomial, widths: Mapping[Factor, int]) -> int:
    result = 1
    for factor in monomial:
        result *= widths.get(factor, factor.size)
    return result
