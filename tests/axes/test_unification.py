"""Making axes equal: what must hold after it, whatever they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import AxisMismatchError, axis_size, constant
from fxwidth.axes.unification import cut, split, unify
from tests.oracles.axes_strategy import SIZES, Plan, layout, numbered, pairs, plans, within


def _leaves(plan: Plan) -> list[Plan]:
    return [leaf for part in plan.parts for leaf in _leaves(part)] if plan.parts else [plan]


@given(pairs())
def test_unified_axes_are_equal_for_good(pair):
    space = FactorSpace()
    one, two = (plan.build(space) for plan in pair)
    with within(5):
        unify(space, one, two)
    found = layout(space, one)
    assert layout(space, two) == found
    unify(space, two, one)
    assert layout(space, one) == layout(space, two) == found


@given(pairs())
def test_the_order_of_the_operands_does_not_matter(pair):
    forms = []
    for swapped in (False, True):
        space = FactorSpace()
        one, two = (plan.build(space) for plan in pair)
        unify(space, *((two, one) if swapped else (one, two)))
        forms.append(numbered(layout(space, one)))
    assert forms[0] == forms[1]


@st.composite
def coarsenings(draw):
    """Two groupings of neighbours in one row of factors, as sums or as products."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=2, max_size=5))
    kind = draw(st.sampled_from(["sum", "product"]))

    def grouped() -> Plan:
        groups, rest = [], list(sizes)
        while rest:
            count = draw(st.integers(1, len(rest)))
            size = sum(rest[:count]) if kind == "sum" else _product(rest[:count])
            groups.append(Plan("factor", size))
            rest = rest[count:]
        return Plan(kind, sum(sizes) if kind == "sum" else _product(sizes), tuple(groups))

    return grouped(), grouped()


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


@given(coarsenings())
def test_nothing_is_pinned_where_a_common_division_exists(pair):
    space = FactorSpace()
    one, two = (plan.build(space) for plan in pair)
    originals = [factor for axis in (one, two) for factor in space.factors(axis)]
    unify(space, one, two)
    assert not any(leaf.pinned for factor in originals for leaf in space.leaves(factor))


@given(st.data(), SIZES.flatmap(plans))
def test_what_is_split_joins_to_what_it_was(data, plan):
    space = FactorSpace()
    axis = plan.build(space)
    position = data.draw(st.integers(0, plan.size))
    left, right = split(space, axis, position)
    assert (axis_size(left), axis_size(right)) == (position, plan.size - position)
    assert layout(space, left) + layout(space, right) == layout(space, axis)


@given(st.data(), SIZES.flatmap(plans))
def test_a_cut_is_the_middle_of_two_splits(data, plan):
    space = FactorSpace()
    axis = plan.build(space)
    start = data.draw(st.integers(0, plan.size))
    stop = data.draw(st.integers(start, plan.size))
    middle = cut(space, axis, start, stop)
    before, _ = split(space, axis, start)
    _, after = split(space, axis, stop)
    assert axis_size(middle) == stop - start
    assert layout(space, before) + layout(space, middle) + layout(space, after) == layout(space, axis)


@given(pairs(), st.data())
def test_earlier_products_and_sums_follow(pair, data):
    """What was made of a dimension before it was unified is what would be made of it now."""
    space = FactorSpace()
    one, two = (plan.build(space) for plan in pair)
    other = data.draw(plans(3, 1)).build(space)
    product, total = space.product(one, other), space.concatenation([one, other])
    unify(space, one, two)
    assert layout(space, product) == layout(space, space.product(two, other))
    assert layout(space, total) == layout(space, two) + layout(space, other)


def test_sizes_must_agree():
    space = FactorSpace()
    with pytest.raises(AxisMismatchError, match="6 against 7"):
        unify(space, space.fresh(6), space.fresh(7))


def test_a_bare_factor_takes_the_other_form():
    space = FactorSpace()
    bare, parts = space.fresh(7), space.concatenation([space.fresh(3), space.fresh(4)])
    unify(space, bare, parts)
    assert space.normalise(bare) == parts


def test_heads_of_many_sizes():
    """Group norm in 4 groups against a convolution in 6: the shared minor 2 and major 2 stay free."""
    space = FactorSpace()
    norm, groups = space.product(space.fresh(4), space.fresh(6)), space.product(space.fresh(6), space.fresh(4))
    unify(space, norm, groups)
    assert space.normalise(norm) == space.normalise(groups)
    assert [factor.size for factor in space.factors(norm)] == [2, 2]


def test_streams_whose_seam_lies_in_a_group_are_free_in_common_runs():
    """Groups of 8 and of 4, end to end, against groups of 12: runs of 4 lie alike on both sides."""
    space = FactorSpace()
    streams = space.product(space.fresh(4), space.fresh(8)), space.product(space.fresh(4), space.fresh(4))
    both, groups = space.concatenation(streams), space.product(space.fresh(4), space.fresh(12))
    unify(space, both, groups)
    assert layout(space, both) == layout(space, groups)
    assert {factor.size for axis in (*streams, both, groups) for factor in space.factors(axis)} == {4}
    assert len({factor for axis in (*streams, groups) for factor in space.factors(axis)}) == 1


def test_what_has_no_common_divisor_is_pinned():
    space = FactorSpace()
    one, two = space.product(space.fresh(3), space.fresh(8)), space.product(space.fresh(8), space.fresh(3))
    factor = space.factors(one)[0]
    unify(space, one, two)
    assert space.is_constant(one)
    assert space.is_constant(two)
    assert str(factor.pinned) == "two factorings of one dimension cannot be aligned"


@pytest.mark.parametrize("layers", [50, 200])
def test_dense_nets_split_nothing(layers):
    """Every reader takes the form of all features before it: one refinement per reader, none of a feature."""
    space = FactorSpace()
    features, readers = [space.fresh(8)], []
    with within(20):
        for _ in range(layers):
            reader = space.fresh(8 * len(features))
            unify(space, space.concatenation(features), reader)
            readers.append(reader)
            features.append(space.fresh(8))
    assert all(space.normalise(feature) == feature for feature in features)
    assert sum(reader[0][0].refined_to is not None for reader in readers) == layers - 1


HARD = {
    "window partition": ([2, (7, 8), (7, 8), 24], [2, 7, 8, 7, 8, 24]),
    "constants of a folded patch": ([2, 8, 2, 8, 2, 6], [2, 64, 4, 6]),
    "constants that do not divide": ([4, 9, 10], [6, 6, 10]),
    "coprime constants": ([4, 9], [9, 4]),
    "powers of two": ([2] * 12, [16, 16, 16]),
    "two and three": ([2, 3] * 5, [3, 2] * 5),
    "large": ([1000, 1024], [1024, 1000]),
}


@pytest.mark.parametrize("fixed", ["none", "first", "second", "alternating"])
@pytest.mark.parametrize("name", HARD)
def test_hard_products_end(name, fixed):
    space = FactorSpace()

    def build(sizes, is_first):
        axes = []
        for i, size in enumerate(sizes):
            parts = size if isinstance(size, tuple) else (size,)
            constants = fixed == ("first" if is_first else "second") or (fixed == "alternating" and i % 2 == is_first)
            axes += [constant(part) if constants else space.fresh(part) for part in parts]
        return space.product(*axes)

    one, two = build(HARD[name][0], True), build(HARD[name][1], False)
    with within(5):
        unify(space, one, two)
    assert space.normalise(one) == space.normalise(two)


def test_tiles_cut_at_many_places_end():
    """16 channels tiled to 40, those to 80, those to 200, each added to a plain dimension."""
    space = FactorSpace()
    axis = space.fresh(16)
    with within(5):
        for width in (40, 80, 200, 333):
            copies = -(-width // axis_size(axis))
            tiled = cut(space, space.product(space.fresh(copies), axis), 0, width)
            writer = space.fresh(width)
            unify(space, writer, tiled)
            axis = space.normalise(writer)
    assert axis_size(axis) == 333
