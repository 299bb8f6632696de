"""Polynomials in the widths of channel groups: every count of entries of a network is one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor, Term
from fxwidth.errors import FxwidthError

Monomial = tuple[Factor, ...]
Grid = npt.NDArray[np.float64]


class Polynomial:
    """A sum of products of widths.

    The number of entries of a tensor is the product of its axes' sizes, and an axis's size is a sum of products of
    widths: so is every count of entries of a network, with integer coefficients.

    Args:
        terms: coefficients by products of factors, `{(group.factor, group.factor): 9.0, (): 2.0}`; the empty product is
            the constant.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> group = fxwidth.analyze(fxwidth.trace(net, torch.randn(2, 8))).free[0]
        >>> cost = fxwidth.Polynomial({(group.factor, group.factor): 9.0, (): 2.0})
        >>> cost({}), cost({group.factor: 2})
        (2306.0, 38.0)
    """

    def __init__(self, terms: Mapping[Monomial, float]) -> None:
        self.terms = {monomial: coefficient for monomial, coefficient in terms.items() if coefficient}
        self._by_factor: dict[Factor, list[tuple[Monomial, float, int]]] = {}
        for monomial, coefficient in self.terms.items():
            for factor, degree in Counter(monomial).items():
                rest = tuple(other for other in monomial if other is not factor)
                self._by_factor.setdefault(factor, []).append((rest, coefficient, degree))

    def __repr__(self) -> str:
        return f"<Polynomial of {len(self.terms)} terms in {len(self._by_factor)} widths, now {self({}):,.0f}>"

    @classmethod
    def sum(cls, parts: Iterable[tuple[float, Polynomial]]) -> Polynomial:
        """Return the sum of polynomials, each times a number."""
        total: dict[Monomial, float] = {}
        for scale, part in parts:
            for monomial, coefficient in part.terms.items():
                total[monomial] = total.get(monomial, 0) + scale * coefficient
        return cls(total)

    @overload
    def __call__(self, widths: Mapping[Factor, int]) -> float: ...
    @overload
    def __call__(self, widths: Mapping[Factor, Grid]) -> Grid: ...
    def __call__(self, widths: Mapping[Factor, Any]) -> Any:
        """Return the value at some widths; factors that are not named have their present size.

        Widths may be arrays: the values at all of them, broadcast against each other.

        Raises:
            FxwidthError: widths are not by factors.
        """
        for key in widths:
            if not isinstance(key, Factor):
                raise FxwidthError(
                    f"a polynomial takes widths by factor, but received {key!r}; call it with "
                    "{width_graph[name].factor: width}."
                )
        return sum(coefficient * _product(monomial, widths) for monomial, coefficient in self.terms.items())

    def along(self, factor: Factor, widths: Mapping[Factor, int]) -> list[float]:
        """Return the coefficients, by degree, of the part that one factor's width changes.

        Args:
            factor: that of a group.
            widths: those of the others, by factor; what is not named stays as it is.
        """
        parts = self._by_factor.get(factor, [])
        result: list[float] = [0] * (1 + max((degree for _, _, degree in parts), default=0))
        for rest, coefficient, degree in parts:
            result[degree] += coefficient * _product(rest, widths)
        return result

    def neighbours(self, factor: Factor) -> set[Factor]:
        """Return the factors whose part depends on the width of this one.

        Args:
            factor: that of a group.
        """
        return {other for rest, _, _ in self._by_factor.get(factor, []) for other in rest} - {factor}

    def containing(self, factor: Factor) -> Polynomial:
        """Return the terms in which a factor occurs.

        Args:
            factor: that of a group.
        """
        return Polynomial({monomial: value for monomial, value in self.terms.items() if factor in monomial})

    def replaced(
        self, substitutes: Mapping[Factor, Factor], ratios: Mapping[Factor, float] | None = None
    ) -> Polynomial:
        """Return the polynomial with some factors standing for others: those whose widths go together.

        Args:
            substitutes: the factor that stands for each.
            ratios: the width of each relative to that one's, where it is another.
        """
        ratios = ratios or {}
        total: dict[Monomial, float] = {}
        for monomial, coefficient in self.terms.items():
            mapped = _sorted(substitutes.get(factor, factor) for factor in monomial)
            scale = math.prod(ratios.get(factor, 1.0) for factor in monomial)
            total[mapped] = total.get(mapped, 0) + coefficient * scale
        return Polynomial(total)


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
            result[_sorted(one + other)] += coefficient * factor
    return result


def _sorted(factors: Iterable[Factor]) -> Monomial:
    return tuple(sorted(factors, key=id))


def _product(monomial: Monomial, widths: Mapping[Factor, Any]) -> Any:
    result = 1
    for factor in monomial:
        # Not in place: an array may have to be broadcast.
        result = result * widths.get(factor, factor.size)
    return result
