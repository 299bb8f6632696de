"""The axis algebra: what the dimensions of tensors are made of.

A dimension is described by an *axis*: a concatenation (sum) of terms, each term a product of elements, major to minor.
An element is a constant, a `Factor` or a nested axis::

    cat(a, b)            ((A,), (B,))        A + B
    view(heads, width)   ((H, D),)           H * D
    flatten 7 x 7        ((A, 49), (B, 49))  (A + B) * 49, distributed

A leading sum is distributed over what follows, because `(A + B) * S` is laid out as `A * S` then `B * S`; an inner sum,
`S * (A + B)`, is not, and stays nested. This module knows only integers and never sees a tensor.

Source: the word "factor" and its use for sub-dimensions follow Shardy's propagation design.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from fxwidth.axes.pins import BATCH_DIVIDED, SELF_CONTAINED, Fixed, Pin

Element = "int | Factor | Axis"
Term = tuple["int | Factor | Axis", ...]
Axis = tuple[Term, ...]

ONE: Axis = ((),)


class Factor:
    """An indivisible part of a dimension, until something divides it.

    A factor is a node of a union-find forest (`parent`); a root may have been refined, once, into an axis
    (`refined_to`). Nothing that mentions a factor is ever rewritten: readers normalise instead.
    """

    __slots__ = ("is_batch", "mixed", "name", "parent", "pinned", "refined_to", "size")

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self.name = name
        self.parent: Factor | None = None
        self.refined_to: Axis | None = None
        self.pinned: Pin | None = None
        self.mixed: str | None = None
        self.is_batch = False

    def __repr__(self) -> str:
        return f"{self.name}[{self.size}]" + ("!" if self.pinned else "")


class Link(NamedTuple):
    """One reason why two factors are related: the context is the op and fx node at work."""

    first: Factor
    second: Factor
    context: str


class AxisMismatchError(Exception):
    """Two axes that should be equal have different sizes: the rule that said so does not fit the call."""


def find(factor: Factor) -> Factor:
    """Return the representative of a factor's union, compressing the path."""
    root = factor
    while root.parent is not None:
        root = root.parent
    while factor.parent is not None and factor.parent is not root:
        factor.parent, factor = root, factor.parent
    return root


def constant(size: int, why: Pin | None = None) -> Axis:
    """Return the axis of a dimension that never changes."""
    return ONE if size == 1 else ((int(size) if why is None else Fixed(size, why),),)


def why_fixed(axis: Axis) -> Pin | None:
    """Return why the constants of a normalised axis are constant, as far as the first of them knows."""
    for term in axis:
        for element in term:
            why = why_fixed(element) if isinstance(element, tuple) else None
            if isinstance(element, Fixed):
                why = element.why
            if why is not None:
                return why
    return None


def constant_from(size: int, *parts: int | Factor | Axis) -> int:
    """Return a constant computed from others, with the reason of the first that has one."""
    why = next((part.why for part in parts if isinstance(part, Fixed)), None)
    return size if why is None else Fixed(size, why)


def element_size(element: int | Factor | Axis) -> int:
    """Return the number of positions an element spans."""
    if isinstance(element, Factor):
        return element.size
    return element if isinstance(element, int) else axis_size(element)


def term_size(term: Term) -> int:
    """Return the number of positions a term spans."""
    size = 1
    for element in term:
        size *= element if isinstance(element, int) else element_size(element)
    return size


def axis_size(axis: Axis) -> int:
    """Return the length of the dimension an axis describes."""
    if len(axis) == 1 and len(axis[0]) == 1:
        return element_size(axis[0][0])
    return sum(map(term_size, axis))


def bare_factor(axis: Axis) -> Factor | None:
    """Return the factor of an axis that is one factor and nothing else."""
    if len(axis) != 1 or len(axis[0]) != 1:
        return None
    element = axis[0][0]
    return element if isinstance(element, Factor) else None


def is_free(root: Factor) -> bool:
    """Tell whether a root stands for itself: it is not refined, and its size may change."""
    return root.refined_to is None and root.pinned is None


def is_integer_term(term: Term) -> bool:
    """Tell whether a normalised term has neither factors nor nested sums."""
    for element in term:  # noqa: SIM110  (a generator would cost more than the loop it hides)
        if not isinstance(element, int):
            return False
    return True


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
            for factor in _nested_factors(known):
                self._forms_with[factor] += (axis, known)
        return known

    def factors(self, axis: Axis) -> list[Factor]:
        """Return the free factors of an axis, in order, with repetitions."""
        return list(_nested_factors(self.normalise(axis)))

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
        return [leaf for part in _nested_factors(root.refined_to) for leaf in self.leaves(part)]

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


def _nested_factors(axis: Axis) -> Iterator[Factor]:
    for term in axis:
        for element in term:
            if isinstance(element, Factor):
                yield element
            elif isinstance(element, tuple):
                yield from _nested_factors(element)
