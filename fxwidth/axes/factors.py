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

from collections.abc import Iterator

from fxwidth.axes.pins import Fixed, Pin

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
        size *= element.size if type(element) is Factor else element_size(element)
    return size


def axis_size(axis: Axis) -> int:
    """Return the length of the dimension an axis describes."""
    if len(axis) == 1 and len(axis[0]) == 1:
        return element_size(axis[0][0])
    size = 0
    for term in axis:  # most terms of a long axis are one factor; nested calls would cost more than the sum
        first = term[0] if len(term) == 1 else None
        size += first.size if type(first) is Factor else term_size(term)
    return size


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


def nested_factors(axis: Axis) -> Iterator[Factor]:
    """Yield the factors that an axis mentions, in order, with repetitions."""
    for term in axis:
        for element in term:
            if isinstance(element, Factor):
                yield element
            elif isinstance(element, tuple):
                yield from nested_factors(element)
