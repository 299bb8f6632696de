"""The axis algebra: normal forms, sums and products."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import ONE, Factor, axis_size, constant, find
from tests.oracles.axes_strategy import SIZES, layout, plans


@given(SIZES.flatmap(plans))
def test_normal_forms_are_stable_and_keep_the_size(plan):
    space = FactorSpace()
    axis = plan.build(space)
    normal = space.normalise(axis)
    assert axis_size(axis) == axis_size(normal) == plan.size
    assert space.normalise(normal) == normal


@given(plans(6, 2), plans(4, 2), plans(5, 2))
def test_products_and_concatenations_are_associative(one, two, three):
    space = FactorSpace()
    a, b, c = (plan.build(space) for plan in (one, two, three))
    for join in (space.product, lambda *axes: space.concatenation(axes)):
        forms = [layout(space, axis) for axis in (join(join(a, b), c), join(a, join(b, c)), join(a, b, c))]
        assert forms[0] == forms[1] == forms[2]


@given(plans(6, 2), plans(4, 2), plans(5, 2))
def test_a_leading_sum_distributes(one, two, three):
    space = FactorSpace()
    a, b, inner = (plan.build(space) for plan in (one, two, three))
    joined = space.product(space.concatenation([a, b]), inner)
    apart = space.concatenation([space.product(a, inner), space.product(b, inner)])
    assert layout(space, joined) == layout(space, apart)


def test_an_inner_sum_stays_nested():
    space = FactorSpace()
    outer, left, right = (space.fresh(size) for size in (2, 3, 4))
    assert space.product(outer, space.concatenation([left, right])) == ((*outer[0], (left[0], right[0])),)


@given(SIZES.flatmap(plans))
def test_one_is_neutral(plan):
    space = FactorSpace()
    axis = plan.build(space)
    assert space.product(ONE, axis) == space.product(axis, ONE) == space.normalise(axis)
    assert space.concatenation([axis, ()]) == space.normalise(axis)


def test_neighbouring_constants_become_one():
    space = FactorSpace()
    channels = space.fresh(5)
    assert space.product(constant(2), constant(3), channels) == ((6, *channels[0]),)
    assert space.concatenation([constant(2), constant(3), channels]) == ((5,), channels[0])


def test_pinned_factors_read_as_constants():
    space = FactorSpace()
    a, b = space.fresh(2), space.fresh(3)
    joined = space.concatenation([a, b])
    space.pin(a, "for a test")
    assert space.normalise(joined) == ((2,), b[0])
    space.pin(b, "for a test")
    assert space.normalise(joined) == ((5,),)
    assert space.is_constant(joined)
    assert not space.factors(joined)


def test_the_first_reason_stays():
    space = FactorSpace()
    axis = space.fresh(2)
    space.context = "add at node add_1"
    space.pin(axis, "first")
    space.pin(axis, "second")
    assert str(axis[0][0].pinned) == "first (add at node add_1)"


def test_what_mentions_a_factor_follows_its_changes():
    space = FactorSpace()
    whole, left, right, same = (space.fresh(size) for size in (7, 3, 4, 3))
    product = space.product(whole, constant(2))
    space.refine(whole[0][0], space.concatenation([left, right]))
    assert space.normalise(product) == ((*left[0], 2), (*right[0], 2))
    space.merge(left[0][0], same[0][0])
    assert find(same[0][0]) is left[0][0]
    assert space.factors(product) == [left[0][0], right[0][0]]
    assert space.leaves(whole[0][0]) == [left[0][0], right[0][0]]


def test_marks_follow_merging_and_refining():
    space = FactorSpace()
    a, b, c, d = (space.fresh(size) for size in (4, 4, 2, 2))
    space.mix(b, "softmax")
    space.merge(a[0][0], b[0][0])
    space.refine(a[0][0], space.product(c, d))
    assert all(part[0][0].mixed.startswith("softmax") for part in (a, c, d))


def test_the_batch_is_not_divided_and_never_becomes_a_number():
    space = FactorSpace()
    batch = Factor(6, "batch")
    batch.is_batch = True
    parts = space.product(space.fresh(2), space.fresh(3))
    space.refine(batch, parts)
    space.pin(((batch,),), "its order matters")
    assert space.is_constant(parts)
    assert space.normalise(((batch,),)) == ((batch,),)


def test_a_dimension_cannot_contain_itself():
    space = FactorSpace()
    axis = space.fresh(6)
    space.refine(axis[0][0], ((axis[0][0], 1), (2,)))
    assert axis[0][0].pinned is not None


@given(st.integers(1, 40))
def test_sizes_of_one_have_no_factor(size):
    assert (FactorSpace().fresh(size) == ONE) == (size == 1)
