"""The factors of one analysis: how they are made equal, divided and pinned, and the normal forms of axes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

from fxwidth.axes.factors import (
    Axis,
    Factor,
    Term,
    bare_factor,
    constant,
    constant_from,
    find,
    is_free,
    is_integer_term,
    nested_factors,
    term_size,
)
from fxwidth.axes.pins import BATCH_DIVIDED, SELF_CONTAINED, Fixed, Pin


class Link(NamedTuple):
    """One reason why two factors are related: the context is the op and fx node at work."""

    first: Factor
    second: Factor
    context: str


# Quicker than a generator for the hundreds of parts that dense networks have.
_IS_BATCH = attrgetter("is_batch")


class FactorSpace:
    """The factors of one analysis, with their normal forms and the log of why they are related.

    `context` is the op at work; `batch_is_shared` tells that some other factor became the batch or has it as a part.
    """

    def __init__(self, links: Iterable[Link] = ()) -> None:
        self._log: list[tuple[Factor, Sequence[Factor], str]] = [(one, (two,), context) for one, two, context in links]
        self.context = ""
        self.batch_is_shared = False
        self._normal_forms: dict[Axis, Axis] = {}
        self._forms_with: defaultdict[Factor, list[Axis]] = defaultdict(list)

    # -- making and changing factors ------------------------------------------------------------------------------

    def fresh(self, size: int, name: str = "") -> Axis:
        """Return an axis of one new factor; a dimension of size one or zero has nothing to resize."""
        return constant(size) if size < 2 else ((Factor(int(size), name),),)

    def changed(self, factor: Factor) -> None:
        """Forget the normal forms that mention a factor, after it changed."""
        # And not the others: in dense networks these are long and needed again.
        for axis in self._forms_with.pop(factor, ()):
            self._normal_forms.pop(axis, None)

    @property
    def links(self) -> list[Link]:
        """Why factors are related; put together on demand, since a refinement may relate hundreds."""
        return [Link(first, second, context) for first, others, context in self._log for second in others]

    def merge(self, kept: Factor, absorbed: Factor) -> None:
        """Make two roots of equal size one factor."""
        self._log.append((kept, (absorbed,), self.context))
        absorbed.parent = kept
        kept.mixed = kept.mixed or absorbed.mixed
        if kept.is_batch or absorbed.is_batch:
            kept.is_batch = self.batch_is_shared = True
        self.changed(absorbed)

    def refine(self, factor: Factor, axis: Axis) -> None:
        """Say what a root consists of; a batch factor stays whole, and what it would consist of is pinned."""
        if factor.is_batch:
            self.pin(axis, BATCH_DIVIDED)
            return
        parts = self.factors(axis)
        if factor in parts:
            self.pin(axis, SELF_CONTAINED)
            return
        factor.refined_to = axis
        self.batch_is_shared = self.batch_is_shared or any(map(_IS_BATCH, parts))
        self._log.append((factor, parts, self.context))
        if factor.mixed:
            for part in parts:
                part.mixed = part.mixed or factor.mixed
        self.changed(factor)

    def pin(self, axis: Axis, reason: str, cause: Pin | None = None) -> None:
        """Fix the size of everything an axis is made of, because of the op at work, or of a pinned size it must equal.

        The batch is never resized, but what is computed from it must stay computed: it does not become a number.
        """
        for factor in self.factors(axis):
            if not factor.is_batch:
                factor.pinned = Pin(reason, self.context, cause)
                self.changed(factor)

    def mix(self, axis: Axis, reason: str) -> None:
        """Mark the factors of an axis: an op reduces over them with their own neighbours."""
        for factor in self.factors(axis):
            factor.mixed = factor.mixed or f"{reason} ({self.context})"

    # -- reading ---------------------------------------------------------------------------------------------------

    def normalise(self, axis: Axis) -> Axis:
        """Return the canonical form: roots only, refinements substituted, pinned factors as integers."""
        bare = bare_factor(axis)
        if bare is not None and bare.parent is None and is_free(bare):
            return axis
        known = self._normal_forms.get(axis)
        if known is None:
            known = self._normalise(axis)
            self._normal_forms[axis] = self._normal_forms[known] = known
            for factor in nested_factors(known):
                self._forms_with[factor] += (axis, known)
        return known

    def factors(self, axis: Axis) -> list[Factor]:
        """Return the free factors of an axis, in order, with repetitions."""
        return list(nested_factors(self.normalise(axis)))

    def reaches_batch(self, axis: Axis) -> bool:
        """Tell whether the batch is among the free factors of an axis."""
        bare = bare_factor(axis)
        root = None if bare is None else find(bare)
        if root is not None and is_free(root):
            return root.is_batch
        return any(factor.is_batch for factor in self.factors(axis))

    def is_constant(self, axis: Axis) -> bool:
        """Tell whether nothing in an axis can be resized."""
        return not self.factors(axis)

    def leaves(self, factor: Factor) -> list[Factor]:
        """Return the roots that a factor has become, pinned ones included."""
        root = find(factor)
        if root.refined_to is None:
            return [root]
        return [leaf for part in nested_factors(root.refined_to) for leaf in self.leaves(part)]

    def product(self, *axes: Axis) -> Axis:
        """Return the axis of several dimensions flattened into one, major first."""
        return self.normalise((tuple(axes),))

    def concatenation(self, axes: Iterable[Axis]) -> Axis:
        """Return the axis of several dimensions laid end to end."""
        return self.normalise(tuple(term for axis in axes for term in axis))

    def _normalise(self, axis: Axis) -> Axis:
        result: list[Term] = []
        for term in axis:
            for part in self._normal_term(term):
                if result and is_integer_term(part) and is_integer_term(result[-1]):
                    size = term_size(result[-1]) + term_size(part)
                    result[-1] = (constant_from(size, *result[-1], *part),)
                else:
                    result.append(part)
        return tuple(result)

    def _normal_term(self, term: Term) -> list[Term]:
        elements: list[int | Factor | Axis] = []
        for element in term:
            self._append(elements, element)
        if elements and isinstance(elements[0], tuple):
            head, rest = elements[0], tuple(elements[1:])
            if not rest:
                return list(head)
            return [part for inner in head for part in self._normal_term(inner + rest)]
        return [tuple(elements)]

    def _append(self, elements: list[int | Factor | Axis], element: int | Factor | Axis) -> None:
        if isinstance(element, int):
            if element == 1:
                return
            if elements and isinstance(elements[-1], int):
                elements[-1] = constant_from(elements[-1] * element, elements[-1], element)
            else:
                elements.append(element)
        elif isinstance(element, Factor):
            root = find(element)
            if root.pinned is not None:
                self._append(elements, Fixed(root.size, root.pinned))
            elif root.refined_to is not None:
                self._append(elements, root.refined_to)
            else:
                elements.append(root)
        else:
            inner = self.normalise(element)
            if len(inner) == 1:
                for part in inner[0]:
                    self._append(elements, part)
            else:
                elements.append(inner)
