"""Making two axes equal: the only way in which an op couples dimensions.

`unify` finds the coarsest common structure: a bare factor takes the other side's form, sums are cut at each other's
borders, products are matched in minimal equal blocks from the minor end, and what cannot be aligned is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import (
    Axis,
    AxisMismatchError,
    Factor,
    Term,
    axis_size,
    bare_factor,
    constant_from,
    element_size,
    find,
    is_free,
    is_integer_term,
    nested_factors,
    term_size,
    why_fixed,
)
from fxwidth.axes.pins import CONSTANT, UNALIGNED, Fixed, Pin


def unify(space: FactorSpace, first: Axis, second: Axis) -> None:
    """Make two axes of equal size the same.

    Raises:
        AxisMismatchError: the axes have different sizes.
    """
    if first == second or _merge_bare_factors(space, first, second):
        return
    while True:
        first, second = space.normalise(first), space.normalise(second)
        if first == second:
            return
        if axis_size(first) != axis_size(second):
            raise AxisMismatchError(f"{axis_size(first)} against {axis_size(second)}")
        if _alias_bare_factor(space, first, second) or _alias_bare_factor(space, second, first):
            return
        if len(first) == 1 and len(second) == 1:
            _unify_terms(space, first[0], second[0])
            return
        # Cut the longer head at the end of the shorter one; the rest is matched in the next turn.
        cut_at = min(term_size(first[0]), term_size(second[0]))
        head_1, first = split(space, first, cut_at)
        head_2, second = split(space, second, cut_at)
        unify(space, head_1, head_2)


def _merge_bare_factors(space: FactorSpace, first: Axis, second: Axis) -> bool:
    # By far the most frequent case, which needs none of the rest.
    one, two = bare_factor(first), bare_factor(second)
    if one is None or two is None:
        return False
    one, two = find(one), find(two)
    if one is two:
        return True
    if one.size != two.size or not is_free(one) or not is_free(two):
        return False
    space.merge(one, two)
    return True


def split(space: FactorSpace, axis: Axis, position: int) -> tuple[Axis, Axis]:
    """Cut an axis in two, refining the factor the cut falls into."""
    axis = space.normalise(axis)
    if position <= 0:
        return (), axis
    done = 0
    for i, term in enumerate(axis):
        if done == position:
            return axis[:i], axis[i:]
        size = term_size(term)
        if done + size > position:
            left, right = _split_term(space, term, position - done)
            return space.normalise(axis[:i] + left), space.normalise(right + axis[i + 1 :])
        done += size
    return axis, ()


def cut(space: FactorSpace, axis: Axis, start: int, stop: int) -> Axis:
    """Return the part of an axis between two positions."""
    _, rest = split(space, axis, start)
    part, _ = split(space, rest, stop - start)
    return space.normalise(part)


def _alias_bare_factor(space: FactorSpace, bare: Axis, other: Axis) -> bool:
    # Aliasing the factor to the whole sum, rather than cutting the sum to fit it, keeps dense networks linear.
    if len(other) < 2 or len(bare) != 1 or len(bare[0]) != 1 or not isinstance(bare[0][0], Factor):
        return False
    if space.is_constant(other):
        _pin_to_constant(space, bare, other)
    else:
        space.refine(bare[0][0], other)
    return True


def _split_term(space: FactorSpace, term: Term, position: int) -> tuple[Axis, Axis]:
    head, inner = term[0], term[1:]
    quotient, remainder = divmod(position, term_size(inner))
    if remainder == 0:
        left, right = _split_element(space, head, quotient)
        return ((left, *inner),), ((right, *inner),)
    # The cut falls inside one index of the head: isolate that index and cut the inner product.
    before: Axis = ()
    after: Axis = ()
    rest = head
    if quotient > 0:
        part, rest = _split_element(space, head, quotient)
        before = ((part, *inner),)
    if element_size(rest) > 1:
        _, part = _split_element(space, rest, 1)
        after = ((part, *inner),)
    inner_left, inner_right = split(space, (inner,), remainder)
    return before + inner_left, inner_right + after


def _split_element(space: FactorSpace, element: int | Factor | Axis, position: int) -> tuple[Axis, Axis]:
    if isinstance(element, int):
        return ((constant_from(position, element),),), ((constant_from(element - position, element),),)
    if isinstance(element, Factor):
        left = space.fresh(position, f"{element.name}[:{position}]")
        right = space.fresh(element.size - position, f"{element.name}[{position}:]")
        space.refine(element, left + right)
        return left, right
    return split(space, element, position)


def _unify_terms(space: FactorSpace, first: Term, second: Term) -> None:
    while True:
        one, two = space.normalise((first,)), space.normalise((second,))
        if len(one) != 1 or len(two) != 1:
            return unify(space, one, two)
        first, second = one[0], two[0]
        if first == second:
            return None
        if is_integer_term(first) or is_integer_term(second):
            return _pin_to_constants(space, first, second)
        first, block_1, second, block_2 = _minor_blocks(first, second)
        _unify_block(space, block_1, block_2)
        if not first:
            return None


def _minor_blocks(first: Term, second: Term) -> tuple[Term, Term, Term, Term]:
    """Cut off the shortest minor ends of equal size: (rest 1, block 1, rest 2, block 2)."""
    i, j = len(first) - 1, len(second) - 1
    size_1, size_2 = element_size(first[i]), element_size(second[j])
    while size_1 != size_2:
        if size_1 < size_2:
            i -= 1
            size_1 *= element_size(first[i])
        else:
            j -= 1
            size_2 *= element_size(second[j])
    return first[:i], first[i:], second[:j], second[j:]


def _unify_block(space: FactorSpace, first: Term, second: Term) -> None:
    if len(first) > 1 and len(second) > 1:
        return _unify_by_common_divisor(space, first, second)
    if len(first) > 1:
        first, second = second, first
    element = first[0]
    if len(second) == 1 and not isinstance(element, Factor):
        first, second, element = second, first, second[0]
    if isinstance(element, Factor):
        if element.size > 1 and is_integer_term(second):
            _pin_to_constant(space, (first,), (second,))
        elif len(second) == 1 and isinstance(second[0], Factor):
            if element is not second[0]:
                space.merge(element, second[0])
        else:
            space.refine(element, (second,))
    elif isinstance(element, int):
        _pin_to_constants(space, first, second)
    else:
        unify(space, element, (second,))
    return None


def _unify_by_common_divisor(space: FactorSpace, first: Term, second: Term) -> None:
    """Match products of several elements by cutting both minor ends at their greatest common divisor."""
    end_1, end_2 = first[-1], second[-1]
    common = gcd(element_size(end_1), element_size(end_2))
    if common == 1 or isinstance(end_1, tuple) or isinstance(end_2, tuple):
        return _unify_major_ends(space, first, second)
    major_1, minor_1 = _divide(space, end_1, common)
    major_2, minor_2 = _divide(space, end_2, common)
    _unify_block(space, (minor_1,), (minor_2,))
    return _unify_terms(space, first[:-1] + major_1, second[:-1] + major_2)


def _unify_major_ends(space: FactorSpace, first: Term, second: Term) -> None:
    """Match what the major ends have in common, where the minor ends have nothing; the rest stays unaligned."""
    end_1, end_2 = first[0], second[0]
    common = gcd(element_size(end_1), element_size(end_2))
    if common == 1 or isinstance(end_1, tuple) or isinstance(end_2, tuple):
        return _unify_by_chunks(space, first, second)
    major_1, minor_1 = _divide(space, end_1, element_size(end_1) // common)
    major_2, minor_2 = _divide(space, end_2, element_size(end_2) // common)
    _unify_block(space, major_1, major_2)
    return _unify_terms(space, (minor_1, *first[1:]), (minor_2, *second[1:]))


def _unify_by_chunks(space: FactorSpace, first: Term, second: Term) -> None:
    """Match runs of neighbours that lie alike on both sides, as long as the common divisor of all runs is.

    Such are two streams that are laid end to end under a group norm of which one group lies across the seam. How many
    runs there are stays.
    """
    runs = [element for term in (first, second) for element in _minor_ends(term)]
    ends = list(dict.fromkeys(find(run) for run in runs if isinstance(run, Factor)))
    outside = _outside(first, second)
    common = gcd(*map(element_size, runs))
    movable = all(isinstance(run, Factor) for run in runs) and not any(end.is_batch for end in ends)
    if common == 1 or not movable or any(end in outside for end in ends):
        return _pin_both(space, first, second, UNALIGNED)
    space.pin(tuple((factor,) for factor in outside), UNALIGNED)
    chunk = next((end for end in ends if end.size == common), None) or Factor(common, f"{ends[0].name}%{common}")
    for end in ends:
        if end.size == common and end is not chunk:
            space.merge(chunk, end)
        elif end is not chunk:
            space.refine(end, ((Fixed(end.size // common, Pin(UNALIGNED, space.context)), chunk),))
    return None


def _minor_ends(term: Term) -> Iterator[int | Factor]:
    """Yield the elements along which neighbours lie: the last one of a product, of each part where that is a sum."""
    end = term[-1] if term else 1
    if isinstance(end, tuple):
        for part in end:
            yield from _minor_ends(part)
    else:
        yield end


def _outside(*terms: Term) -> dict[Factor, None]:
    """Return the factors of products that are not at their minor ends, in order."""
    found = dict.fromkeys(nested_factors(tuple(term[:-1] for term in terms)))
    for term in filter(None, terms):
        found |= _outside(*term[-1]) if isinstance(term[-1], tuple) else {}
    return found


def _divide(space: FactorSpace, element: int | Factor, divisor: int) -> tuple[Term, int | Factor]:
    size = element_size(element)
    if size == divisor:
        return (), element
    if divisor == 1:
        return (element,), 1
    # Integers are divided here and not by a factor: normalising would multiply them together again, for ever.
    if isinstance(element, int):
        return (constant_from(size // divisor, element),), constant_from(divisor, element)
    major, minor = Factor(size // divisor, f"{element.name}/{divisor}"), Factor(divisor, f"{element.name}%{divisor}")
    space.refine(element, ((major, minor),))
    return (major,), minor


def _pin_both(space: FactorSpace, first: Term, second: Term, reason: str) -> None:
    space.pin((first,), reason)
    space.pin((second,), reason)


def _pin_to_constants(space: FactorSpace, first: Term, second: Term) -> None:
    causes = why_fixed((first,)), why_fixed((second,))
    space.pin((first,), CONSTANT, causes[1])
    space.pin((second,), CONSTANT, causes[0])


def _pin_to_constant(space: FactorSpace, axis: Axis, other: Axis) -> None:
    space.pin(axis, CONSTANT, why_fixed(other))
