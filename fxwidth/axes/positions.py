"""Where a factor's channels lie in a dimension, by arithmetic on its axis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from math import gcd, prod

import numpy as np

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor, axis_size, element_size, find, is_integer_term, term_size
from fxwidth.axes.index_maps import Indices


def without_minor(axis: Axis) -> tuple[Axis, int]:
    """Divide an axis by the largest constant that is minor in all of it: "channels * 49" gives channels and 49."""
    last = [term[-1] if term else 1 for term in axis]
    minor = gcd(*(element if isinstance(element, int) else 1 for element in last))
    if minor == 1:
        return axis, 1
    terms = [(*term[:-1], element // minor) for term, element in zip(axis, last, strict=True)]  # type: ignore[operator]
    return tuple(term[:-1] if term[-1] == 1 else term for term in terms), minor


def channel_positions(space: FactorSpace, axis: Axis, factor: Factor) -> list[Indices]:
    """Return, for each occurrence of a factor in an axis, the positions of its channels, [channels, positions each]."""
    return _occurrences(space.normalise(axis), factor)


def positions_by_channel(axis: Axis, factor: Factor) -> list[Indices]:
    """Return the positions of each channel of a factor in an axis, over all its occurrences, ascending.

    Normal forms have a pinned factor as a number; here it is looked for all the same.
    """
    parts = _occurrences(_unfolded(axis), factor)
    return [np.unique(np.concatenate([part[channel] for part in parts])) for channel in range(factor.size)]


def _occurrences(axis: Axis, factor: Factor) -> list[Indices]:
    result = []
    for labels in _labels(axis, factor):
        order = np.argsort(labels, kind="stable")
        result.append(order[np.count_nonzero(labels < 0) :].reshape(factor.size, -1))
    return result


def _unfolded(axis: Axis) -> Axis:
    """Return an axis of roots and numbers, what a factor consists of in its place."""
    return tuple(tuple(map(_unfolded_element, term)) for term in axis)


def _unfolded_element(element: int | Factor | Axis) -> int | Factor | Axis:
    if isinstance(element, Factor):
        root = find(element)
        return root if root.refined_to is None else _unfolded(root.refined_to)
    return _unfolded(element) if isinstance(element, tuple) else element


def occupied_positions(axis: Axis) -> Counter[Factor]:
    """Return how many positions of an axis each factor is in, once for each time it occurs there."""
    result: Counter[Factor] = Counter()
    for term in axis:
        size = term_size(term)
        for element in term:
            if isinstance(element, tuple):
                copies = size // axis_size(element)
                result.update({factor: copies * positions for factor, positions in occupied_positions(element).items()})
            elif not isinstance(element, int):
                result[element] += size
    return result


def _labels(axis: Axis, factor: Factor) -> Iterator[Indices]:
    """Yield, for each occurrence of a factor, the channel that each position of an axis belongs to, or -1."""
    total, offset = axis_size(axis), 0
    for term in axis:
        size = term_size(term)
        if not is_integer_term(term):
            for place, element in enumerate(term):
                outer = prod(map(element_size, term[:place]))
                inner = prod(map(element_size, term[place + 1 :]))
                for labels in _element_labels(element, factor):
                    result = np.full(total, -1, dtype=np.int64)
                    result[offset : offset + size] = np.tile(np.repeat(labels, inner), outer)
                    yield result
        offset += size


def _element_labels(element: int | Factor | Axis, factor: Factor) -> Iterable[Indices]:
    if element is factor:
        return [np.arange(factor.size)]
    return _labels(element, factor) if isinstance(element, tuple) else []
