"""Index maps against what numpy does with the same reshapes and concatenations."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor, axis_size
from fxwidth.axes.index_maps import NEW, IndexMaps, Indices
from fxwidth.axes.unification import split
from tests.oracles.axes_strategy import SIZES, Plan, kept_indices, plans


def _by_numpy(space: FactorSpace, axis: Axis, kept: dict[Factor, Indices]) -> Indices:
    """Number the old positions, and take from each term as from an array with one dim per element."""
    parts, start = [], 0
    for term in space.normalise(axis):
        sizes = [_size(element) for element in term]
        numbered = np.arange(start, start + int(np.prod(sizes))).reshape(sizes)
        for dim, element in enumerate(term):
            if isinstance(element, Factor):
                indices = kept.get(element, np.arange(element.size))
            else:
                indices = np.arange(element) if isinstance(element, int) else _by_numpy(space, element, kept)
            new = np.expand_dims(indices == NEW, tuple(i for i in range(len(term)) if i != dim))
            numbered = np.where(new, NEW, np.take(numbered, np.maximum(indices, 0), axis=dim))
        parts.append(numbered.ravel())
        start += int(np.prod(sizes))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _size(element: int | Factor | Axis) -> int:
    if isinstance(element, int):
        return element
    return element.size if isinstance(element, Factor) else axis_size(element)


@given(st.data(), SIZES.flatmap(plans), st.booleans())
def test_indices_follow_numpy(data, plan: Plan, grow):
    space = FactorSpace()
    axis = plan.build(space)
    kept = data.draw(kept_indices(space.factors(axis), grow))
    maps = IndexMaps(space, kept)
    indices = maps.indices(axis)
    np.testing.assert_array_equal(indices, _by_numpy(space, axis, kept))
    assert maps.size(axis) == len(indices)
    assert maps.changes(axis) == bool(kept)
    assert maps.changed_factors(axis) == [factor for factor in dict.fromkeys(space.factors(axis)) if factor in kept]


@given(st.data(), plans(6, 2), plans(4, 2))
def test_products_are_reshapes(data, major: Plan, minor: Plan):
    space = FactorSpace()
    one, two = major.build(space), minor.build(space)
    maps = IndexMaps(space, data.draw(kept_indices(space.factors(one) + space.factors(two))))
    grid = np.arange(24).reshape(6, 4)[np.ix_(maps.indices(one), maps.indices(two))]
    np.testing.assert_array_equal(maps.indices(space.product(one, two)), grid.ravel())


@given(st.data(), plans(6, 2), plans(4, 2))
def test_sums_are_concatenations(data, first: Plan, second: Plan):
    space = FactorSpace()
    one, two = first.build(space), second.build(space)
    maps = IndexMaps(space, data.draw(kept_indices(space.factors(one) + space.factors(two))))
    joined = np.concatenate([maps.indices(one), maps.indices(two) + 6])
    np.testing.assert_array_equal(maps.indices(space.concatenation([one, two])), joined)


@given(st.data(), SIZES.flatmap(plans), st.booleans())
def test_a_prefix_counts_what_came_before(data, plan: Plan, grow):
    space = FactorSpace()
    axis = plan.build(space)
    position = data.draw(st.integers(0, plan.size))
    left, right = split(space, axis, position)
    links = len(space.links)
    maps = IndexMaps(space, data.draw(kept_indices(space.factors(axis), grow)))
    assert maps.prefix(axis, position) == len(maps.indices(left))
    assert maps.size(axis) == len(maps.indices(left)) + len(maps.indices(right))
    assert len(space.links) == links  # a bound that an op has cut at needs no further cut


def test_new_positions_are_new_in_every_product():
    space = FactorSpace()
    heads, width = space.fresh(2), space.fresh(3)
    maps = IndexMaps(space, {heads[0][0]: np.array([1, NEW]), width[0][0]: np.array([0, NEW, 2])})
    assert maps.indices(space.product(heads, width)).tolist() == [3, NEW, 5, NEW, NEW, NEW]


def test_one_factor_twice_in_a_dimension():
    """A Gram matrix, flattened: rows and columns go together."""
    space = FactorSpace()
    channels = space.fresh(3)
    maps = IndexMaps(space, {channels[0][0]: np.array([0, 2])})
    assert maps.indices(space.product(channels, channels)).tolist() == [0, 2, 6, 8]


def test_unmentioned_factors_keep_their_size():
    space = FactorSpace()
    axis = space.fresh(4)
    maps = IndexMaps(space, {})
    assert maps.indices(axis).tolist() == [0, 1, 2, 3]
    assert not maps.changes(axis)


def test_a_larger_batch():
    space = FactorSpace()
    batch, heads = Factor(2, "batch"), space.fresh(3)
    batch.is_batch = True
    maps = IndexMaps(space, {}).with_larger_batch()
    assert maps.size(space.product(((batch,),), heads)) == 9
